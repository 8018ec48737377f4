"""The picture of a pick, ``pick.png`` and ``pick.html``, and what lies beside it.

On the left what each candidate forgets and keeps, with its intervals; on the right what is still
answered of what was to be forgotten, by attack. matplotlib and plotly are imported when something
is drawn.
"""

import io
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from vgid.deployment.pick_report import (
    PickReport,
    candidates_csv,
    html_table,
    interval_text,
    paragraphs,
)
from vgid.deployment.rules import Marks
from vgid.deployment.scores import Scored
from vgid.files import write_atomically
from vgid.report.page import write_page
from vgid.report.plots import BASE, FRONT, HELD_OUT, INK, TRIAL
from vgid.results import Score

X_LABEL = "Reduction of forget ROUGE-L (higher: more is forgotten)"
Y_LABEL = "Retain ROUGE-L (higher: more is kept)"
LEFT_LABEL = "Score on what was to be forgotten (lower: less is left)"

ATTACKS = (
    ("plain", "forget_rougeL", "as asked", "o", "circle", HELD_OUT),
    ("reverse", "forget_rougeL", "reverse prompt", ">", "triangle-right", FRONT),
    ("plain", "test_rougeL", "new portraits and wording", "s", "square", "#e9a23b"),
    ("plain", "forget_rougeL_text", "by name, without image", "^", "triangle-up", "#7b5ea7"),
    ("plain", "forget_cloze", "cloze (accuracy)", "D", "diamond", TRIAL),
)
"""Rows of the right picture: questions, score, label, matplotlib's and plotly's mark, colour."""

STYLE = """#pick { flex: none; height: 520px; }
table { border-collapse: collapse; margin: 16px 24px 12px; }
td:nth-child(2) { white-space: nowrap; }
th, td { padding: 4px 10px; border-bottom: 1px solid #e6e9ed; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.chosen { font-weight: 600; color: #d1495b; }
p { margin: 0 24px 8px; max-width: 64em; line-height: 1.45; }"""


def write_report(folder: Path, report: PickReport) -> None:
    """Write ``pick.png``, ``pick.html`` and ``candidates.csv``.

    Raises:
        InputError: a file cannot be written.
    """
    write_atomically(folder / "candidates.csv", candidates_csv(report))
    write_atomically(folder / "pick.png", _png(report))
    write_page(
        folder / "pick.html",
        f"Pick of {report.backbone}",
        plotly_figure(report),
        style=STYLE,
        body=f'<div id="pick"></div>{html_table(report)}{paragraphs(report)}',
        script='  Plotly.newPlot("pick", payload.data, payload.layout, options);',
    )


def _lines(report: PickReport) -> list[tuple[str, Scored, bool]]:
    """Rows of the right picture from bottom to top: base, runners-up, choice."""
    rows = [(m.trial_id, scored, m is report.choice.chosen) for m, _, scored in report.rows()]
    return [("base", report.candidates.base, False), *reversed(rows)]


def _shown(scored: Scored, kind: str, name: str) -> Score | None:
    scores: Mapping[str, Score] = getattr(scored, kind)
    return scores.get(name)


