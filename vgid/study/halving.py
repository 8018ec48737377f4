"""Whether a trial goes on behind a rung: asynchronous successive halving of several objectives.

As ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", section 3.2), in
the form that stops trials in place of pausing them: whoever comes to a rung goes on if it is among
the best ``1 / eta`` of those that have come so far, itself among them. Of several objectives "best"
is by the fronts of a non-dominated sort, and within a front by spread, an epsilon-net (Schmucker et
al. 2021, "Multi-objective Asynchronous Successive Halving", section 3).

The verdict follows from the newcomer's scores and the set of the others': not from the order in
which they came, nor from anything that would have to be kept beside them.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vgid.pareto import front_mask

Point = tuple[float, ...]


def goes_on(newcomer: Point, others: Sequence[Point], eta: int) -> bool:
    """Whether a trial is among the best ``1 / eta`` at a rung, by maximised, finite scores.

    ``others`` are the scores of those that came to the rung before. Of ``n`` the best ``n / eta``,
    rounded up, go on; of equal ones the newcomer is the first.
    """
    kept = math.ceil((1 + len(others)) / eta)
    return newcomer in best_first([newcomer, *others])[:kept]


def best_first(points: Sequence[Point]) -> list[Point]:
    """Points with the best first, the same for any order in which they are given."""
    # In an order of their own first: that of arrival is to break no tie.
    left_NO = np.array(sorted(points, reverse=True), dtype=np.float64)
    low_O, width_O = left_NO.min(axis=0), np.ptp(left_NO, axis=0)
    scale_O = np.where(width_O > 0, width_O, 1.0)
    ordered: list[Point] = []
    while len(left_NO):
        on_front_N = front_mask(left_NO)
        front_NO = left_NO[on_front_N]
        spread = _spread((front_NO - low_O) / scale_O)
        ordered += [tuple(point) for point in front_NO[spread].tolist()]
        left_NO = left_NO[~on_front_N]
    return ordered


def _spread(points_NO: NDArray[np.float64]) -> list[int]:
    """An order of N points in which each is the farthest from all before it, from the first on."""
    # Farthest-first traversal (Gonzalez 1985): of two objectives the one end of a front, the other
    # end, the middle.
    order, nearest_N = [0], np.full(len(points_NO), np.inf)
    while len(order) < len(points_NO):
        nearest_N = np.minimum(nearest_N, ((points_NO - points_NO[order[-1]]) ** 2).sum(axis=1))
        nearest_N[order] = -1.0
        order.append(int(nearest_N.argmax()))
    return order
