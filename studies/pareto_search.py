"""The main job: search VGID's hyperparameters for the front between forgetting and retaining.

A trial trains one adapter at one setting, so that the model forgets some people, and scores how
much it has forgotten and what it still knows of everyone else. A study is many trials, which differ
in nothing but the setting, and its front: the trials that no other beats on both scores.

::

    make_plan     a search space, a benchmark's people and questions, a base model: whatever can be
        │         wrong is said here, before anything starts
    begin         the ledger, from which the study can be resumed, the console, MLflow's parent run
        │
    slots         Ray workers that keep one base model each and take one trial after the other
        │
    score_base    what every trial is measured against
        │
    search        Optuna proposes a setting ──> Ray Tune hands it to a free slot ──> run_trial ─┐
        │         ^                                                                             │
        │         └── its two scores, until --trials have ended or --time-budget is over <──────┘
        │
    score_front   the front once more, on held-out questions and with other seeds
        │
    write         study.json, trials.csv, front.csv, study.html, front.png, MLflow

``run_study`` in ``vgid/study/run.py`` is these steps, one line each, for notebooks too.

Example:
    python studies/pareto_search.py --backbone tiny-llava --trials 24 --output runs/first
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from vgid.command_line import Parser, exit_code
from vgid.config import Config, Flag, StudyConfig
from vgid.files import numbered
from vgid.study.ending import INTERRUPTED


class Mode(Config):
    """How a study is run, which is no part of what it is."""

    resume: bool = Field(False, description="go on with the study that the output folder holds")
    retry_failed: bool = Field(
        False, description="with --resume, run trials that failed again, under their ids"
    )
    dry_run: bool = Field(False, description="check everything, print the plan and stop")
    probe: bool = Field(
        False,
        description="run the first trial only, and print what all of them will take: hours, disk "
        "and, with --price-per-hour, money; --resume goes on from there",
    )
    price_per_hour: Annotated[float | None, Flag("PRICE")] = Field(
        None, ge=0, description="with --probe, of all machines of the study together"
    )

    @model_validator(mode="after")
    def _each_with_what_it_needs(self) -> Self:
        if self.retry_failed and not self.resume:
            raise ValueError("--retry-failed: there is nothing to retry; add --resume")
        if self.probe and (self.resume or self.dry_run):
            raise ValueError("--probe: it begins a study; leave out --resume and --dry-run")
        if self.price_per_hour is not None and not self.probe:
            raise ValueError("--price-per-hour: nothing is forecast without a trial; add --probe")
        return self


def read_flags(arguments: Sequence[str] | None) -> tuple[StudyConfig, Mode]:
    """The study that the flags describe, and how to run it.

    Raises:
        InputError: a value out of range, or a flag without the other that it needs.
    """
    flags = Parser(
        "pareto_search.py",
        "Search VGID's hyperparameters for the front between forgetting and retaining: Ray runs "
        "the trials, Optuna proposes them, MLflow keeps them.",
        *(StudyConfig, Mode),
        without=["from_deployment_sha256"],
    ).read(arguments)
    mode = flags.config(Mode)
    backbone = flags.given.get("backbone", StudyConfig.model_fields["backbone"].default)
    output = numbered(Path("runs") / backbone, last=mode.resume)
    return flags.config(StudyConfig, output=output), mode


def search(arguments: Sequence[str] | None) -> Mapping[str, Any]:
    """Plan the study and run it; the content of its ``study.json``.

    Raises:
        InputError: bad input, before anything was started or written.
    """
    config, mode = read_flags(arguments)
    ancestral = None
    if config.from_deployment is not None:
        from vgid.deployment.record import read_shipped

        config, ancestral = read_shipped(config.from_deployment).followed_by(config)
    if mode.dry_run:
        from vgid.study.plan import make_plan

        print("\n".join(make_plan(config, ancestral, mode.resume).lines()))
        return {}
    from vgid.study.run import probe, run_study

    if mode.probe:
        summary, whole = probe(config, ancestral=ancestral)
        print("\n".join(whole.lines(mode.price_per_hour)))
        return summary
    return run_study(config, mode.resume, retry_failed=mode.retry_failed, ancestral=ancestral)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when the study is done, 1 when it stopped for no trial's fault or no trial completed, 2
        after bad input (each one sentence on stderr), 130 when a signal ended it.
    """
    return exit_code(lambda: search(arguments), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
