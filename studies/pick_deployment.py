"""From the front to production: pick the trial to deploy, and write what an auditor asks for.

::

    open       each --study, a folder or a run on MLflow, with its data and weights as recorded
      │
    score      every trial of its front, and the base, on held-out questions, with several seeds,
      │        plainly and under the reverse prompt
    choose     by --rule, among those that forget enough and keep every bound
      │
    write      OUTPUT/deployments: a sealed record, the adapter, and the page that says why this one
      │
    register   in MLflow, as the champion of its backbone

Nothing is written before all is scored and chosen. ``pick_deployment`` in
``vgid/deployment/pick.py`` is these five steps, for notebooks too.

Example:
    python studies/pick_deployment.py --study runs/first --rule constraint --request-id R-17
"""

import sys
from collections.abc import Sequence

from vgid import cli


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``vgid pick``."""
    cli.main(["pick", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
