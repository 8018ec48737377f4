"""The paper's figures 2 and 4 to 7, and the attainment surfaces of the comparison of methods.

Figure 2 shows the first response token, 4 to 7 forgetting against utility. Attainment surfaces
show what the fronts of several seeds reach together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vgid.config import Method
from vgid.paper.experiments import Arm
from vgid.paper.tables import COMPARISONS, METRIC_LABELS, FilledTable, Row, Table
from vgid.report.drawing import Panel, Picture, Scale, Series
from vgid.report.intervals import Interval, paired_interval
from vgid.report.records import METHOD_LABELS

Points = Sequence[tuple[float, float]]

TRADE_OFFS: dict[int, str] = {4: "rougeL", 5: "bleu", 6: "classification", 7: "cloze"}
"""Metric of each figure of forgetting against utility, one panel a forget ratio."""

FIRST_TOKENS = Table(2, "The first response token", 5, (), (
    Row("base", "base", "", Arm(probe="first_tokens")),
    Row("text", "text only", "", Arm(style="strict", probe="first_tokens")),
    Row("dual", "dual", "", Arm(style="strict", noise_type="random", probe="first_tokens")),
))  # fmt: skip
"""What figure 2 asks: panels (a), (b) and (c)."""

COLOURS = {
    "base": "#222222", "ga": "#8a97a6", "ga_diff": "#6c5b7b", "kl_min": "#355c7d",
    "po_dpo": "#2a9d8f", "po_idk": "#8ab17d", "npo": "#b8860b", "rmu": "#a0522d",
    "icu_t": "#e9a23b", "noise_t": "#5fa8d3", "vgid": "#d1495b",
}  # fmt: skip
MARKS = {"base": "star", "vgid": "diamond", "icu_t": "triangle-up", "noise_t": "triangle-down"}
TOKENS = {"sensitive": "#e08a3c", "safe": "#4a9d6e"}  # kinds of tokens in figure 2


def trade_off(number: int, filled: Sequence[FilledTable]) -> Picture:
    """Figure 4, 5, 6 or 7 from those of a backbone's Tables 3, 8 and 9 that there are."""
    metric = METRIC_LABELS[TRADE_OFFS[number]]
    x, y = Scale(f"reduction of forget {metric}"), Scale(f"retain {metric}")
    panels = []
    for table in filled:
        forget, retain = (f"{split}_{TRADE_OFFS[number]}" for split in ("forget", "retain"))
        drawn = []
        for row in table.table.rows:
            gone = paired_interval(table.values("base", forget), table.values(row.key, forget))
            kept = table.interval(row.key, retain)
            if gone.n and kept.n:
                mark, size = MARKS.get(row.key, "circle"), 16 if row.key == "base" else 11
                point = Series(row.label, [gone.value], [kept.value], COLOURS[row.key], mark, size)
                x_ends, y_ends = [_bounds(gone)], [_bounds(kept)]
                hover = [f"{row.label}\n{x.label} {gone}\n{y.label} {kept}"]
                drawn.append(replace(point, x_bounds=x_ends, y_bounds=y_ends, hover=hover))
        panels.append(Panel(x, y, drawn, f"{table.table.forget_ratio} % forgotten"))
    title = f"Figure {number}: forgetting against utility by {metric} ({filled[0].backbone})"
    return Picture(title, panels, size=(4.6 * len(panels) + 1, 4.6))


def first_tokens(filled: FilledTable) -> Picture | None:
    """Figure 2 of one backbone from its ``FIRST_TOKENS``; None where nothing was asked."""
    keys = [row.key for row in filled.table.rows]
    panels, known = [], 0
    labels = {"logit": "logit above the vocabulary's mean", "probability": "probability"}
    for measure, label in labels.items():
        drawn = []
        for kind, colour in TOKENS.items():
            found = [filled.interval(key, f"{kind}_{measure}") for key in keys]
            known += sum(interval.n for interval in found)
            name = f"{kind} tokens"
            heights = [interval.value if interval.n else 0.0 for interval in found]
            bounds = [_bounds(interval) for interval in found]
            hover = [f"{name}\n{label} {interval}" for interval in found]
            bars = Series(
                name, range(len(found)), heights, colour, "bar", y_bounds=bounds, hover=hover
            )
            drawn.append(bars)
        x = Scale(ticks=list(enumerate(row.label for row in filled.table.rows)))
        panels.append(Panel(x, Scale(label), drawn, f"first response token: {measure}"))
    title = f"Figure 2: sensitive and safe tokens under the interventions ({filled.backbone})"
    return Picture(title, panels, size=(4.6 * len(panels) + 1, 4.6)) if known else None


def _bounds(interval: Interval) -> tuple[float, float]:
    """Both ends of an interval, which one seed does not have."""
    if interval.n > 1:
        return interval.low, interval.high
    return (interval.value, interval.value) if interval.n else (0.0, 0.0)


def pictures(filled: Sequence[FilledTable]) -> dict[int, Picture]:
    """A backbone's figures by number, as far as the tables that they show are there."""
    found: dict[int, Picture] = {}
    for table in filled:
        if table.table is FIRST_TOKENS and (picture := first_tokens(table)) is not None:
            found[2] = picture
    compared = [table for table in filled if table.table.number in COMPARISONS.values()]
    return found | {number: trade_off(number, compared) for number in TRADE_OFFS if compared}


def attainment_surface(fronts: Sequence[Points], level: int) -> NDArray[np.float64]:
    """The corner points of the surface that ``level`` runs attain, for two maximised objectives.

    It bounds the points that at least so many of the fronts attain, that is, weakly dominate
    (Grunert da Fonseca, Fonseca and Hall 2001). With one front a seed, level 1 is the best case,
    the number of seeds the worst, and the level in between the median. The corners are float64 of
    shape (N, 2), the first objective ascending; N is 0 where fewer than ``level`` runs have points.
    ValueError where there is no such level.
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
