"""A study on MLflow: experiment = backbone, parent run = study, child run = trial.

Only the driver process writes, in batches. Runs are found by their tags before one is created, so
a resumed study goes on in the runs that it has. Nothing here carries a name, a question or an
answer.
"""

import json
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from vgid.config import StudyConfig
from vgid.credentials import without_credentials
from vgid.errors import InputError
from vgid.files import address, as_given
from vgid.report.front import Front, write_png
from vgid.report.note import NOTE_PICTURE, Place, run_page, study_note
from vgid.report.records import MAIN_METRICS, TrialRecord, run_name
from vgid.report.tables import as_text
from vgid.study.ledger import Record
from vgid.study.mlflow_client import Connection, first_line, is_http, one_sentence, search_runs

logger = logging.getLogger(__name__)

# MLflow's terminal status for each of ours.
STATUS = {"completed": "FINISHED", "failed": "FAILED", "pruned": "KILLED", "lost": "KILLED"}
# Epoch metrics wait at most this long for company: a commit costs more than a short epoch.
FLUSH_SECONDS = 5.0
LOCAL_UI = "http://127.0.0.1:5000/"  # where ``mlflow ui`` listens by default
RETRY_SECONDS = 10.0  # after a failed request, until the server is asked again
MAX_REFUSALS = 3  # so many trials that a server does not take are enough for once
PATIENCE_SECONDS = 180.0  # how long a study's end waits for a server that does not answer
STUDY_FILE = "study.json"  # tells what the study is; its outcome replaces it


@dataclass
class _Run:
    run_id: str
    tags: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    last_step: int = -1  # of this process's epochs; those of a run taken over go again
    running: bool = True  # to MLflow
    outcome: str | None = None  # status of a trial that is recorded whole
    sent: float = 0.0  # when it was last written to


