"""A fair comparison: each method its own study of the same size, then the fronts.

Example:
    python studies/compare_methods.py --methods all --trials 24 --seeds 3 --output runs/comparison
"""

import sys

from vgid.paper.compare_arguments import main

if __name__ == "__main__":
    sys.exit(main())
