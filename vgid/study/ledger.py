"""A study's own record in its output folder: what was asked for, what runs, what has ended.

::

    OUTPUT/.lock               held by the process that runs the study; the kernel frees it
    OUTPUT/trials/study.json   what the study is, written before its first trial
    OUTPUT/trials/0007.json    one trial: its config before it starts, its epochs, its result

Everything else that tells of trials (``trials.csv``, Optuna's journal, MLflow) is brought in line
with this record when a study is resumed, so a killed study neither loses nor doubles a trial.
"""

import contextlib
import secrets
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from vgid.config import Config, StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.files import lock, refuse_links, write_atomically
from vgid.requirement import turned
from vgid.results import CANDIDATE, EpochReport, TrialResult, trial_order
from vgid.study.warm_start import Prior

# Fields of a study that a resume must repeat: otherwise its trials were made in two ways.
MUST_AGREE = (
    "backbone",
    "model_path",
    "data",
    "from_deployment_sha256",
    "method",
    "forget_ratio",
    "seed",
    "retain_people",
    "train_pairs",
    "skip_defects",
    "require",
    "harvest",
    "objectives",
    "warm_start",
    "halving",
    "workers_per_trial",
    "tracking_uri",
)
# The others: how much and how fast, and where files lie whose content must agree.
MAY_CHANGE = tuple(name for name in StudyConfig.model_fields if name not in MUST_AGREE)
# What a header holds of a study's content: what it is called, and how to have it again.

CONTENT = {
    "vgid_version": ("vgid", "install that version"),
    "data_sha256": ("data", "restore the files of the benchmark"),
    "base_revision": ("weights of the base", "restore the files of the model"),
    "precision": (
        "precision",
        "give the workers a GPU (--gpus-per-worker) or none, as they had before",
    ),
}
C = TypeVar("C", bound=Config)


class Header(Config):
    """What a study is; times are UTC, ISO 8601, here and in its trials' records."""

    study_id: str  # its name in MLflow and Optuna, unique
    config: StudyConfig  # as it was started
    search_space_sha256: str
    started: str
    warm_start: Prior | None = None
    # None where it is not known yet, or was not recorded when the study was started; then constant.
    vgid_version: str | None = None
    data_sha256: str | None = None
    base_revision: str | None = None  # hub commit or SHA-256
    precision: str | None = None  # dtype of the base's weights in the workers


class Heard(Config):
    """An epoch's report, and when the driver heard it."""

    report: EpochReport
    at: str


class Record(Config):
    """One trial; ``ended`` and ``result`` are None while it is in flight."""

    trial_id: str = Field(pattern=f"^{CANDIDATE}$")  # the trial's number in Optuna
    config: TrialConfig
    started: str
    epochs: tuple[Heard, ...] = ()  # reported so far, by optimizer step
    ended: str | None = None
    result: TrialResult | None = None
    slot: int | None = None
    # Seconds of the slot that went to neither training nor evaluation, counted from the end of its
    # job before; None for its first.
    overhead_s: float | None = None
    failures: tuple[str, ...] = ()  # of earlier runs of it that were retried

    @model_validator(mode="after")
    def _result_is_its_own(self) -> Self:
        if self.result is not None and self.result.trial_id != self.trial_id:
            raise ValueError("the result is another trial's")
        return self


def changes(before: StudyConfig, asked: StudyConfig) -> list[str]:
    """What a resume does otherwise than the study was started: ``trials 9 (started with 4)``."""
    return [
        f"{_flag(name)} {getattr(asked, name)} (started with {getattr(before, name)})"
        for name in MAY_CHANGE
        if getattr(before, name) != getattr(asked, name)
    ]


def _flag(field: str) -> str:
    return field.removesuffix("_s").replace("_", "-")