@dataclass
class _TrialRuns:
    """The runs of a study's trials: children of its own run, all with its ``tags``."""

    connection: Connection
    parent: str
    tags: Mapping[str, str]

    def __post_init__(self) -> None:
        self._client = self.connection.client
        self._runs: dict[str, _Run] = {}

    @property
    def ids(self) -> dict[str, str]:
        return {trial_id: run.run_id for trial_id, run in self._runs.items()}

    def is_fresh(self, trial_id: str) -> bool:
        run = self._runs.get(trial_id)
        return run is not None and time.time() - run.sent < FLUSH_SECONDS

    def adopt(self) -> None:
        """Learn the runs of an interrupted study, and how far each had come."""
        # Of two runs of a trial, one was asked for by a request whose answer was lost: the fuller
        # one is kept.
        for child in sorted(self._children(), key=lambda child: len(child.data.metrics)):
            tags, status = dict(child.data.tags), child.info.status
            trial_id, told = tags["vgid.trial_id"], tags.get("vgid.status")
            if trial_id in self._runs:
                self._client.delete_run(self._runs[trial_id].run_id)
            run = _Run(child.info.run_id, tags, dict(child.data.metrics))
            run.running = status == "RUNNING"
            # A run that was stopped says nothing of its trial, or was not recorded whole.
            run.outcome = told if told in STATUS and STATUS[told] == status else None
            self._runs[trial_id] = run

    def send(self, record: Record) -> None:
        """Bring a trial's run up to its record."""
        # Times are the record's: what is sent again, because its answer was lost, is to MLflow the
        # same metric and not another one.
        run = self._runs.get(record.trial_id) or self._create(record)
        if record.result is not None and record.result.status == run.outcome:
            return
        if not run.running:
            self._reopen(run)
        metrics = [
            (name, value, _milliseconds(epoch.at), epoch.report.step)
            for epoch in record.epochs
            if epoch.report.step > run.last_step
            for name, value in epoch.report.metrics.items()
        ]
        known = run.metrics | {name: value for name, value, *_ in metrics}
        last_step = max([run.last_step, *(epoch.report.step for epoch in record.epochs)])
        tags: dict[str, str] = {}
        result, ended = record.result, _milliseconds(record.ended or record.started)
        if result is not None:
            numbers = result.metrics | {f"seconds/{k}": v for k, v in result.seconds.items()}
            numbers |= {f"store/{name}": float(count) for name, count in result.store.items()}
            # After a kill between two calls, what is there already is not sent again.
            missing = {k: v for k, v in numbers.items() if known.get(k) != v}
            known |= missing
            metrics += [(k, v, ended, max(last_step, 0)) for k, v in missing.items()]
            tags["vgid.status"] = result.status
            if result.error is not None:
                tags["vgid.error"] = result.error
        # Again for a run that was taken over, which may lack them.
        params = {} if run.sent else record.config.used
        self.connection.log(run.run_id, metrics, params, tags)
        run.tags |= tags
        run.metrics, run.last_step, run.sent = known, last_step, time.time()
        if result is not None:
            if result.adapter is not None and result.adapter.is_dir():
                self._client.log_artifacts(run.run_id, str(result.adapter), "adapter")
            self._client.set_terminated(run.run_id, STATUS[result.status], ended)
            run.running, run.outcome = False, result.status

    def mark(self, record: TrialRecord, now: int) -> None:
        """Say whether a candidate is on the front, and its held-out scores if it is."""
        name = record.result.trial_id
        if record.is_harvested and record.held_out is not None:
            # Of these only the front has runs of its own, from which a pick can be made. Not before
            # it is scored again, since then its adapters are made.
            at = datetime.fromtimestamp(now / 1000, UTC).isoformat()
            run_of_its_own = Record(
                trial_id=name, config=record.config, started=at, ended=at, result=record.result
            )
            self.send(run_of_its_own)
        run = self._runs.get(name)
        if run is None:
            return
        mark = as_text(record.on_front)
        numbers: dict[str, float] = {}
        for name, score in (record.held_out or {}).items():
            numbers[f"heldout_{name}"] = score.value
            if name in MAIN_METRICS:  # front.csv has the other intervals
                numbers |= {f"heldout_{name}_low": score.low, f"heldout_{name}_high": score.high}
        missing = {name: v for name, v in numbers.items() if run.metrics.get(name) != v}
        run.metrics.update(missing)
        if missing or run.tags.get("vgid.on_front", "false") != mark:
            metrics = [(name, value, now, 0) for name, value in missing.items()]
            self.connection.log(run.run_id, metrics, tags={"vgid.on_front": mark})

    def end_all(self) -> None:
        if is_http(self.connection.uri):  # a request whose answer was lost may have made two
            for id in {child.info.run_id for child in self._children()} - {*self.ids.values()}:
                self._client.delete_run(id)
        for run in self._runs.values():
            if run.running:
                self._client.set_terminated(run.run_id, "KILLED")
                run.running = False

    def _reopen(self, run: _Run) -> None:
        """Go on with a run that was stopped, and whose trial is in flight again."""
        for tag in {"vgid.status", "vgid.error"} & run.tags.keys():
            self._client.delete_tag(run.run_id, tag)
            del run.tags[tag]
        self._client.update_run(run.run_id, status="RUNNING")
        run.running, run.outcome = True, None

    def _create(self, record: Record) -> _Run:
        own = {"vgid.kind": "trial", "vgid.trial_id": record.trial_id}
        tags = {"mlflow.parentRunId": self.parent, **own, **self.tags}
        name = run_name(record.config, record.trial_id)
        started = _milliseconds(record.started)
        created = self._client.create_run(self.connection.experiment_id, started, tags, name)
        run = self._runs[record.trial_id] = _Run(created.info.run_id, tags)
        return run

    def _children(self) -> list[Any]:
        query = f"tags.`mlflow.parentRunId` = '{self.parent}'"
        return search_runs(self._client, self.connection.experiment_id, query)


