"""From a study's front to the deployment that a team ships: score again, choose, write.

Beside the record and its adapter (``vgid.deployment.record``) lie ``pick.html``, ``pick.png`` and
``candidates.csv``, which show why this one, and ``comparison.*`` of several backbones. Scores are
kept in the study's store, so that another rule or bound costs seconds.
"""

import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from rich.console import Console

from vgid.cluster.resources import worker_threads
from vgid.config import Config, Flag
from vgid.data.benchmark import Benchmark
from vgid.deployment import pick_page, record
from vgid.deployment.record import Deployment
from vgid.deployment.rules import RETAIN_DROP, REVERSE_RISE, Bounds, Rule, ShareForgotten, choose
from vgid.deployment.scores import (
    MIN_SEEDS,
    as_recorded,
    marks_of,
    pick_seeds,
    score_base,
    score_with_seeds,
)
from vgid.errors import InputError
from vgid.evaluation.suppression import MIN_FORGET
from vgid.files import ReadFolder, WrittenFolder, staged
from vgid.models.adapter_files import concatenate, read_adapter
from vgid.models.backbones import spec
from vgid.study.finished import Source, open_source

Bound = Annotated[float | None, Flag("D"), Field(ge=0, le=1)]


class PickConfig(Config):
    """What to pick, and how."""

    study: Annotated[tuple[str, ...], Flag("DIR|mlflow:RUN")] = Field(
        min_length=1,
        description="output folder of a study, or its run on MLflow; again for another backbone",
    )
    rule: Rule = Field(
        "constraint",
        description="constraint: forgets most within the bounds; max-forget: forgets most; knee: "
        "farthest above the chord between the front's ends",
    )
    max_retain_drop: Bound = Field(
        None,
        description=f"largest loss of retain ROUGE-L; without it, {RETAIN_DROP} for constraint",
    )
    max_reverse_rise: Bound = Field(
        None,
        description="forget ROUGE-L that the reverse prompt may bring back; without it, "
        f"{REVERSE_RISE} for constraint",
    )
    max_cloze: Bound = Field(
        None, description="largest cloze accuracy on the people to forget; without it, not bounded"
    )
    min_forget: ShareForgotten = MIN_FORGET
    seeds: int = Field(
        MIN_SEEDS,
        ge=MIN_SEEDS,
        description="seeds of few-shot people, test poses and bootstrap to score with",
    )
    request_id: record.RequestIds = ()
    tracking_uri: Annotated[str | None, Flag("URI")] = Field(
        None,
        description="MLflow server or database of mlflow:RUN; without it, MLFLOW_TRACKING_URI",
    )
    output: Annotated[WrittenFolder | None, Flag("DIR")] = Field(
        None, description="folder that gets deployments/; without it, the study's own"
    )
    data: Annotated[ReadFolder | None, Flag("DIR")] = Field(
        None, description="the study's benchmark, if it was moved"
    )
    model_path: Annotated[str | None, Flag("DIR")] = Field(
        None, description="the study's weights, if they were moved"
    )
    champion: bool = Field(
        True,
        description="leave MLflow's registry alone; without it, the deployment becomes the "
        "champion there",
    )


@dataclass(frozen=True)
class PickedBackbone:
    """One backbone's deployment and the choice; no ``version`` where MLflow's registry has none."""

    file: Path
    sha256: str
    deployment: Deployment
    report: pick_page.PickReport
    version: int | None = None


