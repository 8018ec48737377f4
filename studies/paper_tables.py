"""The paper's nine tables, its figures 2 and 4 to 7, and its claims, on any backbone.

Example:
    python studies/paper_tables.py --tables 1-9 --seeds 3 --output runs/paper
"""

import sys

from vgid.paper.paper_arguments import main

if __name__ == "__main__":
    sys.exit(main())
