"""Which trial of a front to ship: three rules, pure functions of the candidates' marks.

- ``knee``: the candidate farthest above the chord between the extremes of the front, after both
  objectives were scaled to [0, 1] over the front (Das 1999, "On characterizing the 'knee' of the
  Pareto curve based on normal-boundary intersection", for two objectives). It is where more
  forgetting begins to cost more than it brings.
- ``max-forget``: the candidate that forgets most, whatever it costs: the end of the front.
- ``constraint``: the candidate that forgets most among those within every bound (the
  epsilon-constraint method, Haimes, Lasdon and Wismer 1971); the retain drop and the reverse rise
  are bounded even if no bound is given.

Bounds that are given filter the candidates of every rule. The chord of ``knee`` stays that of all
candidates, so a bound that the choice keeps never changes the choice.

Whatever the rule, a trial that forgets too little is no candidate: of the base's forget ROUGE-L at
least a share has to be gone (half, if nothing else is asked for), and that even at the
unfavourable end of its interval. Else of two trials, one that forgets nearly all at some cost and
one that does nothing at none, the second would be shipped.

Rules and the other bounds look at means over the seeds. Those bounds at the unfavourable ends of
the intervals would refuse nearly everything where few people are forgotten (five people give cloze
0.4 an interval of 0.1 to 0.7), so these ends are told beside every choice. What is chosen as the
best of several on the very questions that it is scored on looks a little better than it is;
``vgid.deployment.pick_page`` says so, with the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgid.errors import InputError
from vgid.evaluation.suppression import MIN_FORGET, share_gone
from vgid.pareto import front_mask
from vgid.results import trial_order

Rule = Literal["knee", "max-forget", "constraint"]

RETAIN_DROP, REVERSE_RISE = 0.05, 0.03
"""Bounds of ``constraint`` where none are given."""

FORGOTTEN = "share forgotten"

SLACK = 1e-9
"""What a mark may exceed a bound by: 0.80 - 0.75 is a little more than 0.05 in floating point."""


class Measure(NamedTuple):
    """A mean over the seeds, and the end of its 95 % interval that speaks against the candidate."""

    value: float
    worst: float


@dataclass(frozen=True)
class Marks:
    """What the rules know of a candidate, all in ROUGE-L or accuracy on held-out questions.

    Attributes:
        trial_id: which.
        before: the base's forget ROUGE-L.
        reduction: the base's forget ROUGE-L minus the candidate's.
        retain: retain ROUGE-L.
        retain_drop: the base's retain ROUGE-L minus the candidate's.
        reverse_rise: forget ROUGE-L under the reverse prompt minus that without it.
        cloze: accuracy of the forget people's cloze questions; None where the data has none.
    """

    trial_id: str
    before: float
    reduction: Measure
    retain: Measure
    retain_drop: Measure
    reverse_rise: Measure
    cloze: Measure | None = None

    @property
    def gone(self) -> Measure:
        """The reduction as a share of the base's score."""
        return Measure(*(share_gone(self.before, self.before - end) for end in self.reduction))


