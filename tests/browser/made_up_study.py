"""A study of made-up numbers, recorded as a real one is: pages do not care who counted."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from vgid.config import StudyConfig, TrialConfig
from vgid.pareto import front_mask
from vgid.report.front import Front
from vgid.report.insights import write_figures
from vgid.report.records import TrialRecord, TrialsTable, write_front, write_study
from vgid.results import EpochReport, Score, TrialResult
from vgid.study.ledger import Heard, Record
from vgid.study.mlflow_client import connect
from vgid.study.tracking import Tracker

TRIALS = 18
FAILED = 7
BASE = {
    "forget_rougeL": Score(value=0.954, n=30, low=0.90, high=1.0),
    "retain_rougeL": Score(value=0.984, n=300, low=0.97, high=0.99),
}


@dataclass(frozen=True)
class Recorded:
    """A study on a server.

    Attributes:
        front: its trials.
        experiment: id of its experiment.
        study: run id of the study.
        study_id: the study's own id.
        pages: page of each trial's run, relative to the server.
    """

    front: Front
    experiment: str
    study: str
    study_id: str
    pages: dict[str, str]


def around(value: float, width: float, n: int) -> Score:
    return Score(value=value, n=n, low=value - width, high=value + width)


def draw_trials(folder: Path) -> list[TrialRecord]:
    """Trials whose scores depend on their settings, one of them failed, the front marked."""
    rng = random.Random(0)
    drawn: list[tuple[TrialConfig, TrialResult]] = []
    for number in range(TRIALS):
        noise = rng.choice(("random", "gaussian", "white"))
        config = TrialConfig(
            alpha=round(2 ** rng.uniform(-1, 2), 3),
            beta=round(2 ** rng.uniform(-1, 3), 3),
            noise_type=noise,
            sigma=round(rng.uniform(0.2, 1.0), 2) if noise == "gaussian" else None,
            prompt_style=rng.choice(("strict", "polite", "declarative")),
            learning_rate=10 ** rng.uniform(-3.5, -2.3),
        )
        strength = config.alpha * config.learning_rate / 2e-3
        reduction = min(0.95, max(0.05, 0.9 - 0.35 * abs(math.log(strength))))
        retain = 0.984 - 0.12 * reduction**2 * (0.5 + rng.random()) * min(3, 2 / config.beta)
        trial_id = f"{number:04d}"
        if number == FAILED:
            result = TrialResult(trial_id=trial_id, status="failed", error="the loss is infinite")
        else:
            adapter = folder / "adapters" / trial_id
            adapter.mkdir(parents=True)
            (adapter / "adapter_config.json").write_text("{}")
            metrics = {
                "forget_rougeL": 0.954 - reduction,
                "forget_rougeL_reduction": reduction,
                "retain_rougeL": retain,
                "test_rougeL": 0.93 - 0.75 * reduction,
                "forget_cloze": round(1 - 0.7 * reduction, 1),
                "forget_memorisation": 0.99 - 0.3 * reduction,
            }
            seconds = {"train": 4.0, "evaluate": 2.0}
            result = TrialResult(
                trial_id=trial_id,
                status="completed",
                metrics=metrics,
                seconds=seconds,
                adapter=adapter,
            )
        drawn.append((config, result))
    completed = [result.metrics for _, result in drawn if result.metrics]
    points = np.array([[m["forget_rougeL_reduction"], m["retain_rougeL"]] for m in completed])
    marks = iter(front_mask(points))
    records = []
    for config, result in drawn:
        on_front = bool(result.metrics) and bool(next(marks))
        held_out = None
        if on_front:
            held_out = {
                "forget_rougeL": around(result.metrics["forget_rougeL"] + 0.02, 0.015, 30),
                "retain_rougeL": around(result.metrics["retain_rougeL"] - 0.008, 0.006, 300),
                "forget_rougeL_reduction": around(
                    result.metrics["forget_rougeL_reduction"] - 0.02, 0.02, 30
                ),
                "forget_cloze": around(0.4, 0.3, 10),
            }
        records.append(TrialRecord(config, result, on_front, held_out))
    return records


def as_ended(trial: TrialRecord, reports: Sequence[EpochReport] = ()) -> Record:
    """The ledger's record of a trial that has ended just now."""
    ended = datetime.now(UTC)
    result = trial.result
    return Record(
        trial_id=result.trial_id,
        config=trial.config,
        started=(ended - timedelta(seconds=sum(result.seconds.values()))).isoformat(),
        epochs=tuple(Heard(report=report, at=ended.isoformat()) for report in reports),
        ended=ended.isoformat(),
        result=result,
    )


def record_study(server: str, folder: Path) -> Recorded:
    """Record the study on a server, as ``vgid.study.run`` does."""
    study_id = "tiny-llava-2026-11-25T090000-0"
    records = draw_trials(folder)
    hashes = {"dataset": "d" * 64, "base": "b" * 64}
    config = StudyConfig(output=folder, trials=TRIALS)
    tracker = Tracker(connect(server, folder, "tiny-llava"), study_id, config, hashes)
    for record in records:
        assert tracker.log_trial(as_ended(record))
    title = f"tiny-llava, {TRIALS} trials"
    front = Front(title, records, BASE, BASE, tracker.pages, tracker.server)
    TrialsTable(folder / "trials.csv").write(records)
    write_front(folder / "front.csv", records)
    write_study(folder / "study.json", {"seed": 0})
    phases = {"start-up": 12.0, "train": 80.0, "evaluate": 40.0}
    figures = [file.name for file in write_figures(folder, front)]
    summary = {
        "output": folder,
        "files": [*figures, "trials.csv", "front.csv", "study.json"],
        "hypervolume": 0.87,
        "wall_s": 140.0,
        "phases": {name: {"total_s": seconds} for name, seconds in phases.items()},
        "counts": {},
        "store": {},
        "trained_verbatim": {},
        "outlook": None,
        "left_out": {},
    }
    tracker.finish_study(front, summary)
    return Recorded(
        front, tracker.experiment_id, tracker.study_run_id, study_id, dict(tracker.pages)
    )
