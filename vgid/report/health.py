"""Health checks of a study, as sentences: what of its result or its search space to look into.

A check is a pure function of numbers that the study has anyway, and returns a sentence for each
thing that it found.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vgid.evaluation.suppression import doubt
from vgid.report.front import Front, label
from vgid.report.insights import MIN_EXPLAINED, MIN_TRIALS, Shares, explained
from vgid.report.records import TrialRecord
from vgid.results import Score

KNOWN = 0.5
"""Forget ROUGE-L of a base below which there is little to forget."""

NEAR = 0.02
"""Share of a range beside either end that counts as the end."""

CROWD = 0.25
"""Share of proposals at an end, beyond what even ones would put there, that is a crowd."""

IDLE = 0.05
"""Share of each objective's variance below which a hyperparameter has no effect that is seen."""


def health(front: Front, shares: Shares) -> list[str]:
    """What the checks found, but of the base (``base_knew``); ``shares`` are ``importances``."""
    fit = explained(front.trials)
    return [
        *small_front([record.result.trial_id for record in front.front]),
        *at_an_end(front.trials, front.space),
        *unexplained(fit),
        *without_effect(shares, fit),
    ]


def warnings(front: Front) -> list[str]:
    """What stands above the result: what the study lacks, and whether its base knew anything."""
    return [*front.warnings, *base_knew(front.base)]


def base_knew(base: Mapping[str, Score]) -> list[str]:
    """Whether there was something to forget, by the base's scores on the search questions."""
    unsure, known = doubt(base), base.get("forget_rougeL")
    if unsure is not None:
        return [unsure]
    if known is not None and known.value < KNOWN:
        return [
            f"The base gives {known.value:.3f} of what it should know of the forget people "
            "(ROUGE-L), so there is little to forget; fine-tune it on them first (vgid finetune)."
        ]
    return []


def small_front(front: Sequence[str]) -> list[str]:
    """Whether there is something to choose from, by the ids on the front."""
    if len(front) > 2:
        return []
    which = f" ({' and '.join(front)})" if front else ""
    return [
        f"A front of {len(front)}{which} leaves next to nothing to choose from: run more trials "
        "(--resume with more --trials), or widen the search space."
    ]


def at_an_end(trials: Sequence[TrialRecord], space: Mapping[str, Any]) -> list[str]:
    """Whether proposals crowd at an end of a range, beyond which better ones may lie.

    ``space`` are the parameters of a search space, ranges as ``low`` and ``high``, with ``log`` or
    ``step``. Looked at are parameters that ``MIN_TRIALS`` trials have.
    """
    found = []
    for name, given in space.items():
        having = [trial for trial in trials if trial.config.used.get(name) is not None]
        if not isinstance(given, Mapping) or "low" not in given or len(having) < MIN_TRIALS:
            continue
        scale = math.log if given.get("log") else float
        low, high = scale(given["low"]), scale(given["high"])
        if low == high:
            continue
        steps = (high - low) / given["step"] if "step" in given else 0
        even = 1 / (steps + 1) if steps else NEAR
        for side, end in (("lower", low), ("upper", high)):
            reach = NEAR * (high - low)
            near = [t for t in having if abs(scale(t.config.used[name]) - end) <= reach]
            if len(near) >= (CROWD + even) * len(having):
                best = sum(trial.on_front for trial in near)
                found.append(
                    f"{name}: {len(near)} of {len(having)} trials lie at the {side} end of its "
                    f"range, {given['low' if side == 'lower' else 'high']:g}, {best} of them on "
                    "the front; better ones may lie beyond, so widen the range."
                )
    return found


def unexplained(fit: Mapping[str, float]) -> list[str]:
    """Whether an objective differs for no reason that the parameters give; R² by ``explained``."""
    return [
        f"What was searched does not foretell the {label(objective)} (R² {score:.2f} for trials "
        "left out): noise decides it, or something that is not searched."
        for objective, score in fit.items()
        if score <= 0
    ]


def without_effect(shares: Shares, fit: Mapping[str, float]) -> list[str]:
    """Whether a hyperparameter explains nothing of any objective, where the others do explain."""
    if not fit or min(fit.values()) <= 0:
        return []
    most: dict[str, float] = {}
    for by_name in shares.values():
        most |= {name: max(share, most.get(name, 0.0)) for name, share in by_name.items()}
    return [
        f"{name} explains {share:.1%} of an objective at most: fix it, and the trials search the "
        "rest."
        for name, share in most.items()
        if share < IDLE
    ]


CHECKED = (
    "a front of two or fewer, proposals at an end of their range, an objective that the parameters "
    f"do not explain, a parameter without effect (both from {MIN_EXPLAINED} trials on), a base "
    "that never knew the answers"
)
"""What is looked for."""