@dataclass(frozen=True)
class Bounds:
    """What a choice may cost at most, and has to bring at least; None: not bounded.

    Attributes:
        retain_drop: loss of retain ROUGE-L.
        reverse_rise: forget ROUGE-L that the reverse prompt brings back.
        cloze: accuracy of the forget people's cloze questions.
        forget: least share of the base's forget ROUGE-L that is gone.
    """

    retain_drop: float | None = None
    reverse_rise: float | None = None
    cloze: float | None = None
    forget: float | None = MIN_FORGET

    def checks(self, marks: Marks) -> list["Check"]:
        """Every bound beside what the candidate has.

        Raises:
            InputError: cloze is bounded and the data has no such questions.
        """
        if self.cloze is not None and marks.cloze is None:
            raise InputError(
                "--max-cloze: the forget people have no cloze questions among the held-out ones; "
                "leave the option out."
            )
        rows = (
            ("retain drop", marks.retain_drop, self.retain_drop),
            ("reverse rise", marks.reverse_rise, self.reverse_rise),
            ("forget cloze", marks.cloze, self.cloze),
        )
        floor = [] if self.forget is None else [Check(FORGOTTEN, marks.gone, self.forget, True)]
        return floor + [
            Check(name, measure, bound)
            for name, measure, bound in rows
            if measure is not None and bound is not None
        ]

    def keeps(self, marks: Marks) -> bool:
        """Whether a candidate is within every bound."""
        return all(check.excess <= 0 for check in self.checks(marks))

    def __str__(self) -> str:
        named = (
            (f"{FORGOTTEN} ≥", self.forget),
            ("retain drop ≤", self.retain_drop),
            ("reverse rise ≤", self.reverse_rise),
            ("forget cloze ≤", self.cloze),
        )
        return ", ".join(f"{name} {bound:g}" for name, bound in named if bound is not None)


@dataclass(frozen=True)
class Check:
    """One bound and what a candidate has.

    Attributes:
        name: of what is bounded.
        measure: what the candidate has.
        bound: the bound.
        floor: it is a least value, for the unfavourable end of the interval; otherwise a largest
            one, for the mean.
    """

    name: str
    measure: Measure
    bound: float
    floor: bool = False

    @property
    def excess(self) -> float:
        """How far what is judged is beyond the bound; 0 or less where it keeps it."""
        over = self.bound - self.measure.worst if self.floor else self.measure.value - self.bound
        return 0.0 if 0.0 < over <= SLACK else over

    @property
    def surely(self) -> bool:
        """Whether the unfavourable end of the interval keeps the bound as well."""
        return self.excess <= 0 if self.floor else self.measure.worst <= self.bound + SLACK

    def __str__(self) -> str:
        """How a candidate breaks the bound."""
        value, worst = (f"{end:.3f}" for end in self.measure)
        if self.floor:
            return (
                f"{self.name} {value}, by its interval perhaps {worst}, where {self.bound:g} is "
                f"asked for ({self.excess:.3f} too little)"
            )
        return f"{self.name} {value} where {self.bound:g} is allowed ({self.excess:.3f} too much)"


@dataclass(frozen=True)
class Choice:
    """What a rule chose, and why not the others.

    Attributes:
        rule: which.
        bounds: those that were applied.
        chosen: the choice.
        order: all candidates: the choice, then who keeps the bounds, best first, then the others,
            the nearest first.
        why: one clause for each candidate, by trial id.
    """

    rule: Rule
    bounds: Bounds
    chosen: Marks
    order: tuple[Marks, ...]
    why: dict[str, str]

    def __str__(self) -> str:
        bounds = str(self.bounds)
        return self.rule if not bounds else f"{self.rule}, {bounds}"


def choose(candidates: Sequence[Marks], rule: Rule, bounds: Bounds) -> Choice:
    """Choose a candidate; the order in which they come does not matter.

    Equal candidates: the one that forgets more, then the one that retains more, then the lower
    trial id.

    Args:
        candidates: the front.
        rule: see the module.
        bounds: see the module; ``constraint`` fills in the two that it cannot do without.

    Raises:
        InputError: there are none, or none keeps every bound; says how far the nearest is.
    """
    if not candidates:
        raise InputError("the front holds no trial to pick; run the study with more trials.")
    if rule == "constraint":
        bounds = replace(
            bounds,
            retain_drop=RETAIN_DROP if bounds.retain_drop is None else bounds.retain_drop,
            reverse_rise=REVERSE_RISE if bounds.reverse_rise is None else bounds.reverse_rise,
        )
    listed = sorted(candidates, key=lambda marks: trial_order(marks.trial_id))
    if rule == "knee":
        heights = dict(zip(listed, chord_heights(listed).round(9).tolist(), strict=True))
    else:
        heights = dict.fromkeys(listed, 0.0)

    def rank(marks: Marks) -> tuple[float, float, float, tuple[int, str]]:
        order = trial_order(marks.trial_id)
        return -heights[marks], -marks.reduction.value, -marks.retain.value, order

    within = sorted((m for m in listed if bounds.keeps(m)), key=rank)
    outside = sorted(
        (m for m in listed if not bounds.keeps(m)), key=lambda m: (_excess(bounds, m), rank(m))
    )
    if not within:
        raise InputError(_none_keeps(bounds, outside))
    chosen = within[0]
    why = {chosen.trial_id: _praise(rule, bounds, heights[chosen])}
    for marks in within[1:]:
        why[marks.trial_id] = _second_best(rule, heights, marks, chosen)
    for marks in outside:
        why[marks.trial_id] = _broken(bounds, marks)
    return Choice(rule, bounds, chosen, (chosen, *within[1:], *outside), why)


