"""What a study asks of a trial's scores: objectives, and bounds to keep.

A bound is written as ``retain_rougeL>=0.97*base``. Which way an objective is better follows from
whose score it is.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

OBJECTIVES = ("forget_rougeL_reduction", "retain_rougeL")
"""What a study looks for unless it is told otherwise: the two axes of the paper's figure 4."""

FORM = re.compile(r"(?P<metric>\w+)(?P<sign>[<>]=)(?P<bound>\d+\.?\d*|\.\d+)(?P<base>\*base)?")


def minimised(score: str) -> bool:
    """Whether less of a score is better: of people to forget, or where it is a loss or a rise."""
    forgotten = score.startswith(("forget_", "test_", "earlier_"))
    return score.endswith(("_drop", "_rise")) or (forgotten and not score.endswith("_reduction"))


def turned(score: str, value: float) -> float:
    """A score's value with its sign turned where less is better, so that more always is."""
    return -value if minimised(score) else value


class Requirement(NamedTuple):
    """A bound on a score, on the search questions; ``of_base``: in shares of the base's."""

    metric: str
    at_least: bool
    bound: float
    of_base: bool

    @classmethod
    def read(cls, text: str) -> Self:
        """Read ``METRIC>=NUMBER`` or ``METRIC<=NUMBER``, with ``*base`` behind it or not.

        ValueError for anything else.
        """
        found = FORM.fullmatch(text.replace(" ", ""))
        if found is None:
            raise ValueError(
                f"{text!r} is no requirement; write METRIC>=NUMBER or METRIC<=NUMBER, with *base "
                "behind it for a share of the base's score"
            )
        metric, bound = found["metric"], float(found["bound"])
        return cls(metric, found["sign"] == ">=", bound, found["base"] is not None)

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.metric}{sign}{self.bound:g}{'*base' if self.of_base else ''}"

    def missed_by(self, scores: Mapping[str, float], base: Mapping[str, float]) -> float:
        """How far a score is on the wrong side of the bound; 0 or less where it is not."""
        bound = self.bound * base[self.metric] if self.of_base else self.bound
        beyond = scores[self.metric] - bound
        return -beyond if self.at_least else beyond


def unknown(
    required: Iterable[Requirement], names: Iterable[str], base: Iterable[str]
) -> str | None:
    """Why a requirement asks for what is never scored, in a sentence; None if none does.

    ``names`` are a trial's scores, ``base`` those that the base has too.
    """
    trials, bases = set(names), set(base)
    for each in required:
        there = bases if each.of_base else trials
        if each.metric not in there:
            known = ", ".join(sorted(there))
            return f"{each}: no score is called {each.metric}; there are {known}."
    return None
