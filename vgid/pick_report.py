"""Why this trial: the table, the picture (PNG and interactive) and the numbers of a pick.

The picture shows on the left what each candidate forgets and keeps, with its intervals, and on the
right what is still answered of what was to be forgotten, by attack. matplotlib, plotly and rich
are imported when something is drawn.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgid.candidates import Candidates, Scored
from vgid.outputs import as_text, describe, write_atomically
from vgid.picking import Choice, Marks
from vgid.plotly_page import write_page
from vgid.plots import BASE, FRONT, HELD_OUT, INK, TRIAL
from vgid.results import Score

if TYPE_CHECKING:
    from rich.table import Table

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

KEY_SCORES = (
    "forget_rougeL",
    "retain_rougeL",
    "test_rougeL",
    "forget_cloze",
    "test_cloze",
    "retain_cloze",
    "forget_memorisation",
    "forget_refusal",
    "forget_rougeL_text",
    "test_rougeL_text",
)
"""Columns of ``candidates.csv``; the deployment file has every score of the choice."""


@dataclass(frozen=True)
class PickReport:
    """What is told of a pick.

    Attributes:
        backbone: name.
        study_id: the study.
        candidates: the front and its scores.
        choice: what was chosen.
    """

    backbone: str
    study_id: str
    candidates: Candidates
    choice: Choice

    @property
    def chosen(self) -> Scored:
        """Scores of the choice."""
        return self.candidates.of(self.choice.chosen.trial_id)[1]

    @property
    def setting(self) -> str:
        """The choice's setting in a line."""
        return describe(self.candidates.of(self.choice.chosen.trial_id)[0].config)

    def rows(self) -> Iterator[tuple[Marks, str, Scored]]:
        """Marks, setting and scores of every candidate, the choice first."""
        for marks in self.choice.order:
            trial, scored = self.candidates.of(marks.trial_id)
            yield marks, describe(trial.config), scored

    @property
    def sentences(self) -> list[str]:
        """The result, how sure it is, and what to think of numbers that were chosen by."""
        base, chosen = self.candidates.base.plain, self.chosen
        forget, retain = chosen.plain["forget_rougeL"], chosen.plain["retain_rougeL"]
        count, seeds = len(self.choice.order), len(self.candidates.seeds)
        told = [
            f"{self.backbone}: trial {self.choice.chosen.trial_id} ({self.setting}), by rule "
            f"{self.choice}.",
            f"On held-out questions forget ROUGE-L goes from {base['forget_rougeL'].value:.3f} to "
            f"{_interval(forget)}, n = {forget.n}, and retain ROUGE-L from "
            f"{base['retain_rougeL'].value:.3f} to {_interval(retain)}, n = {retain.n}; under the "
            f"reverse prompt forget ROUGE-L is "
            f"{_interval(chosen.reverse['forget_rougeL'])}.",
        ]
        unsure = [
            f"{check.name} up to {check.measure.worst:.3f} where {check.bound:g} is allowed"
            for check in self.choice.bounds.checks(self.choice.chosen)
            if not check.surely
        ]
        if unsure:
            told.append(
                f"Bounds are judged by means; the 95 % intervals reach past them: "
                f"{', '.join(unsure)}."
            )
        chance = (
            f"It is the best of {count} on the very questions that it is scored on, so expect "
            "slightly less on others; "
            if count > 1
            else ""
        )
        told.append(
            f"{chance}{'values' if chance else 'Values'} are means over {seeds} seeds of few-shot "
            "people, test poses and bootstrap, intervals the envelope of theirs. Suppressed under "
            "these tests is not erased."
        )
        return told


def report_table(report: PickReport) -> "Table":
    """The choice and the runners-up with why not, as a table for a terminal."""
    from rich.table import Table

    table = Table(title=f"Candidates on {report.backbone}, held-out", title_justify="left")
    table.add_column("trial")
    table.add_column("setting")
    for title in ("forget", "reversed", "test", "cloze", "retain"):
        table.add_column(title, justify="right")
    table.add_column("why")
    base = report.candidates.base
    for marks, setting, scored in report.rows():
        chosen = marks is report.choice.chosen
        table.add_row(
            marks.trial_id,
            setting,
            *_cells(scored),
            report.choice.why[marks.trial_id],
            style="bold" if chosen else None,
        )
    table.add_section()
    table.add_row("base", "", *_cells(base), "", style="dim")
    return table


def _cells(scored: Scored) -> list[str]:
    plain = scored.plain
    cells: list[Score | None] = [
        plain["forget_rougeL"],
        scored.reverse["forget_rougeL"],
        plain.get("test_rougeL"),
        plain.get("forget_cloze"),
        plain["retain_rougeL"],
    ]
    return ["" if score is None else f"{score.value:.3f}" for score in cells]


def write_report(folder: Path, report: PickReport) -> None:
    """Write ``pick.png``, ``pick.html`` and ``candidates.csv``.

    Raises:
        InputError: a file cannot be written.
    """
    write_atomically(folder / "candidates.csv", _csv(report))
    write_atomically(folder / "pick.png", _png(report))
    write_page(
        folder / "pick.html",
        f"Pick of {report.backbone}",
        plotly_figure(report),
        style=STYLE,
        body=f'<div id="pick"></div>{html_table(report)}{paragraphs(report)}',
        script='  Plotly.newPlot("pick", payload.data, payload.layout, options);',
    )


