"""The command line of ``studies/compare_methods.py``: flags to a ``CompareConfig``."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from vgid.command_line import Parser, exit_code, words
from vgid.config import Config, ForgetRatio, Method, Sampler, parse
from vgid.paths import StudyFolder, UsablePath


class CompareConfig(Config):
    """A comparison of methods by studies of equal size.

    Attributes:
        backbone: a row of ``vgid.models.backbones``.
        methods: which; VGID's lead is told where it is among them.
        trials: of each study.
        seeds: studies a method, from seed 0 on.
        output: folder; studies that it holds are used or gone on with.
        retain_drop: largest loss of retain ROUGE-L that a method's best point may have.
        sampler: of every study.
        data: benchmark; None: the embedded backbone's own.
        model_path: weights in place of the backbone's own.
        search_space: None: search_spaces/<backbone>.yaml.
        forget_ratio: per cent of the people to forget.
        retain_people: retain people that are scored.
        max_concurrent: trials at a time; None: what the cluster holds.
        workers_per_trial: data-parallel workers of a trial.
        gpus_per_worker: GPUs of each.
    """

    backbone: str = "tiny-llava"
    methods: tuple[Method, ...] = Field(get_args(Method), min_length=1)
    trials: int = Field(24, ge=1)
    seeds: int = Field(3, ge=1)
    output: StudyFolder
    retain_drop: float = Field(0.02, ge=0)
    sampler: Sampler = "auto"
    data: UsablePath | None = None
    model_path: str | None = None
    search_space: UsablePath | None = None
    forget_ratio: ForgetRatio = 5
    retain_people: int = Field(50, ge=2)
    max_concurrent: int | None = Field(None, ge=1)
    workers_per_trial: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0, ge=0)


def parser() -> argparse.ArgumentParser:
    """The flags of ``studies/compare_methods.py``."""
    made = Parser(
        prog="compare_methods.py",
        description="Give each method its own study of the same size, and compare the fronts.",
    )
    add = made.add_argument
    add("--output", type=Path, metavar="DIR", required=True, help="folder, new or to go on with")
    add(
        "--backbone", default="tiny-llava", metavar="NAME", help="a row of vgid/models/backbones.py"
    )
    add("--methods", default="all", metavar="LIST", help="such as vgid,po_dpo,npo, or all")
    add("--trials", type=int, default=24, metavar="N", help="trials of each study")
    add("--seeds", type=int, default=3, metavar="N", help="studies a method, from seed 0 on")
    add("--retain-drop", type=float, default=0.02, metavar="D", help="largest loss of retain "
        "ROUGE-L that a method's best point may have")  # fmt: skip
    add("--sampler", choices=get_args(Sampler), default="auto", help="of every study")
    add("--data", type=Path, default=None, metavar="DIR", help="benchmark in the MLLMU-Bench "
        "layout; without it, the embedded backbone's own")  # fmt: skip
    add("--model-path", default=None, metavar="DIR", help="weights of the backbone, if not its own")
    add("--search-space", type=Path, default=None, metavar="FILE",
        help="without it, search_spaces/NAME.yaml")  # fmt: skip
    add("--forget-ratio", type=int, choices=get_args(ForgetRatio), default=5,
        help="per cent of the people to forget")  # fmt: skip
    add("--retain-people", type=int, default=50, metavar="N", help="retain people that are scored")
    add("--max-concurrent", type=int, default=None, metavar="K", help="trials at a time; without "
        "it, as many as the cluster holds")  # fmt: skip
    add("--workers-per-trial", type=int, default=1, metavar="W", help="data-parallel workers")
    add("--gpus-per-worker", type=float, default=0, metavar="G", help="GPUs of each worker")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when done, 1 when a study could not be (one sentence on stderr), 2 after bad input, 130
        when interrupted.
    """

    def run() -> Mapping[str, Any]:
        values = vars(parser().parse_args(arguments))
        named = values.pop("methods")
        if named != "all":
            values["methods"] = words(named)
        config = parse(CompareConfig, values, "command line")
        from vgid.paper.compare import run_comparison

        summary = run_comparison(config)
        if not summary["interrupted"] and not summary.get("error"):
            print(summary["verdict"])
            print(f"Files in {config.output}: {', '.join(summary['files'])}")
        return summary

    return exit_code(run, "Interrupted; the same command goes on from here.")