def trial_id(number: int) -> str:
    """The id of a trial by its number: ``0007``."""
    return f"{number:04d}"


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# Three things tell of a trial: this record, Optuna's journal, MLflow. They cannot change in one
# step, so one is the truth and the others are made from it. A study killed at any point below
# resumes whole:
#
#     start   0007.json, no result        -> in flight: runs again under the same id
#     epoch   0007.json, one epoch more   -> runs again from its checkpoint, which has that epoch
#     end     0007.json, with its result  -> the resume tells Optuna's journal and MLflow of it
#
# A file each, because a rename replaces one file whole, and damage then costs one trial.
class Ledger:
    """The record of one study in ``output``, held by one process at a time; a context manager.

    Raises:
        InputError: another process runs a study in this folder, or it cannot be written.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / "trials"
        self._file = self.folder / "study.json"
        self.header: Header  # once it is open
        self.records: dict[str, Record] = {}
        self._made = not output.exists()
        try:
            output.mkdir(parents=True, exist_ok=True)
            running = _refusal(output, "a study is running in this folder", "wait for it")
            self._lock = lock(output / ".lock", str(running))
        except OSError as error:
            what = f"the output folder cannot be written ({error.strerror})"
            raise _refusal(output, what, "mend that") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; one that was made here and in which nothing was begun goes."""
        if not self._file.exists():
            with contextlib.suppress(OSError):
                if self.folder.exists():
                    self.folder.rmdir()
                (self.output / ".lock").unlink()
                if self._made:
                    self.output.rmdir()
        self._lock.release()

    def open(
        self,
        config: StudyConfig,
        search_space_sha256: str,
        resume: bool,
        prior: Prior | None = None,
    ) -> Header:
        """Begin a study under a new id, or go on with the one there; ``InputError`` if neither."""
        refuse_links(self.output)
        if resume:
            return self.resume(config, search_space_sha256)
        stamp = now()
        header = Header(
            # Two studies may start in the same second, on one server.
            study_id=f"{config.backbone}-{stamp[:19].replace(':', '')}-{config.seed}"
            f"-{secrets.token_hex(3)}",
            config=config,
            search_space_sha256=search_space_sha256,
            started=stamp,
            warm_start=prior,
            vgid_version=version("vgid"),
        )
        self.begin(header)
        return header

    def begin(self, header: Header) -> None:
        """Start a study, also over one without any work done; ``InputError`` if there is more."""
        started = list(self.folder.glob("[0-9]*.json"))
        if any(self._has_worked(path) for path in started):
            what = "the folder already holds a study"
            raise _refusal(self.output, what, "continue it with --resume")
        self.folder.mkdir(exist_ok=True)
        # A killed process leaves its lock, and what it wrote of the header.
        mine = {self.folder, self.output / ".lock", *self.folder.glob(".*")}
        there = {*self.output.iterdir(), *self.folder.iterdir()}
        if not self._file.exists() and there - mine:
            what = "the folder is not empty and holds no study"
            raise _refusal(self.output, what, "empty it")
        self._sweep()
        for path in started:  # proposals that nothing came of
            path.unlink()
        self._write(self._file, header)
        self.header = header

    def settle(self, **found: str) -> list[str]:
        """Hold keys of ``CONTENT`` against the study's, and keep what is new.

        Returned are those that older trials may have had otherwise: nobody recorded them then.
        ``InputError`` if something differs.
        """
        new = {}
        for name, value in found.items():
            before = getattr(self.header, name)
            what, remedy = CONTENT[name]
            if before is None:
                new[name] = value
            elif before != value:
                raise _other(self.output, what, before[:12], value[:12], remedy)
        if new:
            header = self.header.model_copy(update=new)
            self._write(self._file, header)
            self.header = header
        return [CONTENT[name][0] for name in new] if self.ended else []

    def resume(self, config: StudyConfig, search_space_sha256: str) -> Header:
        """Read the record of a study that was begun earlier; of its content only the version.

        ``InputError`` if there is none, or it is damaged or another study's.
        """
        header = recorded(self.output)
        kept, wanted = header.config.model_dump(), config.model_dump()  # without credentials
        for field in MUST_AGREE:
            if kept[field] != wanted[field]:
                remedy = "repeat the first value"
                raise _other(self.output, _flag(field), kept[field], wanted[field], remedy)
        if header.search_space_sha256 != search_space_sha256:
            what = "the search space has changed since the study was started"
            raise _refusal(self.output, what, "restore the file")
        self._sweep()
        paths = sorted(self.folder.glob("[0-9]*.json"), key=lambda path: trial_order(path.stem))
        self.records = {}
        for number, path in enumerate(paths):
            record = _without_scores(self._record(path))
            # A gap would move every later trial to another number in Optuna, which counts from 0
            # without gaps.
            if record.trial_id != trial_id(number):
                missing = self.folder / f"{trial_id(number)}.json"
                raise _refusal(missing, "the record of this trial is missing", "restore it")
            self.records[record.trial_id] = record
        self.header = header
        self.settle(vgid_version=version("vgid"))
        return self.header

    def whole(self, name: str) -> Record:
        """A trial's record with its scores, as on disk; ``InputError`` if it is damaged."""
        return self._record(self.folder / f"{name}.json")

    @property
    def ended(self) -> list[Record]:
        """Trials that have a result, by id."""
        return [record for record in list(self.records.values()) if record.result is not None]

    @property
    def in_flight(self) -> list[Record]:
        """Trials that were started and have no result, by id."""
        return [record for record in list(self.records.values()) if record.result is None]

    def start(self, name: str, config: TrialConfig) -> Record:
        """Record a trial before it runs; a trial in flight keeps its record."""
        if name not in self.records:
            self._keep(Record(trial_id=name, config=config, started=now()))
        return self.records[name]

    def epoch(self, name: str, report: EpochReport) -> Record:
        """Record an epoch of a trial in flight."""
        record = self.records[name]
        # A resumed trial tells its epochs again from the checkpoint: they are the same, and count
        # once.
        reached = record.epochs[-1].report.step if record.epochs else -1
        if record.result is None and report.step > reached:
            self._keep(record, epochs=(*record.epochs, Heard(report=report, at=now())))
        return self.records[name]

    def rung(self, name: str, epoch: int) -> list[tuple[float, ...]]:
        """Objectives after an epoch at which they are compared, each turned so that more is better.

        A trial's own, then those of the trials that came there before it. ``KeyError`` if its own
        are not known.
        """
        objectives = self.header.config.objectives
        came = {
            record.trial_id: (heard.at, tuple(turned(each, metrics[each]) for each in objectives))
            for record in list(self.records.values())
            for heard in record.epochs
            if heard.report.epoch == epoch
            and (metrics := heard.report.metrics).keys() >= set(objectives)
        }
        at, own = came.pop(name)
        # By when they were heard, for a trial that tells its epoch again after a resume is to meet
        # whom it met before; who came in the same millisecond never counts.
        return [own, *(point for when, point in came.values() if when < at)]

    def end(self, name: str, result: TrialResult, **details: Any) -> Record:
        """Record how a trial ended, with further fields of ``Record``, and drop its checkpoints.

        ``InputError`` if it cannot be written and stays in flight, ``ValueError`` if it had ended.
        """
        if self.records[name].result is not None:
            raise ValueError(f"trial {name} has ended")
        record = self._keep(self.records[name], result=result, ended=now(), **details)
        # Only now: killed before, the record says in flight, and the checkpoint is what it goes on
        # from.
        shutil.rmtree(self.checkpoints(name), ignore_errors=True)
        return record

    def retry_failed(self) -> None:
        """Put the trials that failed in flight again, under their ids; why they did is kept."""
        for record in self.ended:
            if record.result and record.result.status == "failed":
                failures = (*record.failures, record.result.error or "")
                undone = dict.fromkeys(("result", "ended", "slot", "overhead_s"))
                self._keep(record, failures=failures, **undone)

    def checkpoints(self, name: str) -> Path:
        """Folder of a trial's resumable state."""
        return self.output / "checkpoints" / name

    def adapter(self, name: str) -> Path:
        """Folder of a trial's adapter."""
        return self.output / "adapters" / name

    def _keep(self, record: Record, **update: Any) -> Record:
        record = record.model_copy(update=update)
        self._write(self.folder / f"{record.trial_id}.json", record)
        self.records[record.trial_id] = _without_scores(record)
        return record

    def _record(self, path: Path) -> Record:
        """A trial's record, its adapter in this folder: no path in a file decides what is read."""
        record = _read(path, Record)
        if record.result is None or record.result.adapter is None:
            return record
        adapter = {"adapter": self.adapter(record.trial_id)}
        return record.model_copy(update={"result": record.result.model_copy(update=adapter)})

    def _has_worked(self, path: Path) -> bool:
        if self.checkpoints(path.stem).exists():
            return True
        record = _read(path, Record)
        return record.result is not None or bool(record.epochs or record.failures)

    def _sweep(self) -> None:
        for stray in self.folder.glob(".*"):  # half written by a killed process
            stray.unlink()

    def _write(self, path: Path, model: Config) -> None:
        write_atomically(path, model.model_dump_json(indent=1).encode())


def recorded(output: Path) -> Header:
    """What the study in a folder is; ``InputError`` if there is none, or its record is damaged."""
    file = output / "trials" / "study.json"
    if not file.exists():
        raise _refusal(output, "the folder holds no study to resume", "leave out --resume")
    return _read(file, Header)


def _read(path: Path, model: type[C]) -> C:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise _refusal(path, "the record is damaged", "restore it") from None


def _refusal(place: Path, what: str, remedy: str) -> InputError:
    return InputError(f"{place}: {what}; {remedy} or choose another --output.")


def _other(output: Path, what: str, before: Any, asked: Any, remedy: str) -> InputError:
    told = f"the study was started with {what} {before} and cannot go on with {asked}"
    return _refusal(output, told, remedy)


def _without_scores(record: Record) -> Record:
    """What is kept in memory: the intervals of 10,000 trials' scores would take a gigabyte."""
    if (result := record.result) is None or not (result.scores or result.harvest):
        return record
    harvest = tuple(each.model_copy(update={"scores": {}}) for each in result.harvest)
    bare = result.model_copy(update={"scores": {}, "harvest": harvest})
    return record.model_copy(update={"result": bare})
