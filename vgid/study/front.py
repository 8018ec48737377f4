"""What a study left, as far as a comparison of methods needs it: base, trials, front, pick."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vgid.config import Config, Method, TrialConfig, parse
from vgid.errors import InputError
from vgid.pareto import hypervolume
from vgid.results import OBJECTIVES, QuestionPart, Score, trial_order
from vgid.study.ledger import Record

PICK_SCORES = (
    "forget_rougeL",
    "retain_rougeL",
    "test_rougeL",
    "forget_cloze",
    "celebrity_rougeL",
)


class BaseScores(Config):
    """The base model's scores by part, as ``study.json`` holds them."""

    search: dict[str, Score]
    held_out: dict[str, Score]


@dataclass(frozen=True)
class Trial:
    """One completed trial.

    Attributes:
        config: what was run.
        point: the two objectives on the search questions.
        held_out: scores on the held-out questions, for the front only.
    """

    config: TrialConfig
    point: tuple[float, float]
    held_out: Mapping[str, float] | None = None


@dataclass(frozen=True)
class StudyFront:
    """What one study found.

    Attributes:
        method: which.
        seed: of the study.
        base: the base model's scores.
        trials: those that completed.
    """

    method: Method
    seed: int
    base: BaseScores
    trials: tuple[Trial, ...]

    def reference(self, part: QuestionPart) -> tuple[float, float]:
        """Nothing forgotten, half the base's retain score; the same for all methods of a seed."""
        return 0.0, 0.5 * getattr(self.base, part)["retain_rougeL"].value

    @cached_property
    def front(self) -> list[Trial]:
        """The trials that were scored again: the front on the search questions."""
        return [trial for trial in self.trials if trial.held_out is not None]

    def held_out_point(self, trial: Trial) -> tuple[float, float]:
        """The two objectives of a front trial on the held-out questions."""
        assert trial.held_out is not None
        start = self.base.held_out["forget_rougeL"].value
        return start - trial.held_out["forget_rougeL"], trial.held_out["retain_rougeL"]

    def hypervolume(self, part: QuestionPart) -> float:
        """Of all trials on the search questions, or of the front's held-out points."""
        if part == "search":
            points = [trial.point for trial in self.trials]
        else:
            points = self.held_out_points
        return hypervolume(points, self.reference(part)) if points else 0.0

    @property
    def held_out_points(self) -> list[tuple[float, float]]:
        """The front's held-out points."""
        return [self.held_out_point(trial) for trial in self.front]

    def pick(self, retain_drop: float) -> Trial | None:
        """The trial that forgets most at a bounded retain drop, both on the search questions."""
        least = self.base.search["retain_rougeL"].value - retain_drop
        allowed = [trial for trial in self.front if trial.point[1] >= least]
        return max(allowed, key=lambda trial: trial.point) if allowed else None


def read_study(folder: Path, method: Method, seed: int) -> StudyFront:
    """Read what a study left: ``study.json``, ``front.csv`` and the record of its trials.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        base = json.loads((folder / "study.json").read_text(encoding="utf-8"))["base"]
        with (folder / "front.csv").open(newline="", encoding="utf-8") as file:
            front = {row["trial_id"]: row for row in csv.DictReader(file)}
        records = [
            parse(Record, json.loads(path.read_text(encoding="utf-8")), str(path))
            for path in sorted(
                (folder / "trials").glob("[0-9]*.json"), key=lambda path: trial_order(path.stem)
            )
        ]
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise InputError(
            f"{folder}: the study cannot be read ({reason}); delete the folder to run it again."
        ) from None
    scores = parse(BaseScores, base, f"{folder / 'study.json'}: base")
    trials = []
    for record in records:
        result = record.result
        if result is None or result.status != "completed":
            continue
        point = (result.metrics[OBJECTIVES[0]], result.metrics[OBJECTIVES[1]])
        held_out = _held_out(front.get(record.trial_id, {}))
        trials.append(Trial(record.config, point, held_out))
    return StudyFront(method, seed, scores, tuple(trials))


def _held_out(row: Mapping[str, str]) -> dict[str, float] | None:
    scores = {name: row.get(f"heldout_{name}") for name in PICK_SCORES}
    found = {name: float(value) for name, value in scores.items() if value}
    return found if {"forget_rougeL", "retain_rougeL"} <= found.keys() else None
