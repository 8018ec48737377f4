"""What made the difference in a study: ``insights.html`` (plotly) and ``insights.png``.

Above, how much of each objective's variance over the trials each hyperparameter explains (fANOVA,
Hutter et al. 2014, as Optuna computes it). Below, every trial as a line from its hyperparameters
to its objectives, the front in colour. Both are read from the trials alone, so they describe this
search space and say nothing of values that were not tried.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vgid.files import write_atomically
from vgid.report.page import write_page
from vgid.report.plots import BASE, FRONT, HELD_OUT, INK, TRIAL, Front
from vgid.report.records import HYPERPARAMETERS, TrialRecord, run_name
from vgid.results import OBJECTIVES

MIN_TRIALS = 8
"""Completed trials below which shares of variance are noise and are not shown."""

MAX_TRIALS = 256
"""Of more, so many are taken, evenly by id: fANOVA's time grows with the square of its trials, and
thousands of lines are one grey."""

T = TypeVar("T")
Shares = dict[str, dict[str, float]]
"""Share of variance by hyperparameter, by objective."""

OBJECTIVE_LABELS = {OBJECTIVES[0]: "forget reduction", OBJECTIVES[1]: "retain ROUGE-L"}
OBJECTIVE_COLOURS = {OBJECTIVES[0]: FRONT, OBJECTIVES[1]: HELD_OUT}
LOGARITHMIC = ("alpha", "beta", "learning_rate")


@dataclass(frozen=True)
class Axis:
    """One vertical axis of the parallel coordinates.

    Attributes:
        label: what is on it.
        heights: place of each trial on it between 0 and 1, None where the trial has no value.
        low: what stands at its lower end.
        high: what stands at its upper end.
        ticks: further places with what stands there, for values without an order.
    """

    label: str
    heights: tuple[float | None, ...]
    low: str
    high: str
    ticks: tuple[tuple[float, str], ...] = ()


def varied(records: Sequence[TrialRecord]) -> list[str]:
    """The hyperparameters that take more than one value in these trials."""
    names = [*HYPERPARAMETERS, "response_source", "lora_rank", "epochs", "preference_beta"]
    return [
        name
        for name in names
        if len({str(r.config.used.get(name)) for r in records} - {"None"}) > 1
    ]


def importances(records: Sequence[TrialRecord]) -> Shares:
    """Share of each objective's variance that each hyperparameter explains.

    A hyperparameter that only some trials have (sigma) is left out, as Optuna's evaluator asks.

    Args:
        records: completed trials; of more than ``MAX_TRIALS``, so many are looked at.

    Returns:
        The shares; empty with fewer than ``MIN_TRIALS`` trials.
    """
    records = _some(records)
    names = [
        name
        for name in varied(records)
        if all(record.config.used.get(name) is not None for record in records)
    ]
    if len(records) < MIN_TRIALS or not names:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(name, records) for name in names}
    study = optuna.create_study(directions=["maximize"] * len(OBJECTIVES))
    for record in records:
        study.add_trial(
            optuna.trial.create_trial(
                params={name: record.config.used[name] for name in names},
                distributions=distributions,
                values=list(record.point or ()),
            )
        )
    found = {}
    for index, objective in enumerate(OBJECTIVES):
        values = [(record.point or ())[index] for record in records]
        if max(values) - min(values) < 1e-12:  # nothing to explain
            found[objective] = dict.fromkeys(names, 0.0)
            continue
        shares = optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            params=names,
            target=lambda trial, index=index: trial.values[index],
        )
        found[objective] = {name: float(shares[name]) for name in names}
    return found


def axes(records: Sequence[TrialRecord]) -> list[Axis]:
    """The axes of the parallel coordinates: what varied, then the objectives."""
    return [_axis(name, [r.config.used.get(name) for r in records]) for name in varied(records)] + [
        _axis(OBJECTIVE_LABELS[name], [r.result.metrics[name] for r in records])
        for name in OBJECTIVES
    ]


def write_insights_html(path: Path, front: Front, shares: Shares) -> None:
    """Write ``insights.html``, self-contained.

    Args:
        path: the file.
        front: the study's trials.
        shares: their ``importances``.

    Raises:
        InputError: the file cannot be written.
    """
    script = '  Plotly.newPlot("insights", payload.data, payload.layout, options);'
    write_page(
        path,
        f"{front.title}: what made the difference",
        insights_figure(front, shares),
        style="#insights { flex: 1; min-height: 640px; }",
        body='<div id="insights"></div>',
        script=script,
    )


def write_insights_png(path: Path, front: Front, shares: Shares) -> None:
    """Write ``insights.png``, the same as a picture.

    Args:
        path: the file.
        front: the study's trials.
        shares: their ``importances``.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = front.drawn
    figure = Figure(figsize=(7.2, 6.2 if shares else 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2 if shares else 1, 1, squeeze=False)[:, 0]
    if shares:
        _draw_importances(panels[0], shares, _shares_title(records))
    _draw_parallel(panels[-1], records, axes(records) if records else [])
    image = io.BytesIO()
    canvas.print_png(image, metadata={"Software": None})
    write_atomically(path, image.getvalue())


def insights_figure(front: Front, shares: Shares) -> dict[str, Any]:
    """The interactive picture as plotly's JSON: ``data`` and ``layout``."""
    records = front.drawn
    columns = axes(records) if records else []
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": OBJECTIVE_LABELS[objective],
            "y": list(by_name)[::-1],
            "x": list(by_name.values())[::-1],
            "marker": {"color": OBJECTIVE_COLOURS[objective]},
            "hovertemplate": "%{y} explains %{x:.0%}<extra>%{fullData.name}</extra>",
            "xaxis": "x",
            "yaxis": "y",
        }
        for objective, by_name in shares.items()
    ]
    for on_front in (False, True):
        lines = _drawn(records, on_front)
        if lines:
            traces.append(_lines(records, lines, columns, on_front))
    layout = _layout(records, columns, bool(shares))
    return {"data": traces, "layout": layout}


