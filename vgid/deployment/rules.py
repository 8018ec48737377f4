"""Which trial of a front to ship: three rules, pure functions of the candidates' marks.

- ``knee``: the candidate farthest above the chord between the extremes of the front, after both
  objectives were scaled to [0, 1] over the front (Das 1999, "On characterizing the 'knee' of the
  Pareto curve based on normal-boundary intersection", for two objectives): where more forgetting
  begins to cost more than it brings.
- ``max-forget``: the candidate that forgets most, whatever it costs: the end of the front.
- ``constraint``: the candidate that forgets most among those within every bound (the
  epsilon-constraint method, Haimes, Lasdon and Wismer 1971); the retain drop and the reverse rise
  are bounded even if no bound is given.

Bounds that are given filter the candidates of every rule. The chord of ``knee`` stays that of all
candidates, so a bound that the choice keeps never changes the choice.

Whatever the rule, a trial that forgets too little is no candidate: else of one that forgets nearly
all at some cost and one that does nothing at none, the second would be shipped. This floor is for
the unfavourable end of the interval. The other bounds look at means over the seeds, since their
ends would refuse nearly everything where few people are forgotten (five people give cloze 0.4 an
interval of 0.1 to 0.7); ``vgid.deployment.pick_page`` tells them beside every choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vgid.config import Flag
from vgid.errors import InputError
from vgid.evaluation.suppression import MIN_FORGET, share_gone
from vgid.pareto import front_mask
from vgid.results import trial_order

Rule = Literal["knee", "max-forget", "constraint"]

RETAIN_DROP, REVERSE_RISE = 0.05, 0.03
"""Bounds of ``constraint`` where none are given."""

ShareForgotten = Annotated[
    float | None,
    Flag("S"),
    Field(
        ge=0,
        le=1,
        description="least share of the base's forget ROUGE-L that is gone, at the unfavourable "
        "end of its interval; what forgets less is refused",
    ),
]

_BOUNDED = {
    "forget": ("gone", "share forgotten"),
    "retain_drop": ("retain_drop", "retain drop"),
    "reverse_rise": ("reverse_rise", "reverse rise"),
    "cloze": ("cloze", "forget cloze"),
}
"""Fields of ``Bounds``: which of a candidate's ``Marks`` each bounds, and what it is called."""

SLACK = 1e-9
"""What a mark may exceed a bound by: 0.80 - 0.75 is a little more than 0.05 in floating point."""


class Measure(NamedTuple):
    """A mean over the seeds, and the end of its 95 % interval that speaks against the candidate."""

    value: float
    worst: float


@dataclass(frozen=True)
class Marks:
    """What the rules know of a candidate, all in ROUGE-L or accuracy on held-out questions.

    ``before`` is the base's forget ROUGE-L; reduction and drop are the base's score minus the
    candidate's, the rise is forget ROUGE-L under the reverse prompt minus that without it; cloze is
    the forget people's, None where the data has none.
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

    ``forget`` is the least share of the base's forget ROUGE-L that is gone.
    """

    retain_drop: float | None = None
    reverse_rise: float | None = None
    cloze: float | None = None
    forget: float | None = MIN_FORGET

    def checks(self, marks: Marks) -> list["Check"]:
        """Every bound beside what is had; InputError where it is cloze and the data has none."""
        if self.cloze is not None and marks.cloze is None:
            raise InputError(
                "--max-cloze: the forget people have no cloze questions among the held-out ones; "
                "leave the option out."
            )
        return [
            Check(name, getattr(marks, mark), bound, least=field == "forget")
            for field, (mark, name) in _BOUNDED.items()
            if (bound := getattr(self, field)) is not None
        ]

    def broken(self, marks: Marks) -> str:
        """How a candidate breaks the bounds; empty where it keeps them all."""
        return " and ".join(str(check) for check in self.checks(marks) if check.excess > 0)

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {'≥' if field == 'forget' else '≤'} {bound:g}"
            for field, (_, name) in _BOUNDED.items()
            if (bound := getattr(self, field)) is not None
        )


