"""From the front to production: pick the trial to deploy, and write what an auditor asks for.

Example:
    python studies/pick_deployment.py --study runs/first --rule constraint --request-id R-17
"""

import sys

from vgid.deployment.pick_arguments import main

if __name__ == "__main__":
    sys.exit(main())