def chord_heights(candidates: Sequence[Marks]) -> NDArray[np.float64]:
    """Signed distance of each candidate from the chord of the front, in scaled objectives.

    The chord runs between the extremes of the non-dominated candidates, which are scaled to
    (0, 1) and (1, 0). Where the front is one point, or all of one height, nothing can be scaled
    and every distance on the front is 0.

    Returns:
        float64 of shape (N,); positive on the side of better trials.
    """
    points_N2 = np.array([(m.reduction.value, m.retain.value) for m in candidates])
    front_F2 = points_N2[front_mask(points_N2)]
    low_2, high_2 = front_F2.min(axis=0), front_F2.max(axis=0)
    span_2 = high_2 - low_2
    if (span_2 <= 0).any():  # copies of one point: all others are dominated by it
        heights_N: NDArray[np.float64] = np.minimum(points_N2 - high_2, 0.0).sum(axis=1)
        return heights_N / np.sqrt(2.0)
    scaled_N2 = (points_N2 - low_2) / span_2
    return np.asarray((scaled_N2.sum(axis=1) - 1.0) / np.sqrt(2.0), dtype=np.float64)


def _excess(bounds: Bounds, marks: Marks) -> float:
    """How far a candidate is from keeping every bound: its largest excess."""
    return max((check.excess for check in bounds.checks(marks)), default=0.0)


def _none_keeps(bounds: Bounds, outside: Sequence[Marks]) -> str:
    nearest = outside[0]
    return (
        f"none of the front's {len(outside)} trials keeps every bound ({bounds}); the nearest, "
        f"trial {nearest.trial_id}, has {_broken(bounds, nearest)}, so allow more, choose "
        "another rule, or search more trials."
    )


def _broken(bounds: Bounds, marks: Marks) -> str:
    return " and ".join(str(check) for check in bounds.checks(marks) if check.excess > 0)


def _praise(rule: Rule, bounds: Bounds, height: float) -> str:
    where = " within the bounds" if str(bounds) else ""
    if rule == "knee":
        if height < 0:
            return f"chosen: nearest to the chord{where}, {-height:.3f} below it"
        if height == 0:
            return f"chosen: no trial{where} lies above the chord; of those on it, it forgets most"
        return f"chosen: the knee{where}, {height:.3f} above the chord"
    return f"chosen: forgets most{where}"


def _second_best(rule: Rule, heights: dict[Marks, float], marks: Marks, chosen: Marks) -> str:
    less = chosen.reduction.value - marks.reduction.value
    kept = marks.retain.value - chosen.retain.value
    forgets = f"forgets {abs(less):.3f} {'less' if less >= 0 else 'more'}"
    keeps = f"keeps {abs(kept):.3f} {'more' if kept >= 0 else 'less'}"
    if rule == "knee":
        side = "above" if heights[marks] >= 0 else "below"
        return f"{abs(heights[marks]):.3f} {side} the chord: {forgets}, {keeps}"
    return f"{forgets}, {keeps}"
