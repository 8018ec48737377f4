"""The paper's figures 2 and 4 to 7 from the tables' outcomes, as PNG and as HTML.

Figures 4 to 7 show for every method how much of the forget set is gone against what is left of the
retain set, one panel a forget ratio; figure 2 shows what the first response token may be under the
interventions. matplotlib and plotly draw the same ``Picture``; they are imported when one is drawn.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgid.files import write_atomically
from vgid.paper.experiments import Arm, Experiment, Outcome
from vgid.paper.tables import COMPARISONS, METRIC_LABELS, FilledTable
from vgid.report.intervals import Interval, t_interval

TRADE_OFFS: dict[int, str] = {4: "rougeL", 5: "bleu", 6: "classification", 7: "cloze"}
"""Metric of each of the paper's trade-off figures."""

FIRST_TOKEN_ARMS: dict[str, Arm] = {
    "base": Arm(probe="first_tokens"),
    "text only": Arm(style="strict", probe="first_tokens"),
    "dual": Arm(style="strict", noise_type="random", probe="first_tokens"),
}
"""What figure 2 asks: panels (a), (b) and (c)."""

SENSITIVE, SAFE, INK = "#e08a3c", "#4a9d6e", "#333333"
COLOURS = {
    "base": "#222222", "ga": "#8a97a6", "ga_diff": "#6c5b7b", "kl_min": "#355c7d",
    "po_dpo": "#2a9d8f", "po_idk": "#8ab17d", "npo": "#b8860b", "rmu": "#a0522d",
    "icu_t": "#e9a23b", "noise_t": "#5fa8d3", "vgid": "#d1495b",
}  # fmt: skip
MARKERS = {"base": "*", "vgid": "D", "icu_t": "^", "noise_t": "v"}
SYMBOLS = {"*": "star", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "o": "circle"}


