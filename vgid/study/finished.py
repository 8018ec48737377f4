"""A finished study, read: to pick a trial of its front, to compare methods, or to start from.

``DIR`` is a study's output folder. ``mlflow:RUN`` is the parent run of a study on a tracking
server: ``study.json`` and ``front.csv`` are its artifacts, the adapters those of its child runs,
so the folder may be gone. No path in a file decides what is read.
"""

import csv
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from vgid.config import Config, RequestConfig, StudyConfig, TrialConfig, derived, parse
from vgid.data.address import local
from vgid.errors import InputError
from vgid.files import refuse_links
from vgid.models.adapter_files import FILES
from vgid.pareto import hypervolume
from vgid.report.records import TRIAL_FIELDS
from vgid.requirement import OBJECTIVES
from vgid.results import CANDIDATE, QuestionPart, Score, trial_order
from vgid.study.mlflow_client import one_sentence, open_client, search_runs

MLFLOW = "mlflow:"
# In the output folder: the embedded backbone's benchmark, or a copy of what an address names.
OWN_DATA = "data"

PICK_SCORES = ("forget_rougeL", "retain_rougeL", "test_rougeL", "forget_cloze", "celebrity_rougeL")


@dataclass(frozen=True)
class Trial:
    """A trial that completed."""

    trial_id: str
    config: TrialConfig
    point: tuple[float, float]  # forget reduction and retain ROUGE-L on the search questions
    adapter: Path
    held_out: Mapping[str, float] | None = None  # ``PICK_SCORES``, if it was scored again


class Source(Config):
    """A finished study: what is read of ``study.json``, which has more, its trials, its place."""

    model_config = ConfigDict(extra="ignore")

    study_id: str
    config: StudyConfig
    git_commit: str | None
    git_dirty: bool
    versions: dict[str, str]
    data_sha256: str
    base_revision: str = Field(alias="base_sha256")
    base: dict[QuestionPart, dict[str, Score]] = Field(default_factory=dict)  # as far as scored
    name: str  # as the user wrote it, for messages
    trials: tuple[Trial, ...]  # the front, or all that completed; by trial id
    folder: Path | None  # None if it is gone
    uri: str | None  # where it is recorded, if not where its config says

    @property
    def origin(self) -> dict[str, Any]:
        """Versions and commit that the study was made with."""
        return self.model_dump(include={"git_commit", "git_dirty", "versions"})

    @property
    def tracking_uri(self) -> str:
        """Where the study is recorded."""
        own = f"sqlite:///{(self.folder or self.config.output) / 'mlflow.db'}"
        return self.uri or self.config.tracking_uri or own

    def request(self, store: Path, data: Path | None, model_path: str | None) -> RequestConfig:
        """The study's forget request, with these for its own; ``InputError`` without its data."""
        own = (self.folder or self.config.output) / OWN_DATA
        place = local(data or (own if own.is_dir() else self.config.data or own))
        if not place.is_dir():
            raise InputError(
                f"{self.name}: its benchmark {place} is not there; name it with --data."
            )
        return derived(
            RequestConfig,
            self.config,
            self.name,
            model_path=model_path or self.config.model_path,
            data=place,
            store=store,
            log_responses=False,
        )

    def reference(self, part: QuestionPart) -> tuple[float, float]:
        """Nothing forgotten, half the base's retain score; the same for all methods of a seed."""
        return 0.0, 0.5 * self.base[part]["retain_rougeL"].value

    @property
    def front(self) -> list[Trial]:
        """The trials that were scored again: the front on the search questions."""
        return [trial for trial in self.trials if trial.held_out is not None]

    @property
    def held_out_points(self) -> list[tuple[float, float]]:
        """The two objectives of the front's trials on the held-out questions."""
        start = self.base["held_out"]["forget_rougeL"].value
        scores = [trial.held_out for trial in self.front if trial.held_out is not None]
        return [(start - found["forget_rougeL"], found["retain_rougeL"]) for found in scores]

    def hypervolume(self, part: QuestionPart) -> float:
        """Of all trials on the search questions, or of the front's held-out points."""
        search = part == "search"
        points = [trial.point for trial in self.trials] if search else self.held_out_points
        return hypervolume(points, self.reference(part)) if points else 0.0

    def pick(self, retain_drop: float) -> Trial | None:
        """The trial that forgets most at a bounded retain drop, both on the search questions."""
        least = self.base["search"]["retain_rougeL"].value - retain_drop
        allowed = [trial for trial in self.front if trial.point[1] >= least]
        return max(allowed, key=lambda trial: trial.point) if allowed else None


def open_source(
    name: str,
    tracking_uri: str | None,
    scratch: Path,
    flag: str = "--study",
    adapters: bool = True,
) -> Source:
    """Open a study by its folder, or by ``mlflow:`` and the id of its parent run.

    ``tracking_uri`` is where the run is, and stands in place of the folder's own; ``scratch`` is an
    empty folder for what MLflow sends; ``flag`` named the study, for messages. Without ``adapters``
    those of its front may be missing.

    Raises:
        InputError: no study there, one that has not ended, or a file of it is missing or damaged.
    """
    if name.startswith(MLFLOW):
        return _from_mlflow(name, tracking_uri, scratch, flag, adapters)
    source = _from_folder(name, tracking_uri)
    for trial in source.trials if adapters else ():
        if not trial.adapter.is_dir():
            raise InputError(
                f"{trial.adapter}: the adapter of a trial on the front is missing; restore it."
            )
    return source