def _csv(report: PickReport) -> bytes:
    models: list[tuple[str, str, Marks | None, Scored]]
    models = [("base", "", None, report.candidates.base)]
    models += [(m.trial_id, s, m, scored) for m, s, scored in report.rows()]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    scores = [(kind, name) for kind in ("", "reverse_") for name in KEY_SCORES]
    marks = ("reduction", "retain_drop", "reverse_rise")
    writer.writerow(
        [
            "model",
            "chosen",
            "within_bounds",
            "setting",
            *(f"{name}{part}" for name in marks for part in ("", "_worst")),
            *(f"{kind}{name}{p}" for kind, name in scores for p in ("", "_low", "_high", "_n")),
        ]
    )
    for model, setting, judged, scored in models:
        row: list[Any] = [model, None, None, setting]
        if judged is not None:
            row[1:3] = [judged is report.choice.chosen, report.choice.bounds.keeps(judged)]
        for name in marks:
            row += [None, None] if judged is None else list(getattr(judged, name))
        for kind, name in scores:
            score = (scored.reverse if kind else scored.plain).get(name)
            row += four_cells(score)
        writer.writerow([as_text(value) for value in row])
    return text.getvalue().encode()


def four_cells(score: Score | None) -> list[Any]:
    """Value, low, high and n for a CSV file, empty where there is no score."""
    return [None] * 4 if score is None else [score.value, score.low, score.high, score.n]


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
    base = report.candidates.base.plain["retain_rougeL"].value
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
    axes.scatter(0, base, 170, BASE, "*", label="base model", zorder=5, linewidths=0)
    bound = report.choice.bounds.retain_drop
    if bound is not None:
        label = f"retain drop {bound:g}"
        axes.axhline(base - bound, color=INK, linewidth=1, linestyle="--", label=label)
    axes.set_xlabel(X_LABEL, color=INK)
    axes.set_ylabel(Y_LABEL, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, loc="lower left", frameon=False)


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
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def plotly_figure(report: PickReport) -> dict[str, Any]:
    """The interactive picture as plotly's JSON; hovering a point shows its setting and scores."""
    data = [*_plotly_front(report), *_plotly_attacks(report)]
    base = report.candidates.base.plain["retain_rougeL"].value
    axis = {"gridcolor": "#e6e9ed", "zeroline": False, "linecolor": INK, "ticks": "outside"}
    names = [name for name, _, _ in _lines(report)]
    shapes = []
    if report.choice.bounds.retain_drop is not None:
        y = base - report.choice.bounds.retain_drop
        line = {"color": INK, "width": 1, "dash": "dash"}
        shapes.append(
            {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}
        )
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
    base = report.candidates.base.plain["retain_rougeL"].value
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
    yield {
        "type": "scatter",
        "mode": "markers",
        "name": "base model",
        "x": [0],
        "y": [base],
        "marker": {"symbol": "star", "size": 16, "color": BASE},
        "hovertext": [f"<b>base model</b><br>retain ROUGE-L {base:.3f}"],
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
                    f"<b>{line}</b>, {label}<br>{_interval(score)}, n = {score.n}"
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
            lines.append(f"forget, {label}: {_interval(score)}")
    retain = scored.plain["retain_rougeL"]
    lines += [f"retain: {_interval(retain)}", escape(report.choice.why[marks.trial_id])]
    return "<br>".join(lines)


STYLE = """#pick { flex: none; height: 520px; }
table { border-collapse: collapse; margin: 4px 24px 12px; }
th, td { padding: 4px 10px; border-bottom: 1px solid #e6e9ed; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.chosen { font-weight: 600; color: #d1495b; }
p { margin: 0 24px 8px; max-width: 64em; line-height: 1.45; }"""


def html_table(report: PickReport) -> str:
    """The same table as ``report_table`` for a page."""
    head = ["trial", "setting", "forget", "reversed", "test", "cloze", "retain", "why"]
    kinds = ["", "", *["number"] * 5, ""]
    rows = [("tr", head, "th")]
    for marks, setting, scored in report.rows():
        mark = 'tr class="chosen"' if marks is report.choice.chosen else "tr"
        why = report.choice.why[marks.trial_id]
        rows.append((mark, [marks.trial_id, setting, *_cells(scored), why], "td"))
    rows.append(("tr", ["base", "", *_cells(report.candidates.base), ""], "td"))
    lines = []
    for mark, cells, tag in rows:
        inner = "".join(
            f'<{tag} class="{kind}">{escape(cell)}</{tag}>'
            for cell, kind in zip(cells, kinds, strict=True)
        )
        lines.append(f"<{mark}>{inner}</tr>")
    return f"<table>{''.join(lines)}</table>"


def paragraphs(report: PickReport) -> str:
    """The sentences for a page."""
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in report.sentences)


def _interval(score: Score) -> str:
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