@dataclass(frozen=True)
class Point:
    """One mark with its intervals over the seeds: a method, or a bar."""

    key: str
    label: str
    x: Interval
    y: Interval


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        number: in the paper.
        title: its headline.
        panels: from left to right.
        bars: points are bars in the order given, two a label; otherwise marks in the plane.
    """

    number: int
    title: str
    panels: tuple[Panel, ...]
    bars: bool = False


def trade_off(number: int, filled: Sequence[FilledTable]) -> Picture:
    """Figure 4, 5, 6 or 7 of one backbone.

    Args:
        number: of the figure.
        filled: Tables 3, 8 and 9 of the backbone, or those of them that there are.
    """
    metric = TRADE_OFFS[number]
    label = METRIC_LABELS[metric]
    panels = []
    for table in filled:
        base = table.values("base", f"forget_{metric}")
        points = []
        for row in table.table.rows:
            left = table.values(row.key, f"forget_{metric}")
            gone = [
                None if a is None or b is None else a - b for a, b in zip(base, left, strict=True)
            ]
            points.append(
                Point(
                    row.key,
                    row.label,
                    t_interval(gone),
                    table.interval(row.key, f"retain_{metric}"),
                )
            )
        panels.append(
            Panel(
                f"{table.table.forget_ratio} % forgotten",
                f"reduction of forget {label}",
                f"retain {label}",
                tuple(point for point in points if point.x.n and point.y.n),
            )
        )
    title = f"Figure {number}: forgetting against utility by {label} ({filled[0].backbone})"
    return Picture(number, title, tuple(panels))


def first_tokens(
    backbone: str, seeds: Sequence[int], outcomes: Mapping[Experiment, Outcome]
) -> Picture:
    """Figure 2 of one backbone, from the outcomes of ``FIRST_TOKEN_ARMS`` at 5 %."""
    panels = []
    for measure, y_label in (
        ("logit", "logit above the vocabulary's mean"),
        ("probability", "probability"),
    ):
        points = []
        for name, arm in FIRST_TOKEN_ARMS.items():
            found = [outcomes[first_token_experiment(backbone, arm, seed)] for seed in seeds]
            for kind in ("sensitive", "safe"):
                scores = [outcome.scores.get(f"{kind}_{measure}") for outcome in found]
                values = [None if score is None else score.value for score in scores]
                points.append(Point(kind, name, t_interval(values), t_interval(values)))
        panels.append(Panel(f"first response token: {measure}", "", y_label, tuple(points)))
    title = f"Figure 2: sensitive and safe tokens under the interventions ({backbone})"
    return Picture(2, title, tuple(panels), bars=True)


def first_token_experiment(backbone: str, arm: Arm, seed: int) -> Experiment:
    """The experiment behind a bar of figure 2."""
    return Experiment(backbone=backbone, forget_ratio=5, seed=seed, arm=arm)


def pictures(filled: Sequence[FilledTable], backbone: str) -> list[Picture]:
    """Figures 4 to 7 of a backbone, as far as its tables 3, 8 and 9 are there."""
    numbers = COMPARISONS.values()
    mine = [t for t in filled if t.backbone == backbone and t.table.number in numbers]
    return [trade_off(number, mine) for number in TRADE_OFFS] if mine else []


def write_picture(folder: Path, stem: str, picture: Picture) -> list[str]:
    """Write ``<stem>.png`` and ``<stem>.html``.

    Returns:
        The names of both files.

    Raises:
        InputError: a file cannot be written.
    """
    write_atomically(folder / f"{stem}.png", _png(picture))
    write_page(folder, stem, plotly_figure(picture))
    return [f"{stem}.png", f"{stem}.html"]


def write_page(folder: Path, stem: str, figure: Mapping[str, Any]) -> None:
    """Write ``<stem>.html`` of a plotly figure; plotly's code lies once beside all pages.

    Raises:
        InputError: a file cannot be written.
    """
    import plotly.io
    from plotly.offline import get_plotlyjs

    code = folder / "plotly.min.js"
    if not code.exists():
        write_atomically(code, get_plotlyjs().encode())
    page = plotly.io.to_html(
        dict(figure),
        include_plotlyjs="directory",
        full_html=True,
        div_id=stem,
        config={"displaylogo": False, "responsive": True},
    )
    write_atomically(folder / f"{stem}.html", page.encode())


def _png(picture: Picture) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(picture.panels)
    figure = Figure(figsize=(4.6 * count + 1, 4.6), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    for axes, panel in zip(
        figure.subplots(1, count, squeeze=False)[0], picture.panels, strict=True
    ):
        axes.set_title(panel.title, fontsize=10.5, color=INK, loc="left")
        axes.set_xlabel(panel.x_label, color=INK)
        axes.set_ylabel(panel.y_label, color=INK)
        axes.grid(color="#e6e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        (_draw_bars if picture.bars else _draw_points)(axes, panel)
    figure.suptitle(picture.title, fontsize=12, color=INK)
    found: dict[str, Any] = {}
    for axes in figure.axes:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=8.5,
    )
    image = io.BytesIO()
    canvas.print_png(image, metadata={"Software": None})
    return image.getvalue()


def _draw_points(axes: Any, panel: Panel) -> None:
    for point in panel.points:
        axes.errorbar(
            point.x.mean,
            point.y.mean,
            xerr=_reach(point.x),
            yerr=_reach(point.y),
            fmt=MARKERS.get(point.key, "o"),
            color=COLOURS.get(point.key, INK),
            markersize=11 if point.key == "base" else 7,
            elinewidth=0.8,
            label=point.label,
        )


def _draw_bars(axes: Any, panel: Panel) -> None:
    labels = list(dict.fromkeys(point.label for point in panel.points))
    for kind, colour, shift in (("sensitive", SENSITIVE, -0.2), ("safe", SAFE, 0.2)):
        chosen = [point for point in panel.points if point.key == kind]
        axes.bar(
            [labels.index(point.label) + shift for point in chosen],
            [point.y.mean for point in chosen],
            0.38,
            color=colour,
            label=f"{kind} tokens",
            yerr=[_reach(point.y) or 0.0 for point in chosen],
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(range(len(labels)), labels)


def _reach(interval: Interval) -> float | None:
    return interval.high - interval.mean if interval.n > 1 else None


def plotly_figure(picture: Picture) -> dict[str, Any]:
    """The interactive picture as plotly's JSON: ``data`` and ``layout``."""
    data = []
    width = 1 / len(picture.panels)
    layout: dict[str, Any] = {
        "title": {"text": picture.title},
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif", "color": INK},
        "legend": {"orientation": "h", "y": -0.2},
        "annotations": [],
    }
    for index, panel in enumerate(picture.panels):
        number = "" if index == 0 else str(index + 1)
        domain = [index * width + 0.03, (index + 1) * width - 0.03]
        style = {"gridcolor": "#e6e9ed", "zeroline": False}
        layout[f"xaxis{number}"] = {**style, "domain": domain, "title": {"text": panel.x_label}}
        layout[f"yaxis{number}"] = {
            **style, "anchor": f"x{number}", "title": {"text": panel.y_label}
        }  # fmt: skip
        layout["annotations"].append(
            {"text": panel.title, "x": domain[0], "y": 1.05, "xref": "paper", "yref": "paper",
             "xanchor": "left", "showarrow": False}
        )  # fmt: skip
        traces = _plotly_bars(panel) if picture.bars else _plotly_points(panel)
        for trace in traces:
            trace |= {"xaxis": f"x{number}", "yaxis": f"y{number}", "showlegend": index == 0}
        data += traces
    return {"data": data, "layout": layout}


def _plotly_points(panel: Panel) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": point.label,
            "legendgroup": point.key,
            "x": [point.x.mean],
            "y": [point.y.mean],
            "error_x": _plotly_reach([point.x]),
            "error_y": _plotly_reach([point.y]),
            "marker": {
                "size": 14 if point.key == "base" else 10,
                "color": COLOURS.get(point.key, INK),
                "symbol": SYMBOLS[MARKERS.get(point.key, "o")],
            },
            "hovertext": [
                f"<b>{point.label}</b><br>{panel.x_label} {point.x}<br>{panel.y_label} {point.y}"
            ],
            "hoverinfo": "text",
        }
        for point in panel.points
    ]


def _plotly_bars(panel: Panel) -> list[dict[str, Any]]:
    found = []
    for kind, colour in (("sensitive", SENSITIVE), ("safe", SAFE)):
        chosen = [point for point in panel.points if point.key == kind]
        found.append(
            {
                "type": "bar",
                "name": f"{kind} tokens",
                "legendgroup": kind,
                "x": [point.label for point in chosen],
                "y": [point.y.mean for point in chosen],
                "error_y": _plotly_reach([point.y for point in chosen]),
                "marker": {"color": colour},
            }
        )
    return found


def _plotly_reach(intervals: Sequence[Interval]) -> dict[str, Any]:
    return {"type": "data", "array": [_reach(i) or 0.0 for i in intervals], "thickness": 1}
