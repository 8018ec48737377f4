"""Means over seeds with their intervals, as the tables, the claims and the comparison use them."""

import math
import statistics
from collections.abc import Iterable, Sequence

from pydantic import ConfigDict

from vgid.results import Score


class Interval(Score):
    """A mean over ``n`` seeds with its 95 % interval; NaN bounds where ``n`` is below 2."""

    model_config = ConfigDict(allow_inf_nan=True)

    def __str__(self) -> str:
        if self.n > 1:
            return super().__str__()
        return f"{self.value:.3f}" if self.n else "none"


def t_interval(values: Iterable[float | None], comparisons: int = 1) -> Interval:
    """Student's t interval of a mean: mean ± t(1 - 0.025 / comparisons, n - 1) · s / sqrt(n).

    A seed's None or NaN is left out. With k ``comparisons``, any of k such intervals misses its
    mean in at most 5 % of studies (Bonferroni).
    """
    found = [value for value in values if value is not None and math.isfinite(value)]
    n = len(found)
    mean = statistics.fmean(found) if n else math.nan
    reach = math.nan
    if n > 1:
        from scipy.special import stdtrit

        quantile = float(stdtrit(n - 1, 1 - 0.025 / comparisons))
        reach = quantile * statistics.stdev(found, mean) / math.sqrt(n)
    return Interval(value=mean, n=n, low=mean - reach, high=mean + reach)


def paired_interval(one: Sequence[float | None], other: Sequence[float | None]) -> Interval:
    """The t interval of the differences within each seed that has both."""
    pairs = zip(one, other, strict=True)
    return t_interval(None if a is None or b is None else a - b for a, b in pairs)


def count_seeds(seeds: int) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"
