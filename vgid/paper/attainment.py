"""Attainment surfaces: what the fronts of several seeds reach together, and their picture.

The surface of level k bounds the points that at least k of the fronts attain, that is, weakly
dominate (Grunert da Fonseca, Fonseca and Hall 2001). With one front a seed, level 1 is the best
case, the number of seeds the worst, and the level in between the median.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vgid.config import Method
from vgid.paper.figures import COLOURS
from vgid.report.drawing import Panel, Picture, Scale, Series
from vgid.report.records import METHOD_LABELS

Points = Sequence[tuple[float, float]]


def attainment_surface(fronts: Sequence[Points], level: int) -> NDArray[np.float64]:
    """The corner points of the surface that ``level`` runs attain, for two maximised objectives.

    They are float64 of shape (N, 2), the first objective ascending; N is 0 where fewer than
    ``level`` runs have points. ValueError where there is no such level.
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
    # moocore states levels as percentages of the sets that were given.
    levels = np.unique(surfaces[:, 2])
    corners = -surfaces[surfaces[:, 2] == levels[level - 1], :2]
    return np.asarray(corners[np.lexsort((-corners[:, 1], corners[:, 0]))], dtype=np.float64)


def attainment_picture(
    title: str, fronts: Mapping[Method, Sequence[Points]], base: tuple[float, float]
) -> Picture:
    """Best, median and worst surface of each method over its seeds.

    Surfaces end at the reference point of the hypervolume, half the base's second objective.
    """
    series = []
    for method, runs in fronts.items():
        label = METHOD_LABELS[method]
        # The median surface is what at least half of the runs attain.
        levels = {"median": (len(runs) + 1) // 2, "best": 1, "worst": len(runs)}
        for name, level in levels.items():
            median = name == "median"
            x, y = _staircase(attainment_surface(runs, level), (0.0, base[1] / 2))
            surface = Series(label, x, y, COLOURS[method], "", dotted=not median, steps=True)
            opacity, line = (1.0, 2.5) if median else (0.6, 1.0)
            hover = [f"{label}, {name}"] * len(x)
            series.append(replace(surface, opacity=opacity, line=line, hover=hover))
    star = Series("Base", [base[0]], [base[1]], COLOURS["base"], "star", 18, hover=["Base"])
    x_scale = Scale("reduction of forget ROUGE-L, held-out questions")
    y_scale = Scale("retain ROUGE-L, held-out questions")
    panel = Panel(x_scale, y_scale, [*series, star])
    return Picture(title, [panel], "median, and dotted best and worst", size=(8.4, 6))


def _staircase(
    corners: NDArray[np.float64], corner: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """A surface as a line, from the left edge of the picture down to its bottom."""
    inside = corners[(corners > corner).all(axis=1)]
    if not len(inside):
        return [], []
    x, y = inside.T.tolist()
    return [corner[0], *x, x[-1]], [y[0], *y, corner[1]]