@dataclass(frozen=True)
class Picked:
    """What a pick wrote, in the order of the studies; no ``comparison`` page with one of them."""

    backbones: tuple[PickedBackbone, ...]
    comparison: Path | None = None

    def as_json(self) -> dict[str, Any]:
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
                for backbone in self.backbones
            ],
            "comparison": None if self.comparison is None else str(self.comparison),
        }

    def print(self, console: Console) -> None:
        """Show tables, sentences and files."""
        for backbone in self.backbones:
            console.print(pick_page.report_grid(backbone.report).rich())
            page = backbone.file.with_suffix("") / "pick.html"
            lines = [f"Wrote {backbone.file}", f"  {page} shows the choice"]
            if backbone.version is not None:
                lines.append(f"  version {backbone.version} in MLflow's registry, the champion now")
            told = "\n".join([*backbone.report.sentences, *lines])
            console.print(told, markup=False, soft_wrap=True)
        if self.comparison is not None:
            grid = pick_page.comparison_grid([backbone.report for backbone in self.backbones])
            console.print(grid.rich())
            console.print(f"Wrote {self.comparison}", markup=False, soft_wrap=True)


def pick_deployment(config: PickConfig, tell: record.Tell = lambda line: None) -> Picked:
    """Score the fronts again, choose a trial of each, and write the deployments.

    InputError where a study, its data or its weights are missing, damaged or changed, or no
    candidate keeps every bound: nothing is written or changed then. Or MLflow does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="vgid-pick-") as scratch:
        sources = []
        for number, name in enumerate(config.study):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            sources.append(open_source(name, config.tracking_uri, folder))
        output = _output(config, sources)
        names = [source.config.backbone for source in sources]
        # All is scored and chosen before anything is written.
        decisions = [
            _decide(config, source, output, Path(scratch) / f"shipped-{number}", tell)
            for number, source in enumerate(sources)
        ]
        deployments, several = output / record.FOLDER, len(names) > 1
        parts = [part for name in names for part in (name, f"{name}.yaml")]
        with staged(deployments, [*parts, *(pick_page.COMPARISON if several else ())]) as staging:
            pairs = zip(sources, decisions, strict=True)
            picked = [_write(config, *pair, deployments, staging) for pair in pairs]
            if several:
                pick_page.write_comparison(staging, [one.report for one in picked])
    if config.champion:
        both = zip(picked, sources, strict=True)
        picked = [_registered(one, source, tell) for one, source in both]
    return Picked(tuple(picked), deployments / pick_page.COMPARISON[0] if several else None)


def _output(config: PickConfig, sources: list[Source]) -> Path:
    """The folder that gets the deployments, with what cannot be written there refused first."""
    backbones = [source.config.backbone for source in sources]
    for backbone in backbones:
        if backbones.count(backbone) > 1:
            raise InputError(
                f"--study: two studies are of {backbone}; name one study for each backbone."
            )
    if len(sources) > 1 and config.model_path is not None:
        raise InputError("--model-path: names one backbone's weights; give one --study with it.")
    if config.output is not None:
        if config.output.exists() and not config.output.is_dir():
            raise InputError(f"{config.output}: is a file; name a folder with --output.")
        return config.output
    if len(sources) > 1:
        raise InputError("--output: several studies need a folder of their own for the result.")
    if sources[0].folder is None:
        raise InputError(
            f"--output: the folder of {sources[0].name} is gone; name one for the result."
        )
    return sources[0].folder


def _decide(
    config: PickConfig, source: Source, output: Path, scratch: Path, tell: record.Tell
) -> tuple[pick_page.PickReport, dict[str, Any], record.Shipped | None]:
    """Score and choose; the choice, its ``setting_of``, and the deployment that the study follows.

    ``scratch`` gets the adapters that would be shipped.
    """
    from vgid.trial import TrialSession

    _check_trials(source)
    request = source.request((source.folder or output) / "store", config.data, config.model_path)
    if Benchmark.open(request.data).sha256 != source.data_sha256:
        raise InputError(
            f"{request.data}: is not the benchmark that {source.name} was run on; name that one "
            "with --data."
        )
    parent, trials = None, list(source.trials)
    file = source.config.from_deployment
    if file is not None:
        parent = record.read_shipped(file)
        if parent.sha256 != source.config.from_deployment_sha256:
            raise InputError(
                f"{file}: is not what the study started from any more; restore the file."
            )
        # What would be shipped is scored: each adapter with the parent's in it, on the base.
        record.refuse_to_replace(file, output / record.FOLDER / f"{source.config.backbone}.yaml")
        request = request.model_copy(update={"earlier_ids": parent.as_parent.subjects})
        trials = [replace(trial, adapter=scratch / trial.trial_id) for trial in trials]
        for fresh, trial in zip(source.trials, trials, strict=True):
            concatenate(parent.adapter, fresh.adapter, trial.adapter)
    tell(f"Loading {source.config.backbone}")
    with worker_threads(), warnings.catch_warnings():
        # Of libraries to each other; a terminal is for what the user can act on.
        warnings.simplefilter("ignore", FutureWarning)
        session = TrialSession(request)
        backbone = session.backbone
        if backbone.revision != source.base_revision:
            raise InputError(
                f"{source.name}: the base model is not the one that it was run on; name that one "
                "with --model-path."
            )
        for trial in trials:  # all of them, before the first is scored for minutes
            read_adapter(trial.adapter).check(backbone.model, backbone.spec.lora_targets)
        seeds = pick_seeds(source.config.seed, config.seeds)
        base, candidates = score_base(session, seeds, tell), {}
        for number, trial in enumerate(trials, start=1):
            tell(f"Scoring trial {trial.trial_id} ({number} of {len(trials)})")
            candidates[trial.trial_id] = trial, score_with_seeds(session, seeds, trial.adapter)
        marks = [marks_of(name, base, scored) for name, (_, scored) in candidates.items()]
        bounds = Bounds(
            config.max_retain_drop, config.max_reverse_rise, config.max_cloze, config.min_forget
        )
        choice = choose(marks, config.rule, bounds)
        names = source.config.backbone, source.study_id
        report = pick_page.PickReport(*names, seeds, base, candidates, choice)
        return report, record.setting_of(session), parent


def _check_trials(source: Source) -> None:
    """What can be wrong with a study's adapters is said before anything is loaded."""
    if not source.trials:
        raise InputError(
            f"{source.name}: its front holds no trial to pick; run the study with more trials."
        )
    targets = spec(source.config.backbone).lora_targets
    for trial in source.trials:
        adapter = read_adapter(trial.adapter)
        adapter.check_targets(targets)
        if adapter.rank != trial.config.lora_rank:
            raise InputError(
                f"{source.name}: the adapter of trial {trial.trial_id} has rank {adapter.rank} and "
                f"its setting says {trial.config.lora_rank}; restore the study's files."
            )


