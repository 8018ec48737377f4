"""A study on MLflow: experiment = backbone, parent run = study, child run = trial.

Only the driver process writes, in batches. Runs are found by their tags before one is created, so
a resumed study goes on in the runs that it has. Nothing here carries a name, a question or an
answer. ``Tracker.open`` may run in a thread while the cluster starts: it imports MLflow and, for a
new SQLite file, makes the tables, which takes seconds.
"""

import json
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vgid.config import StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.mlflow_client import Connection, connect, first_line, search_runs
from vgid.note import NOTE_PICTURE, note_links, study_note
from vgid.outputs import MAIN_METRICS, TrialRecord, as_text, held_out_scores, run_name
from vgid.plots import Front, write_png
from vgid.results import EpochReport, LeftOut, TrialResult, TrialStatus, Verbatim
from vgid.run_view import run_page, view_tag

logger = logging.getLogger(__name__)

STATUS: dict[TrialStatus, str] = {"completed": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}
"""MLflow's terminal status for each of ours."""

FLUSH_SECONDS = 5.0
"""Epoch metrics wait at most this long for company: a commit costs more than a short epoch."""

LOCAL_UI = "http://127.0.0.1:5000/"
"""Where ``mlflow ui`` listens by default."""

MAX_METRICS = 800
"""In one request; MLflow takes 1,000 items, parameters and tags among them."""

RETRY_SECONDS = 60.0
"""After a failed request, how long the study goes on without asking the server again."""


@dataclass
class _Run:
    """What the tracker knows of a trial's run, and what it has yet to send (params, waiting).

    ``params`` is None until the trial's config is named: a run that is taken over may lack them.
    """

    run_id: str
    tags: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    last_step: int = -1
    ended: bool = False
    params: list[Any] | None = None
    waiting: list[Any] = field(default_factory=list)
    flushed: float = field(default_factory=time.time)


