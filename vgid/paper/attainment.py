"""Attainment surfaces: what the fronts of several seeds reach together, and their picture.

The surface of level k bounds the points that at least k of the fronts attain, that is, weakly
dominate (Grunert da Fonseca, Fonseca and Hall 2001). With one front a seed, level 1 is the best
case, the number of seeds the worst, and the level in between the median.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vgid.paper.figures import COLOURS
from vgid.report.drawing import INK, Panel, Picture, Scale, Series

Points = Sequence[tuple[float, float]]


def attainment_surface(fronts: Sequence[Points], level: int) -> NDArray[np.float64]:
    """The corner points of an attainment surface, for two maximised objectives.

    Args:
        fronts: points of each run; a run without points attains nothing.
        level: how many runs must attain, from 1 to their number.

    Returns:
        Non-dominated corners, float64 of shape (N, 2), the first objective ascending; N is 0 where
        fewer than ``level`` runs have points.

    Raises:
        ValueError: no such level.
    """
    if not 1 <= level <= len(fronts):
        raise ValueError(f"level {level} of {len(fronts)} fronts")
    filled = [front for front in fronts if front]
    if len(filled) < level:
        return np.empty((0, 2))
    import moocore

    points = np.array([point for front in filled for point in front], dtype=np.float64)
    sets = np.repeat(np.arange(len(filled)), [len(front) for front in filled])
    surfaces = moocore.eaf(-points, sets)  # it minimises
    # moocore states levels as percentages of the sets that were given, so they are counted off
    # instead.
    levels = np.unique(surfaces[:, 2])
    corners = -surfaces[surfaces[:, 2] == levels[level - 1], :2]
    return np.asarray(corners[np.lexsort((-corners[:, 1], corners[:, 0]))], dtype=np.float64)


def median_level(runs: int) -> int:
    """The level of the median surface: attained by at least half of the runs."""
    return (runs + 1) // 2


@dataclass(frozen=True)
class Surfaces:
    """Best, median and worst surface of one method over its seeds."""

    key: str
    label: str
    best: NDArray[np.float64]
    median: NDArray[np.float64]
    worst: NDArray[np.float64]


def surfaces(fronts: Mapping[str, Sequence[Points]], labels: Mapping[str, str]) -> list[Surfaces]:
    """The three surfaces of each method that has fronts."""
    return [
        Surfaces(
            key,
            labels[key],
            attainment_surface(runs, 1),
            attainment_surface(runs, median_level(len(runs))),
            attainment_surface(runs, len(runs)),
        )
        for key, runs in fronts.items()
    ]


def attainment_picture(
    title: str,
    drawn: Sequence[Surfaces],
    corner: tuple[float, float],
    base: tuple[float, float],
) -> Picture:
    """The surfaces; in the page a click on a method's name hides it.

    Args:
        title: headline.
        drawn: the methods.
        corner: where surfaces end, the reference point of the hypervolume.
        base: the base model's point.
    """
    series = []
    for item in drawn:
        colour = COLOURS.get(item.key, INK)
        for name, surface in (("median", item.median), ("best", item.best), ("worst", item.worst)):
            x, y = _staircase(surface, corner)
            series.append(
                Series(
                    item.label,
                    x,
                    y,
                    colour,
                    "",
                    opacity=1.0 if name == "median" else 0.6,
                    line=2.5 if name == "median" else 1.0,
                    dotted=name != "median",
                    steps=True,
                    hover=[f"{item.label}, {name}"] * len(x),
                )
            )
    star = Series("Base", [base[0]], [base[1]], COLOURS["base"], "star", 18, hover=["Base"])
    panel = Panel(
        Scale("reduction of forget ROUGE-L, held-out questions"),
        Scale("retain ROUGE-L, held-out questions"),
        [*series, star],
    )
    return Picture(title, [panel], "median, and dotted best and worst", size=(8.4, 6))


def _staircase(
    corners: NDArray[np.float64], corner: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """A surface as a line, from the left edge of the picture down to its bottom."""
    inside = corners[(corners[:, 0] > corner[0]) & (corners[:, 1] > corner[1])]
    if not len(inside):
        return [], []
    x = [corner[0], *inside[:, 0].tolist(), inside[-1, 0]]
    y = [inside[0, 1], *inside[:, 1].tolist(), corner[1]]
    return x, y