def _write(
    config: PickConfig,
    source: Source,
    decision: tuple[pick_page.PickReport, dict[str, Any], record.Shipped | None],
    deployments: Path,
    staging: Path,
) -> PickedBackbone:
    report, setting, parent = decision
    _, trial, scored = report.rows[0]
    origin = {
        "study_id": source.study_id,
        "trial_id": trial.trial_id,
        "rule": f"{report.choice}; of {len(report.candidates)} on the front, on the scores above",
        **source.origin,
    }
    try:
        deployment, sha256 = record.ship(
            staging,
            trial.adapter,
            parent,
            hyperparameters=trial.config,
            requests=config.request_id,
            scores=as_recorded(report.seeds, report.base, scored),
            origin=origin,
            **setting,
        )
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(
            f"{source.name}: study.json, {place} is not as a study writes it; restore the file."
        ) from None
    if parent is not None:
        report = replace(report, warning=parent.warning(deployment.scores.deployed))
    pick_page.write_report(staging / deployment.backbone, report)
    file = deployments / f"{deployment.backbone}.yaml"
    return PickedBackbone(file, sha256, deployment, report)


def _registered(picked: PickedBackbone, source: Source, tell: record.Tell) -> PickedBackbone:
    from vgid.deployment.registry import register

    tell(f"Registering the deployment of {picked.report.backbone}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="mlflow")
            return replace(picked, version=register(picked.file, source.tracking_uri))
    except InputError as error:
        raise InputError(f"{picked.file} is written but not registered: {error}") from None
