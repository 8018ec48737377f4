"""The main job: search VGID's hyperparameters for the front between forgetting and retaining.

Example:
    python studies/pareto_search.py --backbone tiny-llava --trials 24 --output runs/first
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vgid.command_line import exit_code
from vgid.errors import InputError
from vgid.study.arguments import parser, study_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when the study is done, 1 when it stopped for no trial's fault or no trial completed, 2
        after bad input (each one sentence on stderr), 130 when a signal ended it.
    """

    def run() -> Mapping[str, Any]:
        options = parser().parse_args(arguments)
        if options.retry_failed and not options.resume:
            raise InputError("--retry-failed: there is nothing to retry; add --resume.")
        config = study_config(options)
        ancestor = None
        if config.from_deployment is not None:
            from vgid.deployment.lineage import read_ancestor

            ancestor = read_ancestor(config.from_deployment)
        if options.dry_run:
            from vgid.study.plan import make_plan

            print("\n".join(make_plan(config, ancestor).lines()))
            return {}
        from vgid.study.run import run_study

        return run_study(
            config, options.resume, retry_failed=options.retry_failed, ancestor=ancestor
        )

    return exit_code(run, "The study was interrupted; go on with --resume.")


if __name__ == "__main__":
    sys.exit(main())
