"""The command line of a study: flags to a ``StudyConfig``, one sentence for bad input."""

import argparse
import re
from pathlib import Path
from typing import Any, get_args

from vgid.command_line import Parser
from vgid.config import ForgetRatio, Method, Sampler, StudyConfig, TrainPairs, parse

OUTPUT = Path("runs")
"""Where a study goes if no output folder is named: ``runs/<backbone>-<number>``."""

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parser() -> argparse.ArgumentParser:
    """The flags and what they mean."""
    made = Parser(
        prog="pareto_search.py",
        description="Search VGID's hyperparameters for the front between forgetting and retaining: "
        "Ray runs the trials, Optuna proposes them, MLflow keeps them.",
    )
    defaults = {
        name: field.default
        for name, field in StudyConfig.model_fields.items()
        if not field.is_required()
    }

    def add(flag: str, **settings: Any) -> None:
        name = flag[2:].replace("-", "_")
        settings.setdefault("default", defaults.get(name))
        if settings["default"] is None:
            settings["default"] = argparse.SUPPRESS  # the help text says what happens without
        made.add_argument(flag, **settings)

    add("--backbone", metavar="NAME", help="base model, a row of vgid/models/backbones.py")
    add("--model-path", metavar="DIR", help="folder or hub id of its weights, if not the row's own")
    add("--data", type=Path, metavar="DIR", help="benchmark in the MLLMU-Bench layout; without it, "
        "the embedded backbone's own is written to OUTPUT/data")  # fmt: skip
    add("--from-deployment", type=Path, metavar="FILE", help="deployment file to start from: its "
        "adapter is part of the frozen base, its people are scored as split `earlier`; without "
        "it, the base alone")  # fmt: skip
    add("--output", type=Path, metavar="DIR", help="folder of the study, new or to be resumed; "
        "without it, runs/NAME-1 and so on")  # fmt: skip
    add("--search-space", type=Path, metavar="FILE",
        help="what is searched; without it, search_spaces/NAME.yaml")  # fmt: skip
    add("--method", choices=get_args(Method), help="unlearning method")
    add("--forget-ratio", type=int, choices=get_args(ForgetRatio), help="per cent of the people "
        "to forget")  # fmt: skip
    add("--retain-people", type=int, metavar="N", help="retain people that are scored")
    add("--train-pairs", choices=get_args(TrainPairs), help="training questions: without those "
        "that are scored as held-out, or all")  # fmt: skip
    add("--skip-defects", action="store_true", help="leave defective questions out, and people "
        "without a sound portrait; how many is said in study.json and the note")  # fmt: skip
    add("--trials", type=int, metavar="N", help="trials of the whole study, over all resumes")
    add("--seed", type=int, metavar="S", help="seed of the search, of every trial and of the "
        "splits of people and questions")  # fmt: skip
    add("--sampler", choices=get_args(Sampler), help="how points are proposed; gp is a Gaussian "
        "process, with TPE for sigma; auto is gp up to 100 trials, tpe beyond")  # fmt: skip
    add("--time-budget", type=seconds, metavar="TIME", help="start no new trial after this long, "
        "such as 90s, 10m or 2h; without it, there is no limit")  # fmt: skip
    add("--max-concurrent", type=int, metavar="K", help="trials at a time; without it, as many as "
        "the cluster holds")  # fmt: skip
    add("--workers-per-trial", type=int, metavar="W", help="data-parallel workers of a trial")
    add("--gpus-per-worker", type=float, metavar="G", help="GPUs of each worker, may be a fraction")
    add("--eval-batch-size", type=int, metavar="N", help="questions answered together at most; "
        "fewer take less memory")  # fmt: skip
    add("--store-limit-gb", type=float, metavar="GB", help="disk for teacher targets and image "
        "features, least recently used out; see also `vgid teachers --info`")  # fmt: skip
    add("--tracking-uri", metavar="URI", help="MLflow server or database; without it, "
        "OUTPUT/mlflow.db")  # fmt: skip
    add("--fresh-workers", action="store_true", help="start new worker processes for every trial "
        "in place of resident ones (slow)")  # fmt: skip
    add("--log-responses", action="store_true", help="keep questions and responses beside the "
        "adapters; they hold personal data")  # fmt: skip
    add("--resume", action="store_true", default=False, help="go on with the study that the output "
        "folder holds")  # fmt: skip
    add("--retry-failed", action="store_true", default=False, help="with --resume, run trials that "
        "failed again, under their ids")  # fmt: skip
    add("--dry-run", action="store_true", default=False, help="check everything, print the plan "
        "and stop")  # fmt: skip
    return made


def study_config(options: argparse.Namespace) -> StudyConfig:
    """The study that the flags describe.

    Raises:
        InputError: a value out of range, or a flag without the other that it needs.
    """
    values = {
        k: v for k, v in vars(options).items() if k not in ("resume", "retry_failed", "dry_run")
    }
    values.setdefault("output", _numbered(values["backbone"], options.resume))
    if "time_budget" in values:
        values["time_budget_s"] = values.pop("time_budget")
    return parse(StudyConfig, values, "command line")


def _numbered(backbone: str, resume: bool) -> Path:
    """The next free ``runs/<backbone>-<number>``, or to resume the last one that is there."""
    number = 1
    while (OUTPUT / f"{backbone}-{number}").exists():
        number += 1
    return OUTPUT / f"{backbone}-{max(1, number - 1) if resume else number}"


def seconds(text: str) -> float:
    """Parse a duration: ``90``, ``90s``, ``10m``, ``1.5h``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration, write for example 10m")
    return float(match[1]) * UNITS[match[2] or "s"]
