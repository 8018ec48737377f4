"""A study of made-up numbers, recorded as a real one is: pages do not care who counted."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vgid.config import StudyConfig, TrialConfig
from vgid.pareto import front_mask, hypervolume
from vgid.report.front import Front
from vgid.report.records import TrialRecord, TrialsTable, write_front, write_study
from vgid.report.study_page import FIGURES, write_figures
from vgid.requirement import OBJECTIVES
from vgid.results import EpochReport, Harvested, Score, TrialResult
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


def draw_trials(
    folder: Path, trials: int = TRIALS, scales: Sequence[float] = ()
) -> list[TrialRecord]:
    """Trials whose scores depend on their settings, what is harvested of each at some scales.

    One of them failed; of 30 or more some were stopped early and some miss a bound. The front is
    marked.
    """
    rng = random.Random(0)
    records: list[TrialRecord] = []
    for number in range(trials):
        noise = rng.choice(("random", "gaussian", "white"))
        config = TrialConfig(
            alpha=round(2 ** rng.uniform(-1, 2), 3),
            beta=round(2 ** rng.uniform(-1, 3), 3),
            noise_type=noise,
            sigma=round(rng.uniform(0.2, 1.0), 2) if noise == "gaussian" else None,
            prompt_style=rng.choice(("strict", "polite", "declarative")),
            learning_rate=10 ** rng.uniform(-3.5, -2.3),
        )
        trial_id, cost = f"{number:04d}", (0.5 + rng.random()) * min(3, 2 / config.beta)
        if number == FAILED:
            result = TrialResult(trial_id=trial_id, status="failed", error="the loss is infinite")
        else:
            adapter = folder / "adapters" / trial_id
            adapter.mkdir(parents=True)
            (adapter / "adapter_config.json").write_text("{}")
            stopped = trials >= 30 and number % 10 == 9
            result = TrialResult(
                trial_id=trial_id,
                status="pruned" if stopped else "completed",
                metrics=scores_of(config, cost),
                missed={"forget_cloze<=0.9": 0.05} if trials >= 30 and number % 10 == 4 else {},
                harvest=[] if stopped else [harvest_of(config, cost, scale) for scale in scales],
                seconds={"train": 4.0, "evaluate": 2.0},
                adapter=adapter,
            )
        trial = TrialRecord(config, result)
        records += [trial, *trial.harvested]
    able = [record for record in records if record.point is not None and record.feasible]
    front = {id(r) for r, on in zip(able, front_mask([r.point for r in able]), strict=True) if on}
    return [
        replace(record, on_front=True, held_out=scored_again(record.result.metrics))
        if id(record) in front
        else record
        for record in records
    ]


def scores_of(config: TrialConfig, cost: float) -> dict[str, float]:
    strength = config.alpha * config.adapter_scale * config.learning_rate / 2e-3
    reduction = min(0.95, max(0.05, 0.9 - 0.35 * abs(math.log(strength))))
    return {
        "forget_rougeL": 0.954 - reduction,
        "forget_rougeL_reduction": reduction,
        "retain_rougeL": 0.984 - 0.12 * reduction**2 * cost,
        "test_rougeL": 0.93 - 0.75 * reduction,
        "forget_cloze": round(1 - 0.7 * reduction, 1),
        "forget_memorisation": 0.99 - 0.3 * reduction,
    }


def harvest_of(config: TrialConfig, cost: float, scale: float) -> Harvested:
    scaled = config.model_copy(update={"adapter_scale": scale})
    scores = scores_of(scaled, cost * scale)
    return Harvested(scale=scale, metrics={name: scores[name] for name in OBJECTIVES})


def scored_again(metrics: Mapping[str, float]) -> dict[str, Score]:
    """Held-out scores a little below those on the search questions."""
    return {
        "forget_rougeL": around(metrics["forget_rougeL_reduction"] * -1 + 0.974, 0.015, 30),
        "retain_rougeL": around(metrics["retain_rougeL"] - 0.008, 0.006, 300),
        "forget_rougeL_reduction": around(metrics["forget_rougeL_reduction"] - 0.02, 0.02, 30),
        "forget_cloze": around(0.4, 0.3, 10),
    }


def growth_of(records: Sequence[TrialRecord], seconds: float = 10.0) -> list[tuple[float, float]]:
    """The hypervolume after each trial, had they ended one after the other."""
    points: list[tuple[float, ...]] = []
    grown: list[tuple[float, float]] = []
    for record in records:
        points += [record.point] if record.point is not None and record.feasible else []
        if not record.is_harvested:
            grown.append((seconds * (len(grown) + 1), 0.0))
        volume = hypervolume(points, (0.0, 0.492)) if points else 0.0
        grown[-1] = (grown[-1][0], volume)
    return grown


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
    told = (tracker.pages, tracker.server, growth_of(records))
    front = Front(title, records, BASE, BASE, *told)
    TrialsTable(folder / "trials.csv").write(records)
    write_front(folder / "front.csv", records)
    write_study(folder / "study.json", {"seed": 0})
    phases = {"start-up": 12.0, "train": 80.0, "evaluate": 40.0}
    write_figures(folder, front)
    summary = {
        "output": folder,
        "files": [*FIGURES, "trials.csv", "front.csv", "study.json"],
        "hypervolume": 0.87,
        "wall_s": 140.0,
        "phases": {name: {"total_s": seconds} for name, seconds in phases.items()},
        "counts": {},
        "store": {},
        "trained_verbatim": {},
        "left_out": {},
    }
    tracker.finish_study(front, summary)
    return Recorded(
        front, tracker.experiment_id, tracker.study_run_id, study_id, dict(tracker.pages)
    )
