"""One forget request from data to deployment: one trial, scored with several seeds, put in place.

With ``from_deployment`` the request follows another one (``vgid.deployment.shipping``). People of
the requests before are never trained on, and are scored as split ``earlier``: their suppression
must not come back. Scored is the one adapter that is shipped, on the original base.

A study searches better settings than one trial has; this is for a request that must be answered
with settings that were found before, such as the parent's.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field
from rich.console import Console

from vgid.config import (
    Config,
    Flag,
    ModelPath,
    PairsToTrain,
    RatioToForget,
    RequestConfig,
    RetainPeople,
    SkipDefects,
    SplitSeed,
    TrialConfig,
    derived,
    parse,
    words,
)
from vgid.deployment.record import FOLDER, Deployment, Pseudonym
from vgid.deployment.rules import Bounds, Marks
from vgid.deployment.scores import marks_of, pick_seeds, score_with_seeds
from vgid.deployment.shipping import Ancestor, Setting, read_ancestor, refuse_to_replace, ship
from vgid.errors import InputError
from vgid.evaluation.suppression import MIN_FORGET, doubt
from vgid.files import UsablePath, WrittenFolder, staged
from vgid.report.tables import Grid
from vgid.study.ledger import now

TRIAL_ID = "0000"

SHOWN_SCORES = (
    "forget_rougeL",
    "forget_cloze",
    "forget_memorisation",
    "test_rougeL",
    "earlier_rougeL",
    "earlier_cloze",
    "earlier_memorisation",
    "retain_rougeL",
    "retain_cloze",
    "celebrity_rougeL",
    "celebrity_cloze",
)


class UnlearnConfig(Config):
    """A forget request to answer."""

    backbone: Annotated[str | None, Flag("NAME")] = Field(
        None,
        description="base model, a row of vgid/models/backbones.py; without it, the deployment's "
        "or tiny-llava",
    )
    model_path: ModelPath = None
    data: Annotated[UsablePath, Flag("DIR")] = Field(
        description="benchmark folder in the MLLMU-Bench layout"
    )
    output: Annotated[WrittenFolder, Flag("DIR")] = Field(
        description="folder that gets `deployments`"
    )
    from_deployment: Annotated[UsablePath | None, Flag("FILE")] = Field(
        None, description="deployment file to start from, for a next request"
    )
    forget_ratio: RatioToForget = 5
    forget_ids: Annotated[tuple[Pseudonym, ...] | None, Flag("LIST", read=words)] = Field(
        None, min_length=1, description="IDs among those people, with commas; without it, all"
    )
    request_id: Annotated[tuple[Pseudonym, ...], Flag("ID")] = Field(
        (), description="ID of the request; may be given again"
    )
    setting: Annotated[tuple[str, ...], Flag("NAME=VALUE")] = Field(
        (), description="a trial's hyperparameter; others are the deployment's, or the defaults"
    )
    min_forget: float | None = Field(
        MIN_FORGET,
        ge=0,
        le=1,
        description="least share of the base's forget ROUGE-L that is gone, at the unfavourable "
        "end of its interval; a trial below it is refused",
    )
    seeds: int = Field(3, ge=1, description="seeds to score with")
    seed: SplitSeed = 0
    retain_people: RetainPeople = 50
    train_pairs: PairsToTrain = "unheld"
    skip_defects: SkipDefects = False


@dataclass(frozen=True)
class Unlearned:
    """What was written.

    Attributes:
        file: the deployment file.
        sha256: of the file.
        deployment: its content.
        warning: a sentence where earlier people's suppression came back.
    """

    file: Path
    sha256: str
    deployment: Deployment
    warning: str | None

    def print(self, console: Console) -> None:
        """Show the main scores, the base's beside the deployed adapter's."""
        scores = self.deployment.scores
        rows = [
            (name, scores.deployed[name].n, scores.base[name].value, scores.deployed[name])
            for name in SHOWN_SCORES
            if name in scores.deployed
        ]
        console.print(Grid(("score", "n", "base", "deployed [95 % interval]"), rows).rich())


def unlearn(config: UnlearnConfig, tell: Callable[[str], None] = lambda line: None) -> Unlearned:
    """Answer a forget request and write its deployment, whole or not at all.

    Args:
        config: the request.
        tell: shows a line of progress.

    Raises:
        InputError: bad input, a parent that was changed since it was written, or a trial that
            failed or forgot too little.
    """
    from vgid.cluster.resources import worker_threads
    from vgid.evaluation.rehearsal import rehearsed
    from vgid.results import describe_left_out
    from vgid.trial import TrialSession

    parent = None if config.from_deployment is None else read_ancestor(config.from_deployment)
    trial = _trial(config, parent)
    request = _request(config, parent)
    left_out = rehearsed(request, [trial]).left_out
    if left_out:
        tell(f"Left out as defective: {describe_left_out(left_out)}")
    deployments = config.output / FOLDER
    file = deployments / f"{request.backbone}.yaml"
    if config.from_deployment is not None:
        refuse_to_replace(config.from_deployment, file)
    with tempfile.TemporaryDirectory(prefix="vgid-unlearn-") as scratch, worker_threads():
        fresh, shipped = Path(scratch) / "fresh", Path(scratch) / "shipped"
        _train(request, trial, fresh, tell)
        if parent is None:
            shipped = fresh
        else:
            parent.ship(fresh, shipped)
        # On the original base, since the one adapter that is shipped holds the parent's as well: on
        # the parent's merged weights it would be counted twice.
        session = TrialSession(request.model_copy(update={"deployed_adapter": None}))
        seeds = pick_seeds(config.seed, config.seeds)
        tell(f"Scoring the base model, {len(seeds)} seeds")
        base = score_with_seeds(session, seeds, None)
        doubted = doubt(base.plain)
        if doubted is not None:
            tell(f"Warning: {doubted}")
        tell(f"Scoring the adapter, {len(seeds)} seeds")
        scored = score_with_seeds(session, seeds, shipped)
        _refuse_little(marks_of(TRIAL_ID, base, scored), config.min_forget)
        setting = Setting.of(session)
        with staged(deployments, [request.backbone, file.name]) as staging:
            deployment, sha256 = ship(
                staging,
                setting,
                trial,
                shipped,
                seeds,
                base,
                scored,
                config.request_id,
                _origin(request, parent),
                parent,
            )
    warning = None if parent is None else parent.warning(deployment.scores.deployed)
    return Unlearned(file, sha256, deployment, warning)


def _refuse_little(marks: Marks, min_forget: float | None) -> None:
    """One trial is held to the floor that a pick holds each candidate to."""
    broken = [check for check in Bounds(forget=min_forget).checks(marks) if check.excess > 0]
    if broken:
        raise InputError(
            f"--min-forget: the trial has {broken[0]}, so no deployment is written; train it more "
            "with --setting, ask for less, or run a study."
        )


def _origin(request: RequestConfig, parent: Ancestor | None) -> dict[str, Any]:
    from vgid.provenance import provenance

    settings = "the parent's setting" if parent else "one setting"
    return {
        "study_id": f"{request.backbone}-{now()[:19].replace(':', '')}-{request.seed}",
        "trial_id": TRIAL_ID,
        "rule": f"one trial of {settings}; nothing was chosen",
        **provenance(),
    }


def _trial(config: UnlearnConfig, parent: Ancestor | None) -> TrialConfig:
    """The parent's hyperparameters, or the defaults, with what was set."""
    values: dict[str, Any] = {} if parent is None else parent.deployment.hyperparameters.used
    for setting in config.setting:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(
                f"--setting: {setting!r} is no NAME=VALUE, such as learning_rate=1e-3."
            )
        try:
            loaded = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2020-99-99, no date
            raise InputError(
                f"--setting: the value of {name} is not plain YAML; write a number, a word or a "
                "list such as [generation, cloze]."
            ) from None
        values[name] = tuple(loaded) if isinstance(loaded, list) else loaded
    return parse(TrialConfig, values, "--setting")


def _request(config: UnlearnConfig, parent: Ancestor | None) -> RequestConfig:
    own: dict[str, Any] = {"backbone": config.backbone or "tiny-llava"}
    if parent is not None:
        own = parent.request_fields(config.backbone, config.model_path)
    return derived(RequestConfig, config, "vgid unlearn", store=config.output / "store", **own)


def _train(
    request: RequestConfig,
    trial: TrialConfig,
    folder: Path,
    tell: Callable[[str], None],
) -> None:
    """Train the request's own adapter, on a base that is let go of before the scoring."""
    from vgid.trial import TrialSession

    tell(f"Loading {request.backbone}")
    session = TrialSession(request)
    tell(f"Forgetting {len(session.people.forget)} people")
    result = session.run(trial, TRIAL_ID, folder, evaluate=False)
    if result.status != "completed":
        raise InputError(
            f"--setting: the trial {result.status} ({result.error}); lower learning_rate."
        )
