"""Studies of seconds, to break: all is real, but the sessions in the workers have no model.

Driver, Ray, mailbox, slots, Ray Train and Tune, Optuna and MLflow run as they always do, so that a
fault costs what Ray needs and not what torch does. ``LightStudy`` is a driver in a process of its
own, with the means to find and kill each kind of process that it has; ``assert_consistent`` is
what must hold after every fault. As a program it takes the flags of a study:

    python -m tests.end_to_end.light --output DIR --trials 8 --resume
"""

import contextlib
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import load_file, save_file

from vgid.config import RequestConfig, TrialConfig
from vgid.requirement import OBJECTIVES
from vgid.results import EpochReport, QuestionPart, Score, TrialResult, rungs

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 300
SESSION = "LIGHT_SESSION"
"""Environment variable of the driver: the session as ``module:Class``, ``LightSession`` if unset.
An instance is made in each worker; what it is to do otherwise, it reads from ``os.environ``."""

BASE = {"forget_rougeL": 0.9, "retain_rougeL": 0.95, "test_rougeL": 0.85}
KINDS = {
    "worker": "ray::RayTrainWorker",
    "slot host": "ray::_SlotHost",
    "mailbox": "ray::Mailbox",
    "trainable": "ray::ResourceTrainable",  # while it waits for its trial
    "raylet": "raylet",
    "gcs": "gcs_server",
}
"""Kinds of process of a study beside its driver, by how their titles begin."""


class LightSession:
    """Scores that follow from the trial's parameters, and epochs that only take time.

    Its trials resume from their checkpoint, write an adapter that can be scored again, and with
    several workers meet at the end of each epoch, as real ones do.
    """

    epoch_s = 0.1

    def __init__(self, request: RequestConfig, rank: int, world_size: int) -> None:
        self.request = request
        self.rank = rank
        self.world_size = world_size

    def epoch(self, trial_id: str, number: int) -> None:
        """One epoch; where a test's session misbehaves."""
        time.sleep(float(os.environ.get("LIGHT_EPOCH_S", self.epoch_s)))

    def run(
        self,
        trial: TrialConfig,
        trial_id: str,
        adapter_dir: Path,
        on_epoch: Callable[[EpochReport], bool] | None = None,
        checkpoint_dir: Path | None = None,
    ) -> TrialResult:
        """Go through the epochs from where the checkpoint stands, and report all."""
        assert on_epoch is not None
        assert checkpoint_dir is not None
        done = checkpoint_dir / "epoch"
        first = int(done.read_text()) if done.exists() else 0
        for number in range(1, trial.epochs + 1):
            if number > first:
                self.epoch(trial_id, number)
                if self.rank == 0:
                    _write(done, str(number).encode())
            metrics = {"loss": 1.0 / number}
            if number in rungs(self.request.halving, trial.epochs):
                metrics |= {name: _scores(trial)[name].value for name in OBJECTIVES}
            report = EpochReport(epoch=number, epochs=trial.epochs, step=number, metrics=metrics)
            goes_on = self.rank != 0 or on_epoch(report)
            if self.world_size > 1:
                from ray.train.collective import broadcast_from_rank_zero

                goes_on = broadcast_from_rank_zero(goes_on)
            if not goes_on:
                return TrialResult(trial_id=trial_id, status="pruned")
        scores = _scores(trial)
        if self.rank == 0:
            _save(adapter_dir, scores)
        return TrialResult(
            trial_id=trial_id,
            status="completed",
            scores=scores,
            metrics={name: score.value for name, score in scores.items()},
            seconds={"train": 0.1, "evaluate": 0.01},
            adapter=adapter_dir,
        )

    def base_scores(self, part: QuestionPart, seed: int) -> dict[str, Score]:
        """The base's scores."""
        return {name: _score(value) for name, value in BASE.items()}

    def rescore(self, adapter_dir: Path, part: QuestionPart, seed: int) -> dict[str, Score]:
        """The scores that the adapter holds, after ``LIGHT_RESCORE_S`` seconds."""
        time.sleep(float(os.environ.get("LIGHT_RESCORE_S", "0")))
        (values,) = load_file(adapter_dir / "adapter_model.safetensors").values()
        names = json.loads((adapter_dir / "adapter_config.json").read_text())["names"]
        return {name: _score(float(value)) for name, value in zip(names, values, strict=True)}