class Tracker:
    """Writes one study to an MLflow server or SQLite file, in a parent run found or made.

    The hashes are those of ``dataset`` and ``base``, ``prior`` the id of the study that it starts
    from; ``uri`` is without credentials. ``InputError`` if the server refuses, or artifacts cannot
    be kept.
    """

    def __init__(
        self,
        connection: Connection,
        study_id: str,
        config: StudyConfig,
        hashes: Mapping[str, str],
        prior: str | None = None,
    ) -> None:
        self._connection = connection
        self._client = connection.client
        self._study_id = study_id
        self._behind: dict[str, Record] = {}
        self._silent_until = 0.0
        self._refusal: str | None = None
        self._closed = False
        self.study_run_id = ""
        self.uri = connection.uri
        self.experiment_id = connection.experiment_id
        tags = {"vgid.study_id": study_id}
        tags |= {f"vgid.{name}_hash": value for name, value in hashes.items()}
        what, remedy = "the study cannot be recorded", "check the server or leave the option out"
        try:
            with one_sentence(f"--tracking-uri {self.uri}", what, remedy):
                started_from = {} if prior is None else {"vgid.warm_start": prior}
                run = self._study_run(tags | started_from)
                self.study_run_id = run.info.run_id
                self._trials = _TrialRuns(connection, self.study_run_id, tags)
                self._trials.adopt()
                self._leave_artifact(run, config)
                if not run.data.params:  # they go last: a run that has them has the data set too
                    self._log_dataset(config, hashes["dataset"])
                    values = config.model_dump(mode="json", exclude={"tracking_uri"})
                    connection.log(self.study_run_id, params=values)
        except InputError:
            self.close("FAILED")
            raise

    @property
    def server(self) -> str:
        """Address of the UI, ending in ``/``: the server's, or where ``mlflow ui`` listens."""
        return f"{self.uri.rstrip('/')}/" if is_http(self.uri) else LOCAL_UI

    @property
    def pages(self) -> dict[str, str]:
        """Page of each trial's run by trial id, relative to the server's address."""
        return {key: run_page(self.experiment_id, id) for key, id in self._trials.ids.items()}

    @property
    def ui_command(self) -> str:
        """The line that says how to see the study."""
        page = run_page(self.experiment_id, self.study_run_id)
        if is_http(self.uri):
            return f"{self.server}{page}"
        mlflow = Path(sys.executable).parent / "mlflow"
        command = shlex.join([str(mlflow), "ui", "--backend-store-uri", self.uri])
        return f"{command}   (then open {self.server}{page})"

    def log_trial(self, record: Record) -> bool:
        """Record how far a trial has come, its outcome too; whether it is recorded up to now.

        Safe to repeat. Epochs wait up to ``FLUSH_SECONDS``. What the server does not take is kept,
        and sent in order by a later call that reaches it.
        """
        if record.result is None and self._trials.is_fresh(record.trial_id):
            return False
        self._behind[record.trial_id] = record
        # A server that is away costs each attempt a timeout; tried at every epoch, that would hold
        # up the thread for longer than the epochs take.
        if time.time() >= self._silent_until and not self._catch_up():
            self._silent_until = time.time() + RETRY_SECONDS
            logger.warning("MLflow at %s does not record (%s).", self.uri, self._refusal)
        return record.trial_id not in self._behind

    def finish_study(
        self,
        front: Front,
        summary: Mapping[str, Any],
        status: str = "FINISHED",
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Record the outcome and files of ``study.json``, and held-out scores of the front.

        A server that does not answer is waited for and ``tell`` told, unless ``status`` is
        ``KILLED``; then ``InputError``, though the output folder is complete.
        """
        now = int(time.time() * 1000)
        deadline = time.monotonic() + (PATIENCE_SECONDS if status == "FINISHED" else 0.0)
        send = partial(self._send_outcome, front, summary, status, now)
        waited = False
        while True:
            there = self._connection.answers()
            # Both: the study's own outcome goes even if a trial's does not.
            if there and all([self._catch_up(), self._try(send)]):
                return
            if (there and self._connection.answers()) or time.monotonic() > deadline:
                break
            if not waited:
                tell(f"Waiting for MLflow at {self.uri}, which does not answer.")
                waited = True
            time.sleep(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
        missing = f"; {len(self._behind)} trials are missing" if self._behind else ""
        raise InputError(
            f"--tracking-uri {self.uri}: the outcome could not be recorded "
            f"({self._refusal or 'the server does not answer'}{missing}); the output folder is "
            "complete, so run the same command with --resume once that is mended."
        )

    def close(self, status: str) -> None:
        """End all runs, the study's own with a ``status``, if ``finish_study`` has not."""
        if self._closed or not self.study_run_id or not self._connection.answers():
            return
        self._catch_up()
        self._try(lambda: self._end_runs(status))

    def _study_run(self, tags: Mapping[str, str]) -> Any:
        tags = {"vgid.kind": "study", **tags}
        query = f"tags.`vgid.study_id` = '{self._study_id}' and tags.`vgid.kind` = 'study'"
        found = search_runs(self._client, self.experiment_id, query)
        if not found:
            name = f"study {self._study_id}"
            return self._client.create_run(self.experiment_id, tags=tags, run_name=name)
        self._client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0]

    def _leave_artifact(self, run: Any, config: StudyConfig) -> None:
        """Keep a first artifact: most of what can be wrong with their place shows only then."""
        what = f"artifacts cannot be kept at {without_credentials(run.info.artifact_uri)}"
        remedy = "install or permit what that place needs, or leave the option out"
        with one_sentence(f"--tracking-uri {self.uri}", what, remedy):
            there = {file.path for file in self._client.list_artifacts(run.info.run_id)}
            if STUDY_FILE not in there:
                content = {"study_id": self._study_id, "config": config.model_dump(mode="json")}
                self._client.log_dict(run.info.run_id, content, STUDY_FILE)

    def _send_outcome(
        self, front: Front, summary: Mapping[str, Any], status: str, now: int
    ) -> None:
        phases = {name: row["total_s"] for name, row in summary["phases"].items()}
        files = [summary["output"] / name for name in summary["files"]]
        store = summary["store"]
        numbers = {"hypervolume": summary["hypervolume"], "wall_s": summary["wall_s"]}
        if store.get("hit_rate_after_first_trial") is not None:
            numbers["store_hit_rate"] = store["hit_rate_after_first_trial"]
            numbers["store_bytes"] = store["bytes"]
        numbers |= {f"trials_{status}": count for status, count in summary["counts"].items()}
        numbers |= {f"seconds/{phase}": seconds for phase, seconds in phases.items()}
        numbers |= {f"base_{name}": score.value for name, score in front.base.items()}
        place = Place(self.experiment_id, self._study_id, self.study_run_id, self._trials.ids)
        note = study_note(front, phases, place, summary["trained_verbatim"], summary["left_out"])
        for record in front.records:
            self._trials.mark(record, now)
        for file in files:
            self._client.log_artifact(self.study_run_id, str(file))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / NOTE_PICTURE
            write_png(path, front, whole_only=True)
            self._client.log_artifact(self.study_run_id, str(path))
        self._client.set_experiment_tag(self.experiment_id, *place.view_tag(now))
        self._connection.log(
            self.study_run_id,
            [(name, value, now, 0) for name, value in numbers.items()],
            tags={"mlflow.note.content": note},
        )
        self._end_runs(status)

    def _end_runs(self, status: str) -> None:
        self._trials.end_all()
        self._client.set_terminated(self.study_run_id, status)
        self._closed = True

    def _catch_up(self) -> bool:
        """Send what has not been taken yet; whether nothing is left."""
        refused = 0
        if self._refusal is not None and not self._connection.answers():
            return False
        for name, record in list(self._behind.items()):
            # Put back at the end of the dictionary, the queue's order: what is refused keeps none
            # of the others from being sent.
            del self._behind[name]
            if not self._try(partial(self._trials.send, record)):
                self._behind[name] = record
                refused += 1
                if refused == MAX_REFUSALS or not self._connection.answers():
                    return False
        if not refused:
            self._refusal = None
        return not refused

    def _log_dataset(self, config: StudyConfig, sha256: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        given = config.data or config.output / "data"
        dataset = Dataset(
            name=f"MLLMU-Bench layout, forget {config.forget_ratio} %",
            digest=sha256[:12],  # for display; the tag has all of it
            source_type=(address(given) or "local").partition(":")[0],
            source=json.dumps({"uri": as_given(given)}),
        )
        tags = [InputTag("mlflow.data.context", "unlearning")]
        self._client.log_inputs(self.study_run_id, [DatasetInput(dataset, tags)])

    def _try(self, send: Callable[[], None]) -> bool:
        """Send; a server that does not take it costs a wait, never the study."""
        try:
            send()
        except Exception as error:  # a store's client raises its own kinds, or is not installed
            self._refusal = first_line(error)
            return False
        return True


def _milliseconds(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
