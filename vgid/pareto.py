"""Pareto front and hypervolume for maximised objectives: a typed face over ``moocore``.

Moocore (https://multi-objective.github.io/moocore/) minimises by default and knows nothing of
failed trials: here a point with a NaN or an infinity is never on the front and adds no volume.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLAT = 0.005
"""A front whose hypervolume grows by less than this share is flat."""


def front_mask(points: ArrayLike) -> NDArray[np.bool_]:
    """Mark the points that no other point dominates: boolean of shape (N,) for points of (N, d).

    Point p dominates q if p is at least as good in every objective and better in one. Equal points
    do not dominate each other, so all copies of a point of the front are on the front.
    """
    values = _two_axes(points)
    finite = np.isfinite(values).all(axis=1)
    mask = np.zeros(len(values), dtype=np.bool_)
    if finite.any():
        import moocore

        mask[finite] = moocore.is_nondominated(values[finite], maximise=True, keep_weakly=True)
    return mask


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume that points of shape (N, d) dominate above a reference (Zitzler and Thiele, 1998).

    Points that are not better than the reference in every objective add none. ``ValueError`` for a
    reference that has not shape (d,) or is not finite.
    """
    values = _two_axes(points)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != (values.shape[1],) or not np.isfinite(corner).all():
        raise ValueError(f"the reference point must be {values.shape[1]} finite numbers")
    above = values[np.isfinite(values).all(axis=1) & (values > corner).all(axis=1)]
    if len(above) == 0:
        return 0.0
    import moocore

    return float(moocore.hypervolume(above, ref=corner, maximise=True))


def flat_since(volumes: Sequence[float]) -> int:
    """After how many trials the hypervolume had all but ``FLAT`` of what it has at last.

    ``volumes`` are the hypervolumes after each trial, which never fall.
    """
    last = volumes[-1] if volumes else 0.0
    return next((i for i, each in enumerate(volumes, 1) if each >= (1 - FLAT) * last), 0)


def _two_axes(points: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"points must have shape (N, d), got {values.shape}")
    return values