def _layout(
    records: Sequence[TrialRecord], columns: Sequence[Axis], with_shares: bool
) -> dict[str, Any]:
    split = 0.52 if with_shares else 1.0
    return {
        "title": {
            "text": "What made the difference",
            "subtitle": {"text": _lines_title(records)},
            "x": 0.02,
            "xanchor": "left",
        },
        "barmode": "group",
        "hovermode": "closest",
        "xaxis": {
            "domain": [0, 1],
            "anchor": "y",
            "tickformat": ".0%",
            "rangemode": "tozero",
            "title": {"text": _shares_title(records)},
            "visible": with_shares,
        },
        "yaxis": {"domain": [0.68, 1], "anchor": "x", "visible": with_shares},
        "xaxis2": {
            "domain": [0, 1],
            "anchor": "y2",
            "tickvals": list(range(len(columns))),
            "ticktext": [column.label.replace(" ", "<br>") for column in columns],
            "showgrid": True,
            "gridcolor": "#cfd6dd",
            "zeroline": False,
            "range": [-0.4, len(columns) - 0.6],
        },
        "yaxis2": {
            "domain": [0, split - 0.02],
            "anchor": "x2",
            "range": [-0.12, 1.12],
            "visible": False,
        },
        "annotations": [
            {
                "x": index,
                "y": height,
                "xref": "x2",
                "yref": "y2",
                "text": text,
                "showarrow": False,
                "xshift": 6,
                "xanchor": "left",
                "font": {"size": 11, "color": BASE},
                "bgcolor": "rgba(255,255,255,0.8)",
            }
            for index, column in enumerate(columns)
            for height, text in _marks(column)
        ],
        "legend": {"orientation": "h", "y": 1.04, "x": 0.35},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 120, "r": 60, "t": 60, "b": 40},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
    }


def _lines(
    records: Sequence[TrialRecord], lines: Sequence[int], columns: Sequence[Axis], on_front: bool
) -> dict[str, Any]:
    """All lines of one kind as one trace, each ended by a gap: thousands would choke a browser."""
    points: list[tuple[int | None, float | None, str]] = []
    for number in lines:
        text = run_name(records[number].config, records[number].result.trial_id)
        points += [(place, height, text) for place, height in _line(columns, number)]
        points.append((None, None, ""))
    x, y, texts = zip(*points, strict=True)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(x),
        "y": list(y),
        "line": {"color": FRONT if on_front else TRIAL, "width": 2 if on_front else 1},
        "marker": {"size": 5},
        "opacity": 1.0 if on_front else 0.4,
        "hovertext": list(texts),
        "hoverinfo": "text",
        "showlegend": False,
        "xaxis": "x2",
        "yaxis": "y2",
    }


