"""Several backbones' deployments on one page: ``comparison.html``, ``comparison.png`` and a table.

Backbones start from different scores, so the picture shows shares: how much of the base's forget
ROUGE-L is gone, and how much of its retain ROUGE-L is kept.
"""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vgid.deployment.pick_pictures import STYLE
from vgid.deployment.pick_report import (
    Column,
    PickReport,
    columns,
    html_table,
    paragraphs,
    shown_score,
)
from vgid.files import write_atomically
from vgid.report.page import write_page
from vgid.report.plots import BASE, INK
from vgid.report.tables import FOUR_PARTS, Grid, four_cells

COMPARISON = ("comparison.html", "comparison.png", "comparison.csv")

X_LABEL = "Share of the base's forget ROUGE-L that is gone"
Y_LABEL = "Share of the base's retain ROUGE-L that is kept"
COLOURS = ("#1f6f8b", "#d1495b", "#e9a23b", "#7b5ea7", "#3b8f5c")


def comparison_grid(reports: Sequence[PickReport]) -> Grid:
    """Every backbone's choice, base to deployed."""
    shown = columns(reports)
    return Grid(
        ("backbone", "trial", "setting", *(label for _, _, label in shown), "of front"),
        [_row(report, shown) for report in reports],
        "Deployments, base to deployed, held-out",
    )


def write_comparison(folder: Path, reports: Sequence[PickReport]) -> None:
    """Write the page, the picture and the table.

    Raises:
        InputError: a file cannot be written.
    """
    page, picture, table = (folder / name for name in COMPARISON)
    write_atomically(table, _csv(reports))
    write_atomically(picture, _png(reports))
    sections = [
        f"<h2>{escape(report.backbone)}</h2>{html_table(report)}{paragraphs(report)}"
        for report in reports
    ]
    write_page(
        page,
        "Deployments by backbone",
        plotly_figure(reports),
        style=f"{STYLE}\nh2 {{ font-size: 16px; margin: 16px 24px 4px; }}",
        body=f'<div id="pick"></div>{comparison_grid(reports).html()}{"".join(sections)}',
        script='  Plotly.newPlot("pick", payload.data, payload.layout, options);',
    )


def shares(report: PickReport) -> list[tuple[str, float, float]]:
    """Trial id, share forgotten and share kept of each candidate, the choice first."""
    base = report.candidates.base.plain
    forget, retain = base["forget_rougeL"].value, base["retain_rougeL"].value
    return [
        (marks.trial_id, _share(marks.reduction.value, forget), _share(marks.retain.value, retain))
        for marks in report.choice.order
    ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _row(report: PickReport, shown: Sequence[Column]) -> list[str | int]:
    base, chosen = report.candidates.base, report.chosen
    cells = []
    for column in shown:
        pair = [shown_score(model, column) for model in (base, chosen)]
        known = [f"{score.value:.3f}" for score in pair if score is not None]
        cells.append(" → ".join(known))
    count = len(report.choice.order)
    return [report.backbone, report.choice.chosen.trial_id, report.setting, *cells, count]


def _csv(reports: Sequence[PickReport]) -> bytes:
    shown = columns(reports)
    titles = [
        f"{model}_{label}{part}"
        for _, _, label in shown
        for model in ("base", "deployed")
        for part in FOUR_PARTS
    ]
    rows = []
    for report in reports:
        row: list[Any] = [
            report.backbone,
            report.study_id,
            report.choice.chosen.trial_id,
            str(report.choice),
            report.setting,
            len(report.choice.order),
        ]
        for column in shown:
            for model in (report.candidates.base, report.chosen):
                row += four_cells(shown_score(model, column))
        rows.append(row)
    header = ["backbone", "study_id", "trial_id", "rule", "setting", "candidates", *titles]
    return Grid(header, rows).csv()


def _png(reports: Sequence[PickReport]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    axes = figure.subplots()
    axes.grid(color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    for number, report in enumerate(reports):
        colour = COLOURS[number % len(COLOURS)]
        (_, x, y), *others = shares(report)
        if others:
            axes.scatter(
                [x for _, x, _ in others], [y for _, _, y in others], s=26, c=colour, alpha=0.45
            )
        trial = report.choice.chosen.trial_id
        axes.scatter(x, y, s=110, c=colour, label=f"{report.backbone}, trial {trial}", zorder=4)
    axes.scatter(0, 1, s=170, c=BASE, marker="*", label="every base model", zorder=5, linewidths=0)
    axes.set_xlabel(X_LABEL, color=INK)
    axes.set_ylabel(Y_LABEL, color=INK)
    axes.legend(fontsize=8.5, loc="best", frameon=False)
    figure.suptitle("Deployments (large) among their fronts, held-out", fontsize=12, color=BASE)
    image = io.BytesIO()
    canvas.print_png(image, metadata={"Software": None})
    return image.getvalue()


def plotly_figure(reports: Sequence[PickReport]) -> dict[str, Any]:
    """The interactive picture as plotly's JSON."""
    data: list[dict[str, Any]] = []
    for number, report in enumerate(reports):
        colour = COLOURS[number % len(COLOURS)]
        settings = {marks.trial_id: setting for marks, setting, _ in report.rows()}
        found = shares(report)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": report.backbone,
                "x": [x for _, x, _ in found],
                "y": [y for _, _, y in found],
                "marker": {
                    "color": colour,
                    "size": [16, *[8] * (len(found) - 1)],
                    "opacity": [1.0, *[0.5] * (len(found) - 1)],
                },
                "hovertext": [
                    f"<b>{escape(report.backbone)}, trial {trial}</b><br>"
                    f"{escape(settings[trial])}<br>forgotten {x:.1%}, kept {y:.1%}<br>"
                    f"{escape(report.choice.why[trial])}"
                    for trial, x, y in found
                ],
                "hoverinfo": "text",
            }
        )
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "every base model",
            "x": [0],
            "y": [1],
            "marker": {"symbol": "star", "size": 16, "color": BASE},
            "hoverinfo": "name",
        }
    )
    axis = {"gridcolor": "#e6e9ed", "zeroline": False, "linecolor": INK, "ticks": "outside"}
    layout = {
        "title": {
            "text": "Deployments by backbone",
            "subtitle": {"text": "large: the deployment; small: the others of its front; held-out"},
            "x": 0.02,
            "xanchor": "left",
        },
        "xaxis": {**axis, "title": {"text": X_LABEL}, "tickformat": ".0%"},
        "yaxis": {**axis, "title": {"text": Y_LABEL}, "tickformat": ".0%"},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"color": INK}},
        "margin": {"l": 70, "r": 30, "t": 80, "b": 60},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
    }
    return {"data": data, "layout": layout}