@dataclass(frozen=True)
class Check:
    """One bound and what a candidate has; ``least``: a floor, for the interval's end, not the mean.

    As text it is how a candidate breaks the bound.
    """

    name: str
    measure: Measure
    bound: float
    least: bool

    @property
    def excess(self) -> float:
        """How far what is judged is beyond the bound; 0 or less where it keeps it."""
        value, worst = self.measure
        over = self.bound - worst if self.least else value - self.bound
        return 0.0 if 0.0 < over <= SLACK else over

    @property
    def surely(self) -> bool:
        """Whether the unfavourable end of the interval keeps the bound as well."""
        return self.excess <= 0 if self.least else self.measure.worst <= self.bound + SLACK

    def __str__(self) -> str:
        value, worst = (f"{end:.3f}" for end in self.measure)
        if self.least:
            return (
                f"{self.name} {value}, by its interval perhaps {worst}, where {self.bound:g} is "
                f"asked for ({self.excess:.3f} too little)"
            )
        return f"{self.name} {value} where {self.bound:g} is allowed ({self.excess:.3f} too much)"


@dataclass(frozen=True)
class Choice:
    """What a rule chose, and why not the others, one clause for each by trial id.

    ``order`` is the choice, then who keeps the bounds, best first, then the others, nearest first.
    """

    rule: Rule
    bounds: Bounds
    chosen: Marks
    order: tuple[Marks, ...]
    why: dict[str, str]

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.rule, str(self.bounds))))


def choose(candidates: Sequence[Marks], rule: Rule, bounds: Bounds) -> Choice:
    """Choose a candidate of a front by a rule and bounds, see the module.

    The order of the candidates does not matter; of equal ones it is that which forgets more, then
    that which retains more, then the lower trial id. InputError where there are none, or none keeps
    every bound.
    """
    if not candidates:
        raise InputError("the front holds no trial to pick; run the study with more trials.")
    if rule == "constraint":
        bounds = replace(
            bounds,
            retain_drop=RETAIN_DROP if bounds.retain_drop is None else bounds.retain_drop,
            reverse_rise=REVERSE_RISE if bounds.reverse_rise is None else bounds.reverse_rise,
        )
    heights = dict.fromkeys((marks.trial_id for marks in candidates), 0.0)
    if rule == "knee":
        # Rounded, for candidates on one line parallel to the chord to be equals.
        heights = dict(zip(heights, chord_heights(candidates).round(9).tolist(), strict=True))
    excess = {
        marks.trial_id: max((check.excess for check in bounds.checks(marks)), default=0.0)
        for marks in candidates
    }

    # Who keeps every bound has no excess; of the others the nearest comes first.
    def rank(marks: Marks) -> tuple[float, float, float, float, tuple[int, str, str]]:
        name = marks.trial_id
        values = (-heights[name], -marks.reduction.value, -marks.retain.value)
        return max(0.0, excess[name]), *values, trial_order(name)

    order = tuple(sorted(candidates, key=rank))
    chosen = order[0]
    if excess[chosen.trial_id] > 0:
        raise InputError(
            f"none of the front's {len(order)} trials keeps every bound ({bounds}); the nearest, "
            f"trial {chosen.trial_id}, has {bounds.broken(chosen)}, so allow more, choose another "
            "rule, or search more trials."
        )
    why = {chosen.trial_id: _praise(rule, bounds, heights[chosen.trial_id])}
    for marks in order[1:]:
        beside = _beside(marks, chosen)
        if rule == "knee":
            height = heights[marks.trial_id]
            side = "above" if height >= 0 else "below"
            beside = f"{abs(height):.3f} {side} the chord: {beside}"
        why[marks.trial_id] = bounds.broken(marks) or beside
    return Choice(rule, bounds, chosen, order, why)


def chord_heights(candidates: Sequence[Marks]) -> NDArray[np.float64]:
    """Signed distance of each candidate from the chord of the front, in scaled objectives.

    The chord runs between the extremes of the non-dominated candidates, which are scaled to
    (0, 1) and (1, 0). Where the front is one point, or all of one height, nothing can be scaled
    and every distance on the front is 0. float64 of shape (N,), positive for better trials.
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


def _praise(rule: Rule, bounds: Bounds, height: float) -> str:
    where = " within the bounds" if str(bounds) else ""
    if rule != "knee":
        return f"chosen: forgets most{where}"
    if height > 0:
        return f"chosen: the knee{where}, {height:.3f} above the chord"
    return (
        f"chosen: no trial{where} lies above the chord; of the nearest, {abs(height):.3f} below, "
        "it forgets most"
    )


def _beside(marks: Marks, chosen: Marks) -> str:
    less = chosen.reduction.value - marks.reduction.value
    kept = marks.retain.value - chosen.retain.value
    return (
        f"forgets {abs(less):.3f} {'less' if less >= 0 else 'more'}, "
        f"keeps {abs(kept):.3f} {'more' if kept >= 0 else 'less'}"
    )
