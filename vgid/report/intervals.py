"""Means over seeds with their intervals, as the tables, the claims and the comparison use them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from vgid.results import with_interval


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds with its 95 % interval; NaN bounds where ``n`` is below 2."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n == 0:
            return "none"
        if self.n == 1:
            return f"{self.mean:.3f}"
        return with_interval(self.mean, self.low, self.high)

    @property
    def cells(self) -> list[float | None]:
        """Mean, low, high and n for a CSV file, empty where there is none."""
        bounds = [self.low, self.high] if self.n > 1 else [None, None]
        return [self.mean if self.n else None, *bounds, self.n]


def t_interval(values: Iterable[float | None], comparisons: int = 1) -> Interval:
    """Student's t interval of a mean: mean ± t(1 - 0.025 / comparisons, n - 1) · s / sqrt(n).

    A seed's None or NaN is left out. With k ``comparisons``, any of k such intervals misses its
    mean in at most 5 % of studies (Bonferroni).
    """
    found = [value for value in values if value is not None and math.isfinite(value)]
    n = len(found)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(found) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (n - 1))
    reach = _quantile(1 - 0.025 / comparisons, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach, n)


def paired_interval(one: Sequence[float | None], other: Sequence[float | None]) -> Interval:
    """The t interval of the differences within each seed that has both."""
    pairs = zip(one, other, strict=True)
    return t_interval(None if a is None or b is None else a - b for a, b in pairs)


@cache
def _quantile(probability: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(probability, freedom))


def count_seeds(seeds: int) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"
