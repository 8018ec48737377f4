"""A fair comparison: each method its own study of the same size, then the fronts.

The paper runs each method at one setting, so that a method may lose by its setting alone. Here each
gets the same number of trials, and is judged by its front and by the best point of it.

Example:
    python studies/compare_methods.py --methods all --trials 24 --seeds 3 --output runs/comparison
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vgid.command_line import Parser, exit_code
from vgid.paper.compare import NOT_ASKED, CompareConfig, run_missing, study_of, write_comparison
from vgid.paper.settings import prepare_data
from vgid.study.finished import read_study


def compare(arguments: Sequence[str] | None) -> Mapping[str, Any]:
    """Run the studies that are not done, then compare; the content of ``comparison.json``.

    ``interrupted`` tells whether a signal ended it, ``error`` why one of the studies has not all
    that it should have.

    Raises:
        InputError: bad input; nothing was started if it is in what can be checked before.
    """
    config = (
        Parser(
            "compare_methods.py",
            "Give each method its own study of the same size, and compare the fronts.",
            CompareConfig,
            without=NOT_ASKED,
        )
        .read(arguments)
        .config(CompareConfig)
    )
    data = prepare_data([config.backbone], config.data, config.output)
    studies = {}
    for seed in range(config.seeds):
        for method in config.methods:
            studies[method, seed] = study_of(config, method, seed, data)
    broken_off = run_missing(list(studies.values()))
    if broken_off is not None:
        return broken_off
    fronts = [read_study(study.output) for study in studies.values()]
    summary = write_comparison(config, fronts)
    print(summary["verdict"])
    print(f"Files in {config.output}: {', '.join(summary['files'])}")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when done, 1 when a study could not be (one sentence on stderr), 2 after bad input, 130
        when interrupted.
    """
    return exit_code(lambda: compare(arguments), "Interrupted; the same command goes on from here.")


if __name__ == "__main__":
    sys.exit(main())
