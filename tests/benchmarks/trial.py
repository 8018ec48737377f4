"""Where a trial's seconds go: ``python -m tests.benchmarks.trial [--json]``.

Each round is a fresh process that runs two default trials of ``tiny-llava`` in one session, as a
resident slot of a study does, on a store that begins empty. Phases are those of ``TrialResult``
with two more: ``start-up``, from starting the interpreter until everything is imported, and
``log``, what the study's driver spends on MLflow for a trial. Opening MLflow, once a study, is
``open_tracking``. The first trial's ``load`` includes the scores of the base.

The ratio is the first trial's seconds over the second's: what a session that is there, with the
teacher stored, is worth. It has no target.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import (
    MIN_ROUNDS,
    ROOT,
    arguments,
    median_interval,
    one_thread,
    report,
)
from vgid.data.synthetic import write_benchmark

PHASES = ("start-up", "load", "teacher", "train", "evaluate", "save", "log")
Rounds = list[list[dict[str, float]]]


def run_once(root: Path, started: float, settings: dict[str, Any]) -> list[dict[str, float]]:
    """Two trials in this process, with the seconds of each phase.

    Args:
        root: folder with the benchmark in ``data``; everything else is written beside it.
        started: wall-clock time at which the process was started.
        settings: of the request and the trial, ``{"request": {...}, "trial": {...}}``.
    """
    import torch

    from vgid.config import RequestConfig, StudyConfig, TrialConfig
    from vgid.results import EpochReport
    from vgid.study.ledger import Heard, Record, now, trial_id
    from vgid.study.mlflow_client import connect
    from vgid.study.tracking import Tracker
    from vgid.trial import TrialSession

    torch.set_num_threads(1)
    start_up = time.time() - started
    output = root / "output"
    output.mkdir()
    request = RequestConfig(
        data=root / "data", store=output / "store", **settings.get("request", {})
    )
    session = TrialSession(request)
    opening = time.perf_counter()
    config = StudyConfig(output=output, data=request.data, trials=2)
    hashes = {"dataset": session.benchmark.sha256, "base": session.backbone.revision}
    tracker = Tracker(connect(None, output, request.backbone), "benchmark", config, hashes)
    opened = time.perf_counter() - opening
    trial = TrialConfig(**settings.get("trial", {}))
    found = []
    for number in range(2):
        reports: list[Heard] = []

        def keep(epoch: EpochReport, reports: list[Heard] = reports) -> bool:
            reports.append(Heard(report=epoch, at=now()))
            return True

        name, began = trial_id(number), now()
        result = session.run(trial, name, output / "adapters" / name, keep)
        logging = time.perf_counter()
        record = Record(trial_id=name, config=trial, started=began)
        for count in range(len(reports)):
            tracker.log_trial(record.model_copy(update={"epochs": tuple(reports[: count + 1])}))
        end = {"epochs": tuple(reports), "ended": now(), "result": result}
        tracker.log_trial(record.model_copy(update=end))
        log = time.perf_counter() - logging
        seconds = {**result.seconds, "log": log, "start-up": 0.0 if number else start_up}
        found.append({**seconds, "open_tracking": 0.0 if number else opened})
    return found


def _fresh(folder: Path, settings: dict[str, Any]) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "tests.benchmarks.trial", "--once", str(folder)]
    done = subprocess.run(
        [*command, str(time.time()), json.dumps(settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"a trial's process failed: {done.stderr.strip().splitlines()[-1:]}")
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(rounds: int = MIN_ROUNDS, **settings: Any) -> dict[str, Any]:
    """Seconds by phase of the first and the second trial, over fresh processes.

    Args:
        rounds: fresh processes.
        settings: see ``run_once``.
    """
    found: Rounds = []
    with tempfile.TemporaryDirectory() as shared:
        data = Path(shared) / "data"
        write_benchmark(data)
        for number in range(rounds):
            folder = Path(shared) / str(number)
            folder.mkdir()
            (folder / "data").symlink_to(data)
            found.append(_fresh(folder, settings))
    totals = [[sum(trial[phase] for phase in PHASES) for trial in trials] for trials in found]
    ratio = median_interval([first / second for first, second in totals])
    return {
        "benchmark": "trial",
        "of": "tiny-llava",
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "n": rounds,
        "target": None,
        "met": None,
        "first": _medians(found, 0),
        "second": _medians(found, 1),
        "open_tracking": median_interval([trials[0]["open_tracking"] for trials in found]).median,
    }


def _medians(found: Rounds, number: int) -> dict[str, list[float]]:
    """Median and interval of each phase, and of their sum, in seconds."""
    each = [{phase: trials[number][phase] for phase in PHASES} for trials in found]
    rows = [{**seconds, "total": sum(seconds.values())} for seconds in each]
    medians = {}
    for phase in rows[0]:
        m = median_interval([row[phase] for row in rows])
        medians[phase] = [m.median, m.low, m.high]
    return medians


def main() -> None:
    """Measure and print; this benchmark has no target."""
    parser = arguments(__doc__, on=False)
    parser.add_argument(
        "--once", nargs=3, metavar=("FOLDER", "STARTED", "SETTINGS"), help="one round, in here"
    )
    options = parser.parse_args()
    if options.once:
        folder, started, settings = options.once
        print(json.dumps(run_once(Path(folder), float(started), json.loads(settings))))
        return
    one_thread()
    report(measure(options.rounds), options.json)


if __name__ == "__main__":
    main()