class Tracker:
    """Writes one study to an MLflow tracking server or SQLite file.

    Attributes:
        uri: where it writes, without credentials.
        experiment_id: the backbone's experiment.
        study_run_id: the parent run, empty before ``start_study``.
    """

    def __init__(self, connection: Connection) -> None:
        self._client = connection.client
        self._study_id = ""
        self._hashes: dict[str, str] = {}
        self._runs: dict[str, _Run] = {}
        self._unsent: dict[str, tuple[TrialConfig, TrialResult]] = {}
        self._silent_until = 0.0
        self.uri = connection.uri
        self.experiment_id = connection.experiment_id
        self.study_run_id = ""

    @classmethod
    def open(cls, uri: str | None, output: Path, backbone: str) -> Self:
        """Connect, and find or create the backbone's experiment.

        Args:
            uri: MLflow tracking URI; None for ``mlflow.db`` and ``mlartifacts`` in ``output``.
            output: the study's folder.
            backbone: name of the experiment.

        Raises:
            InputError: the URI is none, nobody answers there, or the database cannot be opened.
        """
        return cls(connect(uri, output, backbone))

    @property
    def server(self) -> str:
        """Address of the UI, ending in ``/``: the server's, or where ``mlflow ui`` listens."""
        return f"{self.uri.rstrip('/')}/" if self.uri.startswith("http") else LOCAL_UI

    @property
    def pages(self) -> dict[str, str]:
        """Page of each trial's run by trial id, relative to the server's address."""
        return {key: run_page(self.experiment_id, run.run_id) for key, run in self._runs.items()}

    @property
    def ui_command(self) -> str:
        """The line that says how to see the study."""
        page = run_page(self.experiment_id, self.study_run_id)
        if self.uri.startswith("http"):
            return f"{self.server}{page}"
        mlflow = Path(sys.executable).parent / "mlflow"
        command = shlex.join([str(mlflow), "ui", "--backend-store-uri", self.uri])
        return f"{command}   (then open {self.server}{page})"

    def start_study(self, study_id: str, config: StudyConfig, hashes: Mapping[str, str]) -> str:
        """Find or create the parent run, and learn which trials it has.

        Args:
            study_id: the study's own id, the same after a resume.
            config: what the study runs.
            hashes: hashes by what they are of; ``dataset`` and ``base`` at least.

        Returns:
            The parent's run id.

        Raises:
            InputError: the server refuses.
        """
        from mlflow.exceptions import MlflowException

        self._study_id, self._hashes = study_id, dict(hashes)
        tags = {"vgid.kind": "study", "vgid.study_id": study_id, **self._hash_tags()}
        try:
            found = self._search(
                f"tags.`vgid.study_id` = '{study_id}' and tags.`vgid.kind` = 'study'"
            )
            if found:
                run = found[0]
                self._client.update_run(run.info.run_id, status="RUNNING")
            else:
                name = f"study {study_id}"
                run = self._client.create_run(self.experiment_id, tags=tags, run_name=name)
            self.study_run_id = run.info.run_id
            self._adopt_trials()
            if not run.data.params:  # they go last: a run that has them has the data set too
                self._log_dataset(self.study_run_id, config)
                values = config.model_dump(exclude={"tracking_uri"})
                self._log(self.study_run_id, params=_params(values))
        except MlflowException as error:
            raise InputError(
                f"--tracking-uri {self.uri}: the study cannot be recorded ({first_line(error)}); "
                "check the server or leave the option out."
            ) from None
        return self.study_run_id

    def log_trial_epoch(self, trial_id: str, config: TrialConfig, report: EpochReport) -> None:
        """Record an epoch at its optimizer step; steps that are recorded are left alone."""
        run = self._trial_run(trial_id, config, time.time())
        if run is None or run.ended or report.step <= run.last_step:
            return
        from mlflow.entities import Metric

        now = time.time()
        run.last_step = report.step
        run.metrics.update(report.metrics)  # so that the result does not repeat the last epoch
        run.waiting += [
            Metric(name, value, int(now * 1000), report.step)
            for name, value in report.metrics.items()
        ]
        if now - run.flushed >= FLUSH_SECONDS:
            self._flush(run)

    def finish_trial(self, config: TrialConfig, result: TrialResult) -> bool:
        """Record a trial's outcome: parameters, scores, phases, adapter, terminal status.

        Safe to repeat: a run that has ended is left alone. If the server does not answer, the
        trial is kept and sent again by ``finish_study``.

        Returns:
            Whether the trial is recorded.
        """
        started = time.time() - sum(result.seconds.values())
        run = self._trial_run(result.trial_id, config, started)
        if run is not None and run.ended:
            return True
        if run is None or not self._try(lambda: self._send_result(run, result)):
            self._unsent[result.trial_id] = (config, result)
            return False
        self._unsent.pop(result.trial_id, None)
        return True

    def finish_study(
        self,
        front: Front,
        metrics: Mapping[str, float],
        phases: Mapping[str, float],
        files: Sequence[Path],
        status: str = "FINISHED",
        verbatim: Verbatim | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        """Record the study's outcome on the parent, and held-out scores on the front's trials.

        Args:
            front: all trials, the front and the base model's scores.
            metrics: numbers of the study as a whole: hypervolume, wall time, counts.
            phases: seconds by phase, in the order to show them.
            files: figures and tables, kept as artifacts under their own names.
            status: ``FINISHED``, or ``KILLED`` if the study was stopped.
            verbatim: which scored questions training sees (``splits.count_verbatim``).
            left_out: what of the data was left out as defective.

        Raises:
            InputError: the server does not answer; the output folder is complete all the same.
        """
        from mlflow.entities import Metric, RunTag
        from mlflow.exceptions import MlflowException

        self._silent_until = 0.0
        for config, result in list(self._unsent.values()):
            self.finish_trial(config, result)
        now = int(time.time() * 1000)
        numbers = {
            **metrics,
            **{f"seconds/{phase}": seconds for phase, seconds in phases.items()},
            **{f"base_{name}": score.value for name, score in front.base.items()},
        }
        runs = {trial_id: run.run_id for trial_id, run in self._runs.items()}
        links = note_links(
            front, self.experiment_id, self.study_run_id, self._study_id, runs, files
        )
        note = study_note(front, phases, links, verbatim, left_out)
        try:
            for record in front.records:
                self._log_front(record, front, now)
            for file in files:
                self._client.log_artifact(self.study_run_id, str(file))
            self._log_note_picture(front)
            self._client.set_experiment_tag(
                self.experiment_id, *view_tag(self._study_id, f"Study {self._study_id}", now)
            )
            self._log(
                self.study_run_id,
                metrics=[Metric(name, value, now, 0) for name, value in numbers.items()],
                tags=[RunTag("mlflow.note.content", note)],
            )
            self._client.set_terminated(self.study_run_id, status)
        except (MlflowException, OSError) as error:
            reason = first_line(error)
        else:
            if not self._unsent:
                return
            reason = f"{len(self._unsent)} trials are missing"
        raise InputError(
            f"--tracking-uri {self.uri}: the outcome could not be recorded ({reason}); the output "
            "folder is complete, so run the same command with --resume once the server answers."
        )

    def _trial_run(self, trial_id: str, config: TrialConfig, started: float) -> _Run | None:
        run = self._runs.get(trial_id)
        if run is None:
            self._try(lambda: self._create_trial_run(trial_id, config, started))
            run = self._runs.get(trial_id)
        if run is not None and run.params is None:
            run.params = _params(config.used)
        return run

    def _create_trial_run(self, trial_id: str, config: TrialConfig, started: float) -> None:
        tags = {
            "mlflow.parentRunId": self.study_run_id,
            "vgid.kind": "trial",
            "vgid.study_id": self._study_id,
            "vgid.trial_id": trial_id,
            **self._hash_tags(),
        }
        name = run_name(config, trial_id)
        created = self._client.create_run(self.experiment_id, int(started * 1000), tags, name)
        self._runs[trial_id] = _Run(created.info.run_id, tags)

    def _adopt_trials(self) -> None:
        """Learn the runs of an interrupted study, and how far each had come."""
        children = self._search(f"tags.`mlflow.parentRunId` = '{self.study_run_id}'")
        for child in children:
            trial_id = child.data.tags.get("vgid.trial_id", "")
            run = _Run(child.info.run_id, dict(child.data.tags), dict(child.data.metrics))
            run.ended = child.info.status in STATUS.values()
            if not run.ended and "loss" in run.metrics:
                history = self._client.get_metric_history(run.run_id, "loss")
                run.last_step = max(metric.step for metric in history)
            self._runs[trial_id] = run

    def _send_result(self, run: _Run, result: TrialResult) -> None:
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        values = {
            **result.metrics,
            **{f"seconds/{phase}": seconds for phase, seconds in result.seconds.items()},
            **{f"store/{name}": float(count) for name, count in result.store.items()},
        }
        step = max(run.last_step, 0)
        # After a kill between two calls, what is there already is not sent again.
        missing = [(name, v) for name, v in values.items() if run.metrics.get(name) != v]
        tags = [RunTag("vgid.status", result.status)]
        if result.error is not None:
            tags.append(RunTag("vgid.error", result.error))
        metrics = run.waiting + [Metric(name, value, now, step) for name, value in missing]
        self._log(run.run_id, params=run.params, metrics=metrics, tags=tags)
        run.params, run.waiting = [], []
        run.metrics.update(missing)
        if result.adapter is not None and result.adapter.is_dir():
            self._client.log_artifacts(run.run_id, str(result.adapter), "adapter")
        self._client.set_terminated(run.run_id, STATUS[result.status], now)
        run.ended = True

    def _log_front(self, record: TrialRecord, front: Front, now: int) -> None:
        from mlflow.entities import Metric, RunTag

        run = self._runs.get(record.result.trial_id)
        if run is None:
            return
        mark = "true" if record.on_front else "false"
        scores = held_out_scores(record) or {}
        numbers: dict[str, float] = {}
        for name, score in scores.items():
            numbers[f"heldout_{name}"] = score.value
            if name in MAIN_METRICS:  # front.csv has the other intervals
                numbers |= {f"heldout_{name}_low": score.low, f"heldout_{name}_high": score.high}
        missing = {name: v for name, v in numbers.items() if run.metrics.get(name) != v}
        run.metrics.update(missing)
        metrics = [Metric(name, value, now, 0) for name, value in missing.items()]
        if metrics or run.tags.get("vgid.on_front", "false") != mark:
            self._log(run.run_id, metrics=metrics, tags=[RunTag("vgid.on_front", mark)])

    def _log_dataset(self, run_id: str, config: StudyConfig) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=f"MLLMU-Bench layout, forget {config.forget_ratio} %",
            digest=self._hashes["dataset"][:12],  # for display; the tag has all of it
            source_type="local",
            source=json.dumps({"uri": str(config.data or config.output / "data")}),
        )
        tags = [InputTag("mlflow.data.context", "unlearning")]
        self._client.log_inputs(run_id, [DatasetInput(dataset, tags)])

    def _log_note_picture(self, front: Front) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / NOTE_PICTURE
            write_png(path, front, whole_only=True)
            self._client.log_artifact(self.study_run_id, str(path))

    def _flush(self, run: _Run) -> None:
        run.flushed = time.time()
        if self._try(lambda: self._log(run.run_id, params=run.params, metrics=run.waiting)):
            run.params, run.waiting = [], []

    def _log(
        self,
        run_id: str,
        metrics: Sequence[Any] = (),
        params: Sequence[Any] | None = None,
        tags: Sequence[Any] = (),
    ) -> None:
        first, rest = metrics[:MAX_METRICS], metrics[MAX_METRICS:]
        self._client.log_batch(run_id, first, params or (), tags, synchronous=True)
        if rest:
            self._log(run_id, rest)

    def _try(self, send: Callable[[], None]) -> bool:
        """Send; a server that does not answer costs a warning and a wait, never the study."""
        from mlflow.exceptions import MlflowException

        if time.time() < self._silent_until:
            return False
        try:
            send()
        except (MlflowException, OSError) as error:
            self._silent_until = time.time() + RETRY_SECONDS
            logger.warning("MLflow at %s does not record (%s).", self.uri, first_line(error))
            return False
        return True

    def _search(self, query: str) -> list[Any]:
        return search_runs(self._client, self.experiment_id, query)

    def _hash_tags(self) -> dict[str, str]:
        return {f"vgid.{name}_hash": value for name, value in self._hashes.items()}


def _params(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(name, as_text(value)) for name, value in values.items() if value is not None]
