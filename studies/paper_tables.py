"""The paper's nine tables, its figures 2 and 4 to 7, and its claims, on any backbone.

Example:
    python studies/paper_tables.py --tables 1-9 --seeds 3 --output runs/paper
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vgid.command_line import Parser, exit_code
from vgid.paper.run import PaperConfig, run_paper_tables

TABLES = {
    1: "base, and the instruction alone in three styles: no training",
    2: "base, instruction, noise, and both: what the teacher is; also figure 2",
    3: "every method, 5 % of the people forgotten",
    4: "VGID, its teacher shown Gaussian noise of four strengths, random noise or white",
    5: "VGID, its teacher told to refuse in three styles",
    6: "base, instruction and VGID, with and without the reverse prompt",
    7: "the settings of all runs: nothing is run for it",
    8: "every method, 10 % forgotten",
    9: "every method, 15 % forgotten",
}
"""What each table has; its rows and columns stand in ``vgid.paper.tables``."""


def fill_tables(arguments: Sequence[str] | None) -> Mapping[str, Any]:
    """Run what is not in the cache of the output folder, write everything and tell the claims.

    Raises:
        InputError: bad input, told before anything runs where it can be checked.
    """
    listed = "; ".join(f"{number}: {title}" for number, title in TABLES.items())
    flags = Parser(
        "paper_tables.py",
        "The nine tables, figures 2 and 4 to 7 and the claims of the VGID paper, run or taken from "
        f"the cache in the output folder. Table {listed}.",
        PaperConfig,
        without=["bootstrap_samples"],
    ).read(arguments)
    judgements, summary = run_paper_tables(flags.config(PaperConfig))
    for judgement in judgements:
        print(f"({judgement.claim.id}) {judgement.backbone}: {judgement.verdict}, "
              f"{judgement.measured}")  # fmt: skip
    files = ", ".join([*summary["files"], "tables.json"])
    print(f"{summary['experiments_run']} experiments run. Files: {files}")
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when done, 2 after bad input (one sentence on stderr), 130 when interrupted.
    """
    return exit_code(
        lambda: fill_tables(arguments), "Interrupted; the same command goes on from here."
    )


if __name__ == "__main__":
    sys.exit(main())