def _score(value: float) -> Score:
    return Score(value=value, n=10, low=value, high=value)


def _scores(trial: TrialConfig) -> dict[str, Score]:
    digest = hashlib.sha256(trial.model_dump_json().encode()).digest()
    values = {name: BASE[name] * digest[i] / 255 for i, name in enumerate(BASE)}
    values["forget_rougeL_reduction"] = BASE["forget_rougeL"] - values["forget_rougeL"]
    values["retain_rougeL_drop"] = BASE["retain_rougeL"] - values["retain_rougeL"]
    return {name: _score(value) for name, value in values.items()}


def _save(folder: Path, scores: dict[str, Score]) -> None:
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"names": list(scores)}))
    values = np.array([score.value for score in scores.values()])
    save_file({"scores": values}, folder / "adapter_model.safetensors")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_bytes(content)
    half.replace(path)


def space(folder: Path, epochs: int = 3) -> Path:
    """A search space whose proposals cost nothing to train."""
    path = folder / "space.yaml"
    path.write_text(
        "backbone: tiny-llava\n"
        "methods:\n"
        "  vgid:\n"
        "    parameters:\n"
        "      alpha: {low: 0.5, high: 2.0, log: true}\n"
        f"      epochs: {epochs}\n"
        "    first_points:\n"
        "      - {alpha: 1.0}\n"
    )
    return path


