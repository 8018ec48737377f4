"""The main job: search VGID's hyperparameters for the front between forgetting and retaining.

Example:
    python studies/pareto_search.py --backbone tiny-llava --trials 24 --output runs/first
"""

import sys

from vgid.study.arguments import main

if __name__ == "__main__":
    sys.exit(main())