def _png(report: PickReport) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 4.6 + 0.22 * max(0, len(report.choice.order) - 6)
    figure = Figure(figsize=(12, height), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    left, right = figure.subplots(1, 2)
    for axes, title in ((left, "What is forgotten and kept"), (right, "What is left to attacks")):
        axes.set_title(title, fontsize=10.5, color=INK, loc="left")
        axes.grid(color="#e6e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    _draw_front(left, report)
    _draw_attacks(right, report)
    chosen = report.choice.chosen.trial_id
    figure.suptitle(
        f"{report.backbone}: trial {chosen} of {len(report.choice.order)} on the front, "
        f"by {report.choice}",
        fontsize=12,
        color=BASE,
    )
    image = io.BytesIO()
    canvas.print_png(image, metadata={"Software": None})
    return image.getvalue()


def _draw_front(axes: Any, report: PickReport) -> None:
    for marks, _, scored in report.rows():
        chosen = marks is report.choice.chosen
        colour = FRONT if chosen else TRIAL
        x, y = marks.reduction.value, marks.retain.value
        forget, retain = scored.plain["forget_rougeL"], scored.plain["retain_rougeL"]
        axes.errorbar(
            x,
            y,
            xerr=[[forget.high - forget.value], [forget.value - forget.low]],
            yerr=[[retain.value - retain.low], [retain.high - retain.value]],
            fmt="o",
            markersize=9 if chosen else 6,
            color=colour,
            elinewidth=1,
            zorder=4 if chosen else 3,
            label="chosen" if chosen else "on the front",
        )
        axes.annotate(
            marks.trial_id,
            (x, y),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            weight="bold" if chosen else "normal",
        )
    for y, label, style in _levels(report):
        axes.axhline(y, color=INK, linewidth=1, linestyle=style, label=label)
    axes.margins(0.12)
    axes.set_xlabel(X_LABEL, color=INK)
    axes.set_ylabel(Y_LABEL, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    _legend_below(axes, unique.values(), unique.keys())


def _levels(report: PickReport) -> list[tuple[float, str, str]]:
    """Retain scores to compare with: the base's, and the least that the bound allows."""
    base = report.candidates.base.plain["retain_rougeL"].value
    found = [(base, f"base model, {base:.3f}", ":")]
    bound = report.choice.bounds.retain_drop
    if bound is not None:
        found.append((base - bound, f"retain drop {bound:g}", "--"))
    return found


def _legend_below(axes: Any, *handles_and_labels: Any) -> None:
    axes.legend(
        *handles_and_labels,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=3,
        frameon=False,
    )


def _draw_attacks(axes: Any, report: PickReport) -> None:
    lines = _lines(report)
    for kind, name, label, marker, _, colour in ATTACKS:
        found = [(_shown(scored, kind, name), y) for y, (_, scored, _) in enumerate(lines)]
        points = [(score.value, y) for score, y in found if score is not None]
        if points:
            n = next(score.n for score, _ in found if score is not None)
            axes.scatter(*zip(*points, strict=True), 42, colour, marker, label=f"{label}, n = {n}")
    axes.set_yticks(range(len(lines)), [name for name, _, _ in lines])
    for text, (_, _, chosen) in zip(axes.get_yticklabels(), lines, strict=True):
        if chosen:
            text.set_color(FRONT)
            text.set_weight("bold")
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel(LEFT_LABEL, color=INK)
    _legend_below(axes)


def plotly_figure(report: PickReport) -> dict[str, Any]:
    """The interactive picture as plotly's JSON; hovering a point shows its setting and scores."""
    data = [*_plotly_front(report), *_plotly_attacks(report)]
    axis = {"gridcolor": "#e6e9ed", "zeroline": False, "linecolor": INK, "ticks": "outside"}
    lines = _lines(report)
    names = [name for name, _, _ in lines]
    shapes = [
        {
            "type": "line",
            "xref": "x domain",
            "x0": 0,
            "x1": 1,
            "y0": y,
            "y1": y,
            "line": {"color": INK, "width": 1, "dash": "dot" if style == ":" else "dash"},
            "label": {"text": label, "textposition": "start", "font": {"size": 11}},
        }
        for y, label, style in _levels(report)
    ]
    layout = {
        "title": {
            "text": f"{escape(report.backbone)}: trial {report.choice.chosen.trial_id} of "
            f"{len(names) - 1} on the front",
            "subtitle": {"text": escape(f"by {report.choice}; held-out questions")},
            "x": 0.02,
            "xanchor": "left",
        },
        "xaxis": {**axis, "title": {"text": X_LABEL}, "domain": [0, 0.46]},
        "yaxis": {**axis, "title": {"text": Y_LABEL}},
        "xaxis2": {
            **axis,
            "title": {"text": LEFT_LABEL},
            "domain": [0.56, 1],
            "range": [-0.04, 1.04],
            "anchor": "y2",
        },
        "yaxis2": {
            **axis,
            "anchor": "x2",
            "type": "category",
            "categoryorder": "array",
            "categoryarray": names,
            "tickvals": names,
            "ticktext": [f"<b>{name}</b>" if chosen else name for name, _, chosen in lines],
        },
        "shapes": shapes,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left"},
        "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"color": INK}},
        "margin": {"l": 70, "r": 30, "t": 80, "b": 60},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
    }
    return {"data": data, "layout": layout}


def _plotly_front(report: PickReport) -> Iterator[dict[str, Any]]:
    for chosen, name in ((False, "on the front"), (True, "chosen")):
        rows = [row for row in report.rows() if (row[0] is report.choice.chosen) == chosen]
        colour = FRONT if chosen else TRIAL
        forget = [scored.plain["forget_rougeL"] for _, _, scored in rows]
        retain = [scored.plain["retain_rougeL"] for _, _, scored in rows]
        yield {
            "type": "scatter",
            "mode": "markers+text",
            "name": name,
            "x": [marks.reduction.value for marks, _, _ in rows],
            "y": [marks.retain.value for marks, _, _ in rows],
            "text": [marks.trial_id for marks, _, _ in rows],
            "textposition": "top right",
            "cliponaxis": False,
            "textfont": {"size": 11, "color": colour},
            "error_x": _bars(
                [s.value - s.low for s in forget], [s.high - s.value for s in forget], colour
            ),
            "error_y": _bars(
                [s.high - s.value for s in retain], [s.value - s.low for s in retain], colour
            ),
            "marker": {"size": 13 if chosen else 9, "color": colour},
            "hovertext": [_hover(report, *row) for row in rows],
            "hoverinfo": "text",
        }


def _plotly_attacks(report: PickReport) -> Iterator[dict[str, Any]]:
    for kind, name, label, _, symbol, colour in ATTACKS:
        found = [(line, _shown(scored, kind, name)) for line, scored, _ in _lines(report)]
        points = [(line, score) for line, score in found if score is not None]
        if points:
            yield {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "xaxis": "x2",
                "yaxis": "y2",
                "x": [score.value for _, score in points],
                "y": [line for line, _ in points],
                "marker": {"symbol": symbol, "size": 10, "color": colour},
                "hovertext": [
                    f"<b>{line}</b>, {label}<br>{interval_text(score)}, n = {score.n}"
                    for line, score in points
                ],
                "hoverinfo": "text",
            }


def _bars(up: list[float], down: list[float], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "thickness": 1,
        "width": 3,
        "color": colour,
    }


def _hover(report: PickReport, marks: Marks, setting: str, scored: Scored) -> str:
    trial, _ = report.candidates.of(marks.trial_id)
    config = trial.config
    source = config.used.get("response_source")
    lines = [
        f"<b>trial {marks.trial_id}</b>",
        escape(setting),
        f"rank {config.lora_rank} · {config.epochs} epochs"
        + ("" if source is None else f" · {source} responses"),
    ]
    for kind, name, label, *_ in ATTACKS:
        score = _shown(scored, kind, name)
        if score is not None:
            lines.append(f"forget, {label}: {interval_text(score)}")
    retain = scored.plain["retain_rougeL"]
    lines += [f"retain: {interval_text(retain)}", escape(report.choice.why[marks.trial_id])]
    return "<br>".join(lines)