def read_study(folder: Path) -> Source:
    """A study with all its completed trials, to be compared; ``InputError`` for a damaged file."""
    try:
        source = _from_folder(str(folder), None)
        if len(source.base) < 2:
            raise InputError(f"{folder / 'study.json'}: base: was not scored on both parts.")
        completed = _trials(folder / "trials.csv", str(folder), folder / "adapters")
    except InputError as error:
        told = str(error).removesuffix(".")
        raise InputError(f"{told}, or delete {folder} to run it again.") from None
    trials = {trial.trial_id: trial for trial in (*completed, *source.trials)}
    return source.model_copy(update={"trials": tuple(trials.values())})


def _from_folder(name: str, tracking_uri: str | None) -> Source:
    folder = Path(name).expanduser().absolute()
    if not (folder / "study.json").is_file():
        raise InputError(
            f"{folder}: holds no study.json; name the output folder of a study that has ended, or "
            "mlflow:RUN."
        )
    refuse_links(folder)
    return _read_folder(folder, name, name, tracking_uri)


def _from_mlflow(
    name: str, tracking_uri: str | None, scratch: Path, flag: str, adapters: bool
) -> Source:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each file
    run_id = name.removeprefix(MLFLOW)
    if re.fullmatch(r"[0-9a-f]{32}", run_id) is None:
        raise InputError(
            f"{flag} {name}: a run id has 32 hexadecimal digits; the study's page in the MLflow "
            "UI shows it."
        )
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        raise InputError(f"{flag} {name}: name its MLflow server with --tracking-uri.")
    client, shown = open_client(uri)
    from mlflow.exceptions import MlflowException

    where = f"{flag} {name} at {shown}"
    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise InputError(f"{where}: there is no such run; look it up in the MLflow UI.") from None
    tags = run.data.tags
    if tags.get("vgid.kind") != "study":
        parent = tags.get("mlflow.parentRunId")
        hint = f"name its study, mlflow:{parent}" if parent else "name a study's run"
        raise InputError(f"{where}: the run is no study; {hint}.")
    for artifact in ("study.json", "front.csv"):
        _download(client, run_id, artifact, scratch, where)
    source = _read_folder(scratch, name, where, uri)
    query = f"tags.`mlflow.parentRunId` = '{run_id}'"
    children = search_runs(client, run.info.experiment_id, query)
    runs = {child.data.tags.get("vgid.trial_id", ""): child.info.run_id for child in children}
    for trial in source.trials if adapters else ():
        trial.adapter.mkdir(parents=True)
        of_trial = runs.get(trial.trial_id, f"of trial {trial.trial_id}, which is gone,")
        for file in FILES:
            _download(client, of_trial, f"adapter/{file}", trial.adapter, where)
    own = source.config.output / "study.json"
    same = own.is_file() and _read(own, where).get("study_id") == source.study_id
    return source.model_copy(update={"folder": own.parent if same else None})


def _download(client: Any, run_id: str, artifact: str, folder: Path, where: str) -> None:
    what = f"artifact {artifact} of run {run_id} cannot be fetched"
    with one_sentence(where, what, "restore it, or name the study's folder"):
        local = Path(client.download_artifacts(run_id, artifact, str(folder)))
        local.rename(folder / local.name)


def _read_folder(folder: Path, name: str, where: str, uri: str | None) -> Source:
    """The study whose files lie in a folder; a message about one says ``where`` it comes from."""
    trials = _trials(folder / "front.csv", where, folder / "adapters")
    own = {"name": name, "trials": trials, "folder": folder, "uri": uri}
    try:
        return parse(Source, _read(folder / "study.json", where) | own, f"{name}: study.json")
    except InputError as error:
        told = str(error).removesuffix(".")
        raise InputError(f"{told}; restore it, or finish it with --resume.") from None


def _trials(table: Path, where: str, adapters: Path) -> list[Trial]:
    """The completed trials of ``front.csv`` or ``trials.csv``, by id; adapters lie by id too."""
    trials = []
    rows = csv.DictReader(io.StringIO(_text(table, where)))
    where = f"{where}: {table.name}"
    for row in rows:
        trial_id = row.get("trial_id") or ""
        if re.fullmatch(CANDIDATE, trial_id) is None:
            raise InputError(f"{where}: a trial_id is no number; restore the file.")
        if row.get("status") != "completed":
            continue
        values: dict[str, Any] = {name: row[name] for name in TRIAL_FIELDS if row.get(name)}
        if "train_tasks" in values:
            values["train_tasks"] = tuple(values["train_tasks"].split("+"))
        config = parse(TrialConfig, values, f"{where}, trial {trial_id}")
        again = {name: row.get(f"heldout_{name}") for name in PICK_SCORES}
        try:
            point = (float(row[OBJECTIVES[0]]), float(row[OBJECTIVES[1]]))
            held_out = {name: float(value) for name, value in again.items() if value}
        except (KeyError, ValueError, TypeError):
            raise InputError(
                f"{where}: trial {trial_id} lacks {' or '.join(OBJECTIVES)}; restore the file."
            ) from None
        scored = {"forget_rougeL", "retain_rougeL"} <= held_out.keys()
        trials.append(
            Trial(trial_id, config, point, adapters / trial_id, held_out if scored else None)
        )
    return sorted(trials, key=lambda trial: trial_order(trial.trial_id))


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        return TypeAdapter(dict[str, Any]).validate_json(_text(path, where))
    except ValidationError:
        raise InputError(f"{where}: study.json is damaged; restore it.") from None


def _text(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8"
        raise InputError(f"{where}: {path.name} cannot be read ({reason}); restore it.") from None
