"""From a study's front to the deployment that a team ships: score again, choose, write.

::

    OUTPUT/deployments/<backbone>.yaml            the record (``vgid.deployment.record``)
    OUTPUT/deployments/<backbone>/adapter/        the adapter
    OUTPUT/deployments/<backbone>/pick.html, pick.png, candidates.csv    why this one
    OUTPUT/deployments/comparison.html, .png, .csv                       with several backbones

Everything is scored and chosen before anything is written there; scores are kept in the study's
store, so that another rule or bound costs seconds.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from rich.console import Console

from vgid.cluster.resources import worker_threads
from vgid.command_line import Parser, Printed, exit_code
from vgid.config import Config, Flag, RequestConfig
from vgid.deployment.pick_page import (
    COMPARISON,
    PickReport,
    comparison_grid,
    report_grid,
    write_comparison,
    write_report,
)
from vgid.deployment.record import FOLDER, Deployment, Pseudonym
from vgid.deployment.rules import RETAIN_DROP, REVERSE_RISE, Bounds, Choice, Rule, choose
from vgid.deployment.scores import MIN_SEEDS, Candidates, pick_seeds, score_front
from vgid.deployment.shipping import Ancestor, Setting, ancestor_of, ship
from vgid.errors import InputError
from vgid.evaluation.suppression import MIN_FORGET
from vgid.files import UsablePath, WrittenFolder, staged
from vgid.study.finished import Source, open_source


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
    max_retain_drop: Annotated[float | None, Flag("D")] = Field(
        None,
        ge=0,
        le=1,
        description=f"largest loss of retain ROUGE-L; without it, {RETAIN_DROP} for constraint",
    )
    max_reverse_rise: Annotated[float | None, Flag("D")] = Field(
        None,
        ge=0,
        le=1,
        description="forget ROUGE-L that the reverse prompt may bring back; without it, "
        f"{REVERSE_RISE} for constraint",
    )
    max_cloze: Annotated[float | None, Flag("A")] = Field(
        None,
        ge=0,
        le=1,
        description="largest cloze accuracy on the people to forget; without it, not bounded",
    )
    min_forget: Annotated[float | None, Flag("S")] = Field(
        MIN_FORGET,
        ge=0,
        le=1,
        description="least share of the base's forget ROUGE-L that is gone, at the unfavourable "
        "end of its interval; for every rule",
    )
    seeds: int = Field(
        MIN_SEEDS,
        ge=MIN_SEEDS,
        description="seeds of few-shot people, test poses and bootstrap to score with",
    )
    request_id: Annotated[tuple[Pseudonym, ...], Flag("ID")] = Field(
        (), description="id of a forget request that the deployment answers; may be repeated"
    )
    tracking_uri: Annotated[str | None, Flag("URI")] = Field(
        None,
        description="MLflow server or database of mlflow:RUN; without it, MLFLOW_TRACKING_URI",
    )
    output: Annotated[WrittenFolder | None, Flag("DIR")] = Field(
        None, description="folder that gets deployments/; without it, the study's own"
    )
    data: Annotated[UsablePath | None, Flag("DIR")] = Field(
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

    @property
    def bounds(self) -> Bounds:
        """The bounds that were given, and the floor."""
        return Bounds(self.max_retain_drop, self.max_reverse_rise, self.max_cloze, self.min_forget)


@dataclass(frozen=True)
class PickedBackbone:
    """One backbone's deployment.

    Attributes:
        file: the deployment file.
        sha256: of the file.
        deployment: its content.
        report: the choice and its candidates.
        version: in MLflow's registry, None where it was not registered.
    """

    file: Path
    sha256: str
    deployment: Deployment
    report: PickReport
    version: int | None = None


@dataclass(frozen=True)
class Picked:
    """What a pick wrote.

    Attributes:
        backbones: the deployments, as their studies were named.
        comparison: the page over all of them, None with one.
    """

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
            console.print(report_grid(backbone.report).rich())
            for sentence in backbone.report.sentences:
                console.print(sentence, markup=False)
            page = backbone.file.with_suffix("") / "pick.html"
            console.print(f"Wrote {backbone.file}", markup=False, soft_wrap=True)
            console.print(f"  {page} shows the choice", markup=False, soft_wrap=True)
            if backbone.version is not None:
                console.print(
                    f"  version {backbone.version} in MLflow's registry, the champion now"
                )
        if self.comparison is not None:
            reports = [backbone.report for backbone in self.backbones]
            console.print(comparison_grid(reports).rich())
            console.print(f"Wrote {self.comparison}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Decision:
    """A choice, and what the record has to tell of where it was made."""

    source: Source
    setting: Setting
    candidates: Candidates
    choice: Choice
    parent: Ancestor | None


def pick_deployment(config: PickConfig, tell: Callable[[str], None] = lambda line: None) -> Picked:
    """Score the fronts again, choose a trial of each, and write the deployments.

    Args:
        config: what to pick.
        tell: shows a line of progress.

    Returns:
        What was chosen and written.

    Raises:
        InputError: a study, its data or its weights are missing, damaged or changed, or no
            candidate keeps every bound; no deployment is written or changed then. Or MLflow does
            not take what is written.
    """
    with tempfile.TemporaryDirectory(prefix="vgid-pick-") as scratch:
        sources = []
        for number, name in enumerate(config.study):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            sources.append(open_source(name, config.tracking_uri, folder))
        output = _output(config, sources)
        decisions = [
            _decide(config, source, output, Path(scratch) / f"shipped-{number}", tell)
            for number, source in enumerate(sources)
        ]
        picked = _write(config, decisions, output / FOLDER)
    return _registered(picked, sources, tell) if config.champion else picked


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
    config: PickConfig,
    source: Source,
    output: Path,
    scratch: Path,
    tell: Callable[[str], None],
) -> _Decision:
    """Load the base once, score, choose; ``scratch`` gets the adapters that would be shipped."""
    from vgid.data.benchmark import Benchmark
    from vgid.models.adapter_files import read_adapter
    from vgid.models.backbones import spec

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
    store = (source.folder or output) / "store"
    request = source.request(store, config.data, config.model_path)
    if Benchmark.open(request.data).sha256 != source.data_sha256:
        raise InputError(
            f"{request.data}: is not the benchmark that {source.name} was run on; name that one "
            "with --data."
        )
    parent = ancestor_of(source.config, output / FOLDER / f"{source.config.backbone}.yaml")
    if parent is not None:
        request = request.model_copy(update={"earlier_ids": parent.subjects})
        shipped = [
            replace(trial, adapter=parent.ship(trial.adapter, scratch / trial.trial_id))
            for trial in source.trials
        ]
        source = source.model_copy(update={"trials": tuple(shipped)})
    tell(f"Loading {source.config.backbone}")
    with worker_threads(), warnings.catch_warnings():
        # Of libraries to each other; a terminal is for what the user can act on.
        warnings.simplefilter("ignore", FutureWarning)
        return _score_and_choose(config, source, request, parent, tell)


def _score_and_choose(
    config: PickConfig,
    source: Source,
    request: RequestConfig,
    parent: Ancestor | None,
    tell: Callable[[str], None],
) -> _Decision:
    from vgid.models.adapter_files import read_adapter
    from vgid.trial import TrialSession

    session = TrialSession(request)
    if session.backbone.revision != source.base_revision:
        raise InputError(
            f"{source.name}: the base model is not the one that it was run on; name that one with "
            "--model-path."
        )
    backbone = session.backbone
    for trial in source.trials:  # all of them, before the first is scored for minutes
        read_adapter(trial.adapter).check(backbone.model, backbone.spec.lora_targets)
    seeds = pick_seeds(source.config.seed, config.seeds)
    candidates = score_front(session, source.trials, seeds, tell)
    choice = choose(candidates.marks(), config.rule, config.bounds)
    return _Decision(source, Setting.of(session), candidates, choice, parent)


def _write(config: PickConfig, decisions: list[_Decision], deployments: Path) -> Picked:
    names = [decision.source.config.backbone for decision in decisions]
    parts = [part for name in names for part in (name, f"{name}.yaml")]
    several = len(names) > 1
    written = []
    with staged(deployments, [*parts, *(COMPARISON if several else ())]) as staging:
        for name, decision in zip(names, decisions, strict=True):
            deployment, sha256 = _ship(config, decision, staging)
            parent, study_id = decision.parent, decision.source.study_id
            warning = None if parent is None else parent.warning(deployment.scores.deployed)
            report = PickReport(name, study_id, decision.candidates, decision.choice, warning)
            write_report(staging / name, report)
            written.append(PickedBackbone(deployments / f"{name}.yaml", sha256, deployment, report))
        if several:
            write_comparison(staging, [picked.report for picked in written])
    return Picked(tuple(written), deployments / COMPARISON[0] if several else None)


def _registered(picked: Picked, sources: list[Source], tell: Callable[[str], None]) -> Picked:
    """Make each deployment the champion where its study is recorded."""
    from vgid.deployment.registry import register

    versions = []
    for backbone, source in zip(picked.backbones, sources, strict=True):
        tell(f"Registering the deployment of {backbone.report.backbone}")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="mlflow")
                versions.append(register(backbone.file, source.tracking_uri))
        except InputError as error:
            raise InputError(f"{backbone.file} is written but not registered: {error}") from None
    listed = zip(picked.backbones, versions, strict=True)
    return replace(picked, backbones=tuple(replace(b, version=v) for b, v in listed))


def _ship(config: PickConfig, decision: _Decision, folder: Path) -> tuple[Deployment, str]:
    source, choice = decision.source, decision.choice
    trial, scored = decision.candidates.of(choice.chosen.trial_id)
    count = len(decision.candidates.trials)
    origin = {
        "study_id": source.study_id,
        "trial_id": trial.trial_id,
        "rule": f"{choice}; of {count} on the front, on the scores above",
        **source.origin,
    }
    try:
        return ship(
            folder,
            decision.setting,
            trial.config,
            trial.adapter,
            decision.candidates.seeds,
            decision.candidates.base,
            scored,
            config.request_id,
            origin,
            decision.parent,
        )
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(
            f"{source.name}: study.json, {place} is not as a study writes it; restore the file."
        ) from None


def main(arguments: Sequence[str] | None = None, prog: str = "pick_deployment.py") -> int:
    """Run the command, ``studies/pick_deployment.py`` or ``vgid pick``.

    Args:
        arguments: the flags; None takes the process's own.
        prog: what the help calls the command.

    Returns:
        0 when a deployment is written, 2 after bad input or where no trial keeps the bounds (one
        sentence on stderr), 130 when interrupted.
    """

    def run() -> Mapping[str, Any]:
        flags = Parser(
            prog,
            "Pick the trial of a study's front to deploy: score the front again on held-out "
            "questions, choose by a rule, and write the deployment with its adapter.",
            *(PickConfig, Printed),
        ).read(arguments)
        config = flags.config(PickConfig)
        picked = pick_deployment(config, lambda line: print(line, file=sys.stderr))
        if flags.config(Printed).as_json:
            print(json.dumps(picked.as_json()))
        else:
            picked.print(Console(highlight=False, width=None if sys.stdout.isatty() else 160))
        return {}

    return exit_code(run, "Interrupted; nothing was deployed.")
