"""Attainment surfaces: what the fronts of several seeds reach together, and their picture.

The surface of level k bounds the points that at least k of the fronts attain, that is, weakly
dominate (Grunert da Fonseca, Fonseca and Hall 2001). With one front a seed, level 1 is the best
case, the number of seeds the worst, and the level in between the median.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vgid.files import write_atomically
from vgid.paper.figures import COLOURS, INK, write_page

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


def write_attainment(
    folder: Path,
    title: str,
    drawn: Sequence[Surfaces],
    corner: tuple[float, float],
    base: tuple[float, float],
) -> list[str]:
    """Write ``attainment.png`` and ``attainment.html``.

    Args:
        folder: where.
        title: headline.
        drawn: the methods.
        corner: where surfaces end, the reference point of the hypervolume.
        base: the base model's point.

    Returns:
        The names of both files.

    Raises:
        InputError: a file cannot be written.
    """
    write_atomically(folder / "attainment.png", _png(title, drawn, corner, base))
    write_page(folder, "attainment", plotly_figure(title, drawn, corner, base))
    return ["attainment.png", "attainment.html"]


X_LABEL = "reduction of forget ROUGE-L, held-out questions"
Y_LABEL = "retain ROUGE-L, held-out questions"


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


def _png(
    title: str,
    drawn: Sequence[Surfaces],
    corner: tuple[float, float],
    base: tuple[float, float],
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 6), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    axes = figure.subplots()
    for item in drawn:
        colour = COLOURS.get(item.key, INK)
        x, y = _staircase(item.median, corner)
        axes.step(x, y, where="pre", color=colour, linewidth=2, label=item.label)
        for surface in (item.best, item.worst):
            x, y = _staircase(surface, corner)
            axes.step(x, y, where="pre", color=colour, linewidth=0.8, alpha=0.55, linestyle=":")
    axes.plot(*base, "*", color=COLOURS["base"], markersize=13, label="Base")
    axes.set_xlabel(X_LABEL, color=INK)
    axes.set_ylabel(Y_LABEL, color=INK)
    axes.grid(color="#e6e9ed", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: median, and dotted best and worst", fontsize=12, color=INK)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    image = io.BytesIO()
    canvas.print_png(image, metadata={"Software": None})
    return image.getvalue()


def plotly_figure(
    title: str,
    drawn: Sequence[Surfaces],
    corner: tuple[float, float],
    base: tuple[float, float],
) -> dict[str, Any]:
    """The interactive picture as plotly's JSON; a click on a method's name hides it."""
    data: list[dict[str, Any]] = []
    for item in drawn:
        for name, surface in (("median", item.median), ("best", item.best), ("worst", item.worst)):
            x, y = _staircase(surface, corner)
            line: dict[str, Any] = {"shape": "vh", "color": COLOURS.get(item.key, INK)}
            line |= {"width": 2.5} if name == "median" else {"width": 1, "dash": "dot"}
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": item.label,
                    "legendgroup": item.key,
                    "showlegend": name == "median",
                    "x": x,
                    "y": y,
                    "line": line,
                    "hovertext": f"{item.label}, {name}",
                }
            )
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "Base",
            "x": [base[0]],
            "y": [base[1]],
            "marker": {"symbol": "star", "size": 14, "color": COLOURS["base"]},
        }
    )
    axis = {"gridcolor": "#e6e9ed", "zeroline": False}
    layout = {
        "title": {"text": f"{title}: median, and dotted best and worst"},
        "xaxis": {**axis, "title": {"text": X_LABEL}},
        "yaxis": {**axis, "title": {"text": Y_LABEL}},
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif", "color": INK},
        "legend": {"groupclick": "togglegroup"},
    }
    return {"data": data, "layout": layout}