class LightStudy:
    """A study whose driver is a child of this process; use as a context manager.

    Args:
        folder: where search space and output folder (``output``) go.
        trials: number of trials.
        *flags: further flags of a study.
        epochs: of each trial.
        **environment: for the driver and all that it starts, such as ``LIGHT_EPOCH_S``.
    """

    def __init__(
        self,
        folder: Path,
        trials: int,
        *flags: str,
        epochs: int = 3,
        **environment: str,
    ) -> None:
        self.output = folder / "study"
        self._trials = trials
        self._flags = [
            *("--search-space", str(space(folder, epochs)), "--output", str(self.output)),
            *("--trials", str(trials), "--sampler", "random", *flags),
        ]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = clean | {"PYTHONPATH": str(ROOT)} | environment
        self._shown = folder / "shown.txt"
        self._driver: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "LightStudy":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._driver is not None and self._driver.poll() is None:
            for process in self._family():
                _kill(process)
            self._driver.wait()

    def start(self, *more: str) -> None:
        """Start the driver, for a resume with ``--resume``."""
        with self._shown.open("ab") as shown:
            self._driver = subprocess.Popen(
                [sys.executable, "-m", "tests.end_to_end.light", *self._flags, *more],
                cwd=ROOT,
                env=self._environment,
                stdout=shown,
                stderr=shown,
            )

    def finish(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the driver; its exit code."""
        assert self._driver is not None
        try:
            return self._driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the study hangs:\n{self.shown()}\n{self.log()}") from None

    @property
    def pid(self) -> int:
        """Of the driver."""
        assert self._driver is not None
        return self._driver.pid

    def over(self) -> bool:
        """Whether the driver has ended."""
        return self._driver is None or self._driver.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Send the driver a signal."""
        assert self._driver is not None
        self._driver.send_signal(number)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
        """Wait until something holds while the driver lives; its value."""
        assert self._driver is not None
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self._driver.poll() is None, f"the study has ended:\n{self.shown()}"
            assert time.monotonic() < deadline, f"the study hangs:\n{self.shown()}\n{self.log()}"
            time.sleep(0.1)
        return value

    def ended(self) -> list[str]:
        """Ids of the trials that have ended."""
        return [name for name, record in self._records().items() if record["result"] is not None]

    def record(self, name: str) -> bytes:
        """A trial's record as it stands on the disk."""
        return (self.output / "trials" / f"{name}.json").read_bytes()

    def in_flight(self) -> list[str]:
        """Ids of the trials that were started and have not ended."""
        return [name for name, record in self._records().items() if record["result"] is None]

    def shown(self) -> str:
        """What the study has told its user, over all starts."""
        return self._shown.read_text(errors="replace")

    def log(self) -> str:
        """The end of its log."""
        path = self.output / "study.log"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def processes(self, kind: str) -> list[psutil.Process]:
        """The processes of a kind, ``driver`` or one of ``KINDS``, oldest first."""
        if kind == "driver":
            return self._family()[:1]
        found = [process for process in self._family() if _title(process).startswith(KINDS[kind])]
        return sorted(found, key=lambda process: process.create_time())

    def kill(self, kind: str, number: int = 0) -> int:
        """SIGKILL the ``number``-th process of a kind, once there is one; its pid."""
        found = self.wait_for(lambda: self.processes(kind)[number:])
        _kill(found[0])
        return int(found[0].pid)

    def assert_consistent(self, store: str | None = None) -> None:
        """What must hold when a study is complete, whatever happened to it."""
        assert_consistent(self.output, self._trials, store)

    def _records(self) -> dict[str, Any]:
        paths = sorted(self.output.glob("trials/[0-9]*.json"))
        return {path.stem: json.loads(path.read_text()) for path in paths}

    def _family(self) -> list[psutil.Process]:
        assert self._driver is not None
        try:
            driver = psutil.Process(self._driver.pid)
            return [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _title(process: psutil.Process) -> str:
    """How Ray titles a worker; of its own programs, the file's name."""
    try:
        first = (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""
    return first if first.startswith("ray::") else Path(first).name


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def assert_consistent(output: Path, trials: int, store: str | None = None) -> None:
    """Each trial has ended, and is known once, with one result, to whoever keeps trials.

    Args:
        output: the study's folder.
        trials: that it was asked for.
        store: MLflow's, if not the one in the folder.
    """
    import optuna
    import pandas as pd
    from mlflow import MlflowClient

    from vgid.study.mlflow_client import search_runs
    from vgid.study.search import open_journal

    names = [f"{number:04d}" for number in range(trials)]
    table = pd.read_csv(output / "trials.csv", dtype={"trial_id": str}).set_index("trial_id")
    assert list(table.index) == names
    summary = json.loads((output / "study.json").read_text())
    counted = {status: n for status, n in summary["counts"].items() if n}
    assert counted == Counter(table.status)
    assert not summary["interrupted"]
    assert set(summary["front"]) == set(table[table.on_front].index)

    states = {"completed": "COMPLETE", "pruned": "PRUNED"}
    kept = optuna.load_study(study_name=None, storage=open_journal(output)).trials
    assert [(f"{trial.number:04d}", trial.state.name) for trial in kept] == [
        (name, states.get(status, "FAIL")) for name, status in table.status.items()
    ]
    client = MlflowClient(store or f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny-llava"]
    runs = search_runs(client, experiment.experiment_id, "")
    assert not [run.info.run_id for run in runs if run.info.status == "RUNNING"]
    for run in runs:
        if run.data.tags.get("vgid.status") == "completed":
            epochs = range(1, int(run.data.params["epochs"]) + 1)
            losses = client.get_metric_history(run.info.run_id, "loss")
            assert [(m.step, m.value) for m in losses] == [(n, 1.0 / n) for n in epochs]
    told = [run.data.tags.get("vgid.trial_id", "") for run in runs]
    assert sorted(told) == ["", *names]  # the study's own run has no trial
    for name in table[table.status == "completed"].index:
        adapter = output / "adapters" / name
        assert load_file(adapter / "adapter_model.safetensors")["scores"].size
        assert table.loc[name, "retain_rougeL"] == _of(adapter, "retain_rougeL")


def _of(adapter: Path, name: str) -> float:
    names = json.loads((adapter / "adapter_config.json").read_text())["names"]
    values = load_file(adapter / "adapter_model.safetensors")["scores"]
    return float(values[names.index(name)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study with light sessions; the exit code of a study."""
    from ray import cloudpickle

    from studies.pareto_search import read_flags
    from vgid.cluster import slots
    from vgid.command_line import exit_code
    from vgid.study.run import run_study

    config, mode = read_flags(arguments)
    slots.IDLE_S = float(os.environ.get("LIGHT_IDLE_S", slots.IDLE_S))
    module, name = os.environ.get(SESSION, f"{__name__}:LightSession").split(":")
    loaded = sys.modules[module] if module == __name__ else importlib.import_module(module)
    if module != __name__:
        cloudpickle.register_pickle_by_value(loaded)
    session = getattr(loaded, name)
    return exit_code(
        lambda: run_study(config, mode.resume, session, retry_failed=mode.retry_failed),
        "The study was interrupted; go on with --resume.",
    )


if __name__ == "__main__":
    sys.exit(main())
