"""The command line of a pick, for ``studies/pick_deployment.py`` and ``vgid pick``."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vgid.command_line import Parser, exit_code
from vgid.config import parse
from vgid.deployment.rules import RETAIN_DROP, REVERSE_RISE, Rule
from vgid.evaluation.suppression import MIN_FORGET

if TYPE_CHECKING:
    from vgid.deployment.pick import Picked


def main(arguments: Sequence[str] | None = None, prog: str = "pick_deployment.py") -> int:
    """Run the command.

    Args:
        arguments: the flags; None takes the process's own.
        prog: what the help calls the command.

    Returns:
        0 when a deployment is written, 2 after bad input or where no trial keeps the bounds (one
        sentence on stderr), 130 when interrupted.
    """

    def run() -> Mapping[str, Any]:
        values = vars(parser(prog).parse_args(arguments))
        as_json = values.pop("json")
        from vgid.deployment.pick import PickConfig, pick_deployment

        config = parse(PickConfig, values, "command line")
        picked = pick_deployment(config, lambda line: print(line, file=sys.stderr))
        if as_json:
            print(json.dumps(summary(picked)))
        else:
            show(picked)
        return {}

    return exit_code(run, "Interrupted; nothing was deployed.")


def parser(prog: str) -> argparse.ArgumentParser:
    """The flags and what they mean."""
    made = Parser(
        prog=prog,
        description="Pick the trial of a study's front to deploy: score the front again on "
        "held-out questions, choose by a rule, and write the deployment with its adapter.",
    )
    add = made.add_argument
    add("--study", action="append", required=True, metavar="DIR|mlflow:RUN",
        default=argparse.SUPPRESS, help="output folder of a study, or its run on MLflow; again "
        "for another backbone")  # fmt: skip
    add("--rule", choices=get_args(Rule), default="constraint", help="constraint: forgets most "
        "within the bounds; max-forget: forgets most; knee: farthest above the chord between the "
        "front's ends")  # fmt: skip
    add("--max-retain-drop", type=float, metavar="D", default=argparse.SUPPRESS, help="largest "
        f"loss of retain ROUGE-L; for constraint {RETAIN_DROP} if not given")  # fmt: skip
    add("--max-reverse-rise", type=float, metavar="D", default=argparse.SUPPRESS, help="forget "
        "ROUGE-L that the reverse prompt may bring back; for constraint "
        f"{REVERSE_RISE} if not given")  # fmt: skip
    add("--max-cloze", type=float, metavar="A", default=argparse.SUPPRESS, help="largest cloze "
        "accuracy on the people to forget; not bounded if not given")  # fmt: skip
    add("--min-forget", type=float, metavar="S", default=MIN_FORGET, help="least share of the "
        "base's forget ROUGE-L that is gone, at the unfavourable end of its interval; for every "
        "rule")  # fmt: skip
    add("--seeds", type=int, default=3, metavar="N", help="seeds of few-shot people, test poses "
        "and bootstrap to score with")  # fmt: skip
    add("--request-id", action="append", metavar="ID", default=argparse.SUPPRESS, help="id of a "
        "forget request that the deployment answers; may be repeated")  # fmt: skip
    add("--tracking-uri", metavar="URI", default=argparse.SUPPRESS, help="MLflow server or "
        "database of mlflow:RUN; without it, MLFLOW_TRACKING_URI")  # fmt: skip
    add("--output", type=Path, metavar="DIR", default=argparse.SUPPRESS, help="folder that gets "
        "deployments/; without it, the study's own")  # fmt: skip
    add("--data", type=Path, metavar="DIR", default=argparse.SUPPRESS, help="the study's "
        "benchmark, if it was moved")  # fmt: skip
    add("--model-path", metavar="DIR", default=argparse.SUPPRESS, help="the study's weights, if "
        "they were moved")  # fmt: skip
    add("--no-champion", dest="champion", action="store_false", default=argparse.SUPPRESS,
        help="leave MLflow's registry alone; without it, the deployment becomes the champion "
        "there")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object, for machines")
    return made


def show(picked: "Picked") -> None:
    """Print tables, sentences and files for people."""
    from rich.console import Console

    from vgid.deployment.pick_comparison import comparison_table
    from vgid.deployment.pick_report import report_table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for backbone in picked.backbones:
        console.print(report_table(backbone.report))
        for sentence in backbone.report.sentences:
            console.print(sentence, markup=False)
        folder = backbone.file.with_suffix("")
        console.print(f"Wrote {backbone.file}", markup=False, soft_wrap=True)
        console.print(f"  {folder / 'pick.html'} shows the choice", markup=False, soft_wrap=True)
        if backbone.version is not None:
            console.print(f"  version {backbone.version} in MLflow's registry, the champion now")
    if picked.comparison is not None:
        console.print(comparison_table([backbone.report for backbone in picked.backbones]))
        console.print(f"Wrote {picked.comparison}", markup=False, soft_wrap=True)


def summary(picked: "Picked") -> dict[str, Any]:
    """What was picked, as plain data."""
    return {
        "deployments": [
            {
                "backbone": backbone.report.backbone,
                "file": str(backbone.file),
                "sha256": backbone.sha256,
                "trial_id": backbone.report.choice.chosen.trial_id,
                "version": backbone.version,
                "rule": str(backbone.report.choice),
                "why": backbone.report.choice.why,
                "sentences": backbone.report.sentences,
            }
            for backbone in picked.backbones
        ],
        "comparison": None if picked.comparison is None else str(picked.comparison),
    }
