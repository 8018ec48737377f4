"""Bounds that a trial keeps to stand on a front, such as ``retain_rougeL>=0.97*base``."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

FORM = re.compile(r"(?P<metric>\w+)(?P<sign>[<>]=)(?P<bound>\d+\.?\d*|\.\d+)(?P<base>\*base)?")


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
