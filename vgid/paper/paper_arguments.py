"""The command line of ``studies/paper_tables.py``: flags to a ``PaperConfig``."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from vgid.command_line import Parser, exit_code, words
from vgid.config import Config, Method, parse
from vgid.paths import UsablePath, WrittenFolder

ALL_TABLES = tuple(range(1, 10))


class PaperConfig(Config):
    """A run of the paper's tables.

    Attributes:
        backbones: rows of ``vgid.models.backbones``.
        tables: numbers of the paper's tables.
        seeds: how many, from 0 on.
        output: folder; what it holds of an earlier run is used.
        methods: those with a row; all if None.
        settings: JSON files with tuned settings, at most one a backbone.
        data: benchmark; None: the embedded backbones' own.
        model_path: weights in place of the backbone's own, for a single backbone.
        retain_people: retain people that are scored.
        bootstrap_samples: behind each outcome's interval over questions.
        processes: groups of experiments at a time; a group is of one backbone, ratio and seed.
    """

    backbones: tuple[str, ...] = Field(("tiny-llava",), min_length=1)
    tables: tuple[int, ...] = Field(ALL_TABLES, min_length=1)
    seeds: int = Field(5, ge=1)
    output: WrittenFolder
    methods: tuple[Method, ...] | None = None
    settings: tuple[UsablePath, ...] = ()
    data: UsablePath | None = None
    model_path: str | None = None
    retain_people: int = Field(50, ge=2)
    bootstrap_samples: int = Field(1000, ge=100)
    processes: int = Field(2, ge=1)

    @field_validator("tables")
    @classmethod
    def _of_the_paper(cls, tables: tuple[int, ...]) -> tuple[int, ...]:
        unknown = sorted(set(tables) - set(ALL_TABLES))
        if unknown:
            raise ValueError(f"the paper has no Table {unknown[0]}; choose from 1 to 9")
        return tuple(sorted(set(tables)))


def parser() -> argparse.ArgumentParser:
    """The flags of ``studies/paper_tables.py``."""
    made = Parser(
        prog="paper_tables.py",
        description="The nine tables, figures 2 and 4 to 7 and the claims of the VGID paper, run "
        "or taken from the cache in the output folder.",
    )
    add = made.add_argument
    add("--output", type=Path, metavar="DIR", required=True, help="folder, new or to go on with")
    add("--tables", type=numbers, default=ALL_TABLES, metavar="LIST", help="such as 1-9 or 3,6")
    add("--backbone", nargs="+", default=["tiny-llava"], metavar="NAME",
        help="rows of vgid/models/backbones.py")  # fmt: skip
    add("--seeds", type=int, default=5, metavar="N", help="how many seeds, from 0 on")
    add("--methods", type=words, default=None, metavar="LIST",
        help="such as vgid,ga,npo; without it, all")  # fmt: skip
    add("--settings", nargs="+", type=Path, default=[], metavar="FILE",
        help="tuned settings, as compare_methods.py writes them, one file a backbone; without it, "
        "the first point of each section in search_spaces")  # fmt: skip
    add("--data", type=Path, default=None, metavar="DIR", help="benchmark in the MLLMU-Bench "
        "layout; without it, the embedded backbones' own")  # fmt: skip
    add("--model-path", default=None, metavar="DIR", help="weights of the backbone, if not its own")
    add("--retain-people", type=int, default=50, metavar="N", help="retain people that are scored")
    add("--processes", type=int, default=2, metavar="K", help="groups of experiments at a time, "
        "each of one backbone, ratio and seed, with one thread; with GPUs, one a GPU")  # fmt: skip
    return made


def numbers(text: str) -> tuple[int, ...]:
    """Parse ``1-9`` or ``3,6`` or ``1,4-6``.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of tables, write 1-9 or 3,6")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when done, 2 after bad input (one sentence on stderr), 130 when interrupted.
    """

    def run() -> dict[str, Any]:
        values = vars(parser().parse_args(arguments))
        values["backbones"] = tuple(values.pop("backbone"))
        values["settings"] = tuple(values["settings"])
        config = parse(PaperConfig, values, "command line")
        from vgid.paper.run import run_paper_tables

        found = run_paper_tables(config)
        for judgement in found.judgements:
            print(f"({judgement.claim.id}) {judgement.backbone}: {judgement.verdict}, "
                  f"{judgement.measured}")  # fmt: skip
        print(f"{found.ran} experiments run. Files: {', '.join(found.files)}")
        return {}

    return exit_code(run, "Interrupted; the same command goes on from here.")
