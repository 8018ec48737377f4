"""What a trial reports, as plain data that travels as JSON between processes and into files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from vgid.config import Config

TrialStatus = Literal["completed", "pruned", "failed", "lost"]
"""``pruned``: stopped early on request. ``failed``: by the trial's own fault. ``lost``: by the
environment's (``vgid.cluster.losses``); in a study's tables only, as a lost trial has not ended."""

QuestionPart = Literal["search", "held_out", "all"]
"""Trials are chosen on ``search`` questions and reported on ``held_out`` ones; together ``all``."""

LeftOut = dict[str, dict[str, int]]
"""``questions`` and ``people`` that were left out as defective, by config of the benchmark."""

Verbatim = dict[QuestionPart, dict[str, dict[str, int]]]
"""Generation questions by part and split (``_text`` behind it where they have no image): how many
are ``scored``, and how many of these training has ``seen`` word for word."""


CANDIDATE = r"\d{4,10}(x\d+(\.\d+)?)?"
"""A trial's id, or that of a harvested candidate: ``0007x0.85`` is trial 0007 at scale 0.85."""


def candidate_id(trial_id: str, scale: float) -> str:
    """The id of a trial at another scale of its adapter, see ``CANDIDATE``."""
    return f"{trial_id}x{scale:g}"


def origin(candidate: str) -> tuple[str, float]:
    """The trial that a candidate's id names, and the scale: 1 for the trial itself."""
    trial_id, _, scale = candidate.partition("x")
    return trial_id, float(scale or 1)


def trial_order(trial_id: str) -> tuple[int, str, str]:
    """A key that sorts ids as the numbers they are: ``10000`` comes after ``9999``."""
    # By length first: ids are padded to four digits, which 10,000 trials outgrow.
    number, _, scale = trial_id.partition("x")
    return len(number), number, scale


class Score(Config):
    """A mean over ``n`` questions with its bootstrap 95 % interval ``[low, high]``."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def shots_left_out(scores: Mapping[str, Score]) -> str | None:
    """A sentence where the context did not hold all few-shot turns; None where it did."""
    shown: dict[str, float] = {}
    for name, score in scores.items():
        found = re.search(r"(cloze|classification)_shots(_text)?$", name)
        if found is not None and score.value < 1:
            shown[found[0]] = min(score.value, shown.get(found[0], 1.0))
    if not shown:
        return None
    shares = ", ".join(f"{name} {share:.2f}" for name, share in sorted(shown.items()))
    return f"The context does not hold all few-shot turns; shown was at least a share of: {shares}."


PersonSums = tuple[tuple[float, int], ...]
"""A score's values by person: their sum and number, in the order of the people's IDs. All that a
bootstrap over people needs, and nothing of who they are."""


class KeptScores(Config):
    """What a store keeps of an evaluation: scores by name, and the same by person.

    The same questions asked of two models give ``people`` that pair.
    """

    scores: dict[str, Score]
    people: dict[str, PersonSums]


class EpochReport(Config):
    """Where a trial stands after an epoch (1-based) of ``epochs``, at optimizer step ``step``."""

    epoch: int
    epochs: int
    step: int
    metrics: dict[str, float]


def rungs(eta: int, epochs: int) -> list[int]:
    """The epochs behind which a study compares its trials, to stop all but the best ``1 / eta``.

    1, eta, eta squared and so on before the last; none for 1.
    """
    # So each rung costs the same: 1 / eta of the trials train eta times as long (Li et al. 2020).
    powers = [eta**k for k in range(epochs.bit_length())] if eta > 1 else []
    return [epoch for epoch in powers if epoch < epochs]


class Harvested(Config):
    """A candidate of a trial beside itself: its adapter at another scale, unrounded and untrained.

    Scored on the search questions that the objectives and the study's bounds ask for.
    """

    scale: float
    scores: dict[str, Score] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    missed: dict[str, float] = Field(default_factory=dict)


class TrialResult(Config):
    """The outcome of one trial."""

    trial_id: str
    status: TrialStatus
    scores: dict[str, Score] = Field(default_factory=dict)  # all, if completed and evaluated
    # The same as plain numbers, with ``forget_rougeL_reduction`` and training losses.
    metrics: dict[str, float] = Field(default_factory=dict)
    # By how much each bound of ``--require`` is missed; 0 or less where it is kept.
    missed: dict[str, float] = Field(default_factory=dict)
    harvest: tuple[Harvested, ...] = ()
    # Wall time by phase: load, teacher, train, evaluate, save. Rungs are of training.
    seconds: dict[str, float] = Field(default_factory=dict)
    # What was spared and what was computed: ``teacher_hits`` and ``teacher_misses`` by training
    # sample, ``vision_hits`` and ``vision_misses`` by use of an image's features.
    store: dict[str, int] = Field(default_factory=dict)
    few_shot: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # ids of people by task
    option_scoring: Literal["letter", "likelihood"] | None = None
    adapter: Path | None = None  # PEFT folder, if completed
    error: str | None = None  # one sentence, if failed or lost


def describe_left_out(left_out: LeftOut) -> str:
    """What was left out as defective, in words: "2 questions and 0 people of forget_5"."""
    return ", ".join(
        f"{count['questions']} questions and {count['people']} people of {config}"
        for config, count in left_out.items()
    )