def _some(all_of_them: Sequence[T]) -> list[T]:
    """``MAX_TRIALS`` at most, evenly."""
    taken = min(len(all_of_them), MAX_TRIALS)
    return [all_of_them[number * len(all_of_them) // taken] for number in range(taken)]


def _drawn(records: Sequence[TrialRecord], on_front: bool) -> list[int]:
    """Which trials have a line: the whole front, and some of the others."""
    lines = [n for n, record in enumerate(records) if record.on_front == on_front]
    return lines if on_front else _some(lines)


def _lines_title(records: Sequence[TrialRecord]) -> str:
    others = sum(not record.on_front for record in records)
    who = "Every trial" if others <= MAX_TRIALS else f"The front and {MAX_TRIALS} of the trials"
    return f"{who} from setting to scores, the front in colour"


def _line(columns: Sequence[Axis], number: int) -> list[tuple[int, float]]:
    """A trial's places on the axes; an axis on which it has none is passed by."""
    heights = [column.heights[number] for column in columns]
    return [(place, height) for place, height in enumerate(heights) if height is not None]


def _shares_title(records: Sequence[TrialRecord]) -> str:
    some = f"{MAX_TRIALS} of " if len(records) > MAX_TRIALS else ""
    return f"share of each objective's variance over {some}the trials (fANOVA)"


def _distribution(name: str, records: Sequence[TrialRecord]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = [record.config.used[name] for record in records]
    if all(isinstance(value, int) for value in values):
        return IntDistribution(min(values), max(values))
    if all(isinstance(value, float) for value in values):
        return FloatDistribution(
            min(values), max(values), log=name in LOGARITHMIC and min(values) > 0
        )
    return CategoricalDistribution(sorted(set(values)))


def _axis(label: str, values: Sequence[Any]) -> Axis:
    present = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in present):
        kinds = sorted(set(present))
        places = {kind: index / max(1, len(kinds) - 1) for index, kind in enumerate(kinds)}
        heights = tuple(None if value is None else places[value] for value in values)
        return Axis(label, heights, "", "", tuple((places[kind], kind) for kind in kinds))
    low, high = min(present), max(present)
    logarithmic = label in LOGARITHMIC and low > 0

    def height(value: float) -> float:
        if high <= low:
            return 0.5
        if logarithmic:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    heights = tuple(None if value is None else height(value) for value in values)
    return Axis(label, heights, f"{low:.3g}", f"{high:.3g}")


def _marks(column: Axis) -> list[tuple[float, str]]:
    return list(column.ticks) or [(0.0, column.low), (1.0, column.high)]


def _draw_importances(panel: Any, shares: Shares, title: str) -> None:
    names = list(next(iter(shares.values())))[::-1]
    for index, (objective, by_name) in enumerate(shares.items()):
        places = [place + 0.19 - 0.38 * index for place in range(len(names))]
        panel.barh(
            places,
            [by_name[name] for name in names],
            0.36,
            color=OBJECTIVE_COLOURS[objective],
            label=OBJECTIVE_LABELS[objective],
        )
    panel.set_yticks(range(len(names)), names, fontsize=9, color=INK)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.tick_params(axis="x", labelsize=9, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(
        title[0].upper() + title[1:],
        fontsize=10.5,
        color=INK,
        loc="left",
    )
    panel.legend(frameon=False, fontsize=8.5)


def _draw_parallel(panel: Any, records: Sequence[TrialRecord], columns: Sequence[Axis]) -> None:
    from matplotlib.collections import LineCollection

    places = range(len(columns))
    styles: dict[bool, dict[str, Any]] = {
        False: {"colors": TRIAL, "linewidths": 0.8, "alpha": 0.4, "zorder": 2},
        True: {"colors": FRONT, "linewidths": 1.6, "alpha": 0.95, "zorder": 3},
    }
    for on_front, style in styles.items():
        lines = [_line(columns, number) for number in _drawn(records, on_front)]
        panel.add_collection(LineCollection(lines, joinstyle="round", **style))
    for place, column in zip(places, columns, strict=True):
        panel.axvline(place, color="#cfd6dd", linewidth=0.8, zorder=1)
        for height, text in _marks(column):
            panel.annotate(
                text,
                (place, height),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=7.5,
                color=BASE,
                va="center",
                zorder=4,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
            )
    labels = [column.label.replace("_", "\n").replace(" ", "\n") for column in columns]
    panel.set_xticks(places, labels, fontsize=8.5)
    panel.set_yticks([])
    panel.set_xlim(-0.2, max(1, len(columns)) - 0.4)
    panel.spines[["top", "right", "left", "bottom"]].set_visible(False)
    panel.set_title(
        _lines_title(records),
        fontsize=10.5,
        color=INK,
        loc="left",
    )
