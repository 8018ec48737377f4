"""One forget request from data to deployment: one trial, scored with several seeds, put in place.

With ``from_deployment`` the request follows another one (``record.Shipped``). People of the
requests before are never trained on, and are scored as split ``earlier``: their suppression must
not come back. A study searches better settings; this is for a request that must be answered with
settings that were found before, such as the parent's.
"""

import tempfile
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
from vgid.deployment import record
from vgid.deployment.record import Deployment
from vgid.deployment.rules import Bounds, ShareForgotten
from vgid.deployment.scores import as_recorded, marks_of, pick_seeds, score_base, score_with_seeds
from vgid.errors import InputError
from vgid.evaluation.rehearsal import rehearsed
from vgid.evaluation.suppression import MIN_FORGET
from vgid.files import ReadFolder, UsablePath, WrittenFolder, staged
from vgid.models.adapter_files import concatenate
from vgid.provenance import provenance
from vgid.results import describe_left_out
from vgid.study.ledger import now

TRIAL_ID = "0000"


class UnlearnConfig(Config):
    """A forget request to answer."""

    backbone: record.BackboneToScore = None
    model_path: ModelPath = None
    data: Annotated[ReadFolder, Flag("DIR")] = Field(
        description="benchmark folder in the MLLMU-Bench layout"
    )
    output: Annotated[WrittenFolder, Flag("DIR")] = Field(
        description="folder that gets `deployments`"
    )
    from_deployment: Annotated[UsablePath | None, Flag("FILE")] = Field(
        None, description="deployment file to start from, for a next request"
    )
    forget_ratio: RatioToForget = 5
    forget_ids: Annotated[tuple[record.Pseudonym, ...] | None, Flag("LIST", read=words)] = Field(
        None, min_length=1, description="IDs among those people, with commas; without it, all"
    )
    request_id: record.RequestIds = ()
    setting: Annotated[tuple[str, ...], Flag("NAME=VALUE")] = Field(
        (), description="a trial's hyperparameter; others are the deployment's, or the defaults"
    )
    min_forget: ShareForgotten = MIN_FORGET
    seeds: int = Field(3, ge=1, description="seeds to score with")
    seed: SplitSeed = 0
    retain_people: RetainPeople = 50
    train_pairs: PairsToTrain = "unheld"
    skip_defects: SkipDefects = False


class Unlearned(Config):
    """What was written, and a sentence where earlier people's suppression came back."""

    file: Path
    sha256: str
    deployment: Deployment
    warning: str | None

    def print(self, console: Console) -> None:
        """Show the main scores, the base's beside the deployed adapter's."""
        console.print(self.deployment.scores.grid().rich())


def unlearn(config: UnlearnConfig, tell: record.Tell = lambda line: None) -> Unlearned:
    """Answer a forget request and write its deployment, whole or not at all.

    InputError for bad input, a parent that was changed since it was written, or a trial that
    failed or forgot too little.
    """
    from vgid.cluster.resources import worker_threads

    parent = None if config.from_deployment is None else record.read_shipped(config.from_deployment)
    trial = _trial(config, parent)
    own: dict[str, Any] = {"backbone": config.backbone or "tiny-llava"}
    if parent is not None:
        own = parent.request_fields(config.backbone, config.model_path)
    store = config.output / "store"
    request = derived(RequestConfig, config, "vgid unlearn", store=store, **own)
    left_out = rehearsed(request, [trial]).left_out
    if left_out:
        tell(f"Left out as defective: {describe_left_out(left_out)}")
    deployments = config.output / record.FOLDER
    file = deployments / f"{request.backbone}.yaml"
    if config.from_deployment is not None:
        record.refuse_to_replace(config.from_deployment, file)
    with tempfile.TemporaryDirectory(prefix="vgid-unlearn-") as scratch, worker_threads():
        fresh = shipped = Path(scratch) / "fresh"
        _train(request, trial, fresh, tell)
        if parent is not None:
            shipped = Path(scratch) / "shipped"
            concatenate(parent.adapter, fresh, shipped)
        measured = _measure(config, request, shipped, tell)
        with staged(deployments, [request.backbone, file.name]) as staging:
            settings = "the parent's setting" if parent else "one setting"
            origin = {
                "study_id": f"{request.backbone}-{now()[:19].replace(':', '')}-{request.seed}",
                "trial_id": TRIAL_ID,
                "rule": f"one trial of {settings}; nothing was chosen",
                **provenance(),
            }
            deployment, sha256 = record.ship(
                staging,
                shipped,
                parent,
                hyperparameters=trial,
                requests=config.request_id,
                origin=origin,
                **measured,
            )
    warning = None if parent is None else parent.warning(deployment.scores.deployed)
    return Unlearned(file=file, sha256=sha256, deployment=deployment, warning=warning)


def _train(request: RequestConfig, trial: TrialConfig, folder: Path, tell: record.Tell) -> None:
    """Train the request's own adapter, on a base that is let go of before the scoring."""
    from vgid.trial import TrialSession

    tell(f"Loading {request.backbone}")
    session = TrialSession(request)
    tell(f"Forgetting {len(session.people.forget)} people")
    result = session.run(trial, TRIAL_ID, folder, evaluate=False)
    if result.status != "completed":
        message = f"the trial {result.status} ({result.error}); lower learning_rate."
        raise InputError(f"--setting: {message}")


def _measure(
    config: UnlearnConfig, request: RequestConfig, adapter: Path, tell: record.Tell
) -> dict[str, Any]:
    """Scores and setting for the record; the floor is that of a pick's candidates."""
    from vgid.trial import TrialSession

    # On the original base: what is shipped holds the parent's adapter too, which would be counted
    # twice on the parent's merged weights.
    session = TrialSession(request.model_copy(update={"deployed_adapter": None}))
    seeds = pick_seeds(config.seed, config.seeds)
    base = score_base(session, seeds, tell)
    tell(f"Scoring the adapter, {len(seeds)} seeds")
    scored = score_with_seeds(session, seeds, adapter)
    broken = Bounds(forget=config.min_forget).broken(marks_of(TRIAL_ID, base, scored))
    if broken:
        raise InputError(
            f"--min-forget: the trial has {broken}, so no deployment is written; train it more "
            "with --setting, ask for less, or run a study."
        )
    return {"scores": as_recorded(seeds, base, scored), **record.setting_of(session)}


def _trial(config: UnlearnConfig, parent: record.Shipped | None) -> TrialConfig:
    values: dict[str, Any] = {} if parent is None else parent.deployment.hyperparameters.used
    for setting in config.setting:
        name, equals, value = setting.partition("=")
        if not equals:
            example = "such as learning_rate=1e-3"
            raise InputError(f"--setting: {setting!r} is no NAME=VALUE, {example}.")
        try:
            loaded = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2020-99-99, no date
            raise InputError(
                f"--setting: the value of {name} is not plain YAML; write a number, a word or a "
                "list such as [generation, cloze]."
            ) from None
        values[name] = tuple(loaded) if isinstance(loaded, list) else loaded
    return parse(TrialConfig, values, "--setting")
