"""Several backbones' deployments on one page: ``comparison.html``, ``comparison.png`` and a table.

Backbones start from different scores, so the picture shows shares: how much of the base's forget
ROUGE-L is gone, and how much of its retain ROUGE-L is kept.
"""

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
from vgid.report.drawing import BASE, Panel, Picture, Scale, Series
from vgid.report.page import write_page
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
    drawn = comparison_picture(reports)
    page, picture, table = (folder / name for name in COMPARISON)
    write_atomically(table, _csv(reports))
    write_atomically(picture, drawn.png())
    sections = [
        f"<h2>{escape(report.backbone)}</h2>{html_table(report)}{paragraphs(report)}"
        for report in reports
    ]
    write_page(
        page,
        drawn,
        style=f"{STYLE}\nh2 {{ font-size: 16px; margin: 16px 24px 4px; }}",
        body=f"{comparison_grid(reports).html()}{''.join(sections)}",
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


def comparison_picture(reports: Sequence[PickReport]) -> Picture:
    """Each backbone's front, its deployment large."""
    drawn = []
    for number, report in enumerate(reports):
        settings = {marks.trial_id: setting for marks, setting, _ in report.rows()}
        deployed, *others = shares(report)
        for rows, size, opacity in ((others, 8, 0.5), ([deployed], 16, 1.0)):
            drawn.append(
                Series(
                    f"{report.backbone}, trial {deployed[0]}",
                    [x for _, x, _ in rows],
                    [y for _, _, y in rows],
                    COLOURS[number % len(COLOURS)],
                    size=size,
                    opacity=opacity,
                    hover=[
                        f"{report.backbone}, trial {trial}\n{settings[trial]}\n"
                        f"forgotten {x:.1%}, kept {y:.1%}\n{report.choice.why[trial]}"
                        for trial, x, y in rows
                    ],
                    listed=rows == [deployed],
                )
            )
    drawn.append(Series("every base model", [0], [1], BASE, "star", 18, hover=["every base model"]))
    return Picture(
        "Deployments by backbone",
        [Panel(Scale(X_LABEL, percent=True), Scale(Y_LABEL, percent=True), drawn)],
        "large: the deployment; small: the others of its front; held-out",
    )
