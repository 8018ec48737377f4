"""The page of a study, ``study.html``: all that it found, without network access.

From the top: the result and warnings, the front, how the hypervolume grew, what made the
difference, health checks, and all candidates as a table. Hovering over a point of the front shows a
candidate's setting and scores. A click keeps them below the picture and links to the trial's run on
the tracking server; MLflow's artifact viewer lets no page open another, so there the click copies
the run's address instead.
"""

from pathlib import Path
from typing import Any

from vgid.report.drawing import FRONT, Panel, Picture, Scale, Series
from vgid.report.front import LABELS, Front, corner, label, page_picture, write_png
from vgid.report.health import CHECKED, health, warnings
from vgid.report.insights import importances, insights
from vgid.report.page import rendered, write_page
from vgid.report.records import TrialRecord, describe
from vgid.report.result import result
from vgid.report.tables import Grid

FIGURES = ("study.html", "front.png")

_STYLE = Path(__file__).with_name("study.css").read_text(encoding="utf-8").rstrip()


def write_figures(folder: Path, front: Front) -> None:
    """Write ``FIGURES`` of a study."""
    write_png(folder / "front.png", front)
    write_study_page(folder / "study.html", front)


def write_study_page(path: Path, front: Front) -> None:
    """Write ``study.html``."""
    shares = importances(front.trials)
    pictures = {"front": page_picture(front)}
    # One trial has not grown, and differs from none.
    if len(front.growth) > 1 and front.growth[-1][1]:
        pictures["growth"] = growth_picture(front)
    if len(front.trials) > 1:
        pictures["insights"] = insights(front, shares)
    near = corner(front)
    body = rendered(
        "vgid.report",
        "study.html.jinja",
        front=front,
        warnings=warnings(front),
        result=result(front),
        pictures=pictures,
        findings=health(front, shares),
        checked=CHECKED,
        table=candidates(front).html(),
    )
    payload = {
        "pages": front.pages,
        "server": front.server,
        "near": {"xaxis.range": near.ends("x"), "yaxis.range": near.ends("y")},
    }
    script = rendered("vgid.report", "study.js")
    write_page(path, front.title, pictures, payload, body=body, style=_STYLE, script=script)


def growth_picture(front: Front) -> Picture:
    """The hypervolume after each trial that ended, over trials and over seconds."""
    seconds, volumes = zip(*front.growth, strict=True)
    scales = {
        "Trials that have ended": range(1, len(volumes) + 1),
        "Seconds since the study's start": seconds,
    }
    panels = []
    for number, (axis, ends) in enumerate(scales.items()):
        x: list[float] = []
        y: list[float] = []
        hover: list[str] = []
        for trials, (end, volume) in enumerate(zip(ends, volumes, strict=True), 1):
            # To the right first: what a trial adds is there once it has ended.
            x += [end, end]
            y += [y[-1] if y else volume, volume]
            hover += 2 * [
                f"{trials} trials, {seconds[trials - 1]:,.0f} s\nhypervolume {volume:.4f}"
            ]
        line = Series("hypervolume", x, y, FRONT, "", line=2, hover=hover, listed=False)
        title = "" if number else "Hypervolume above the reference point"
        panels.append(Panel(Scale(axis), Scale(), [line], title))
    return Picture("", panels)


def candidates(front: Front) -> Grid:
    """Every candidate, the front first and from most to least forgotten, which stands out."""
    records = [*reversed(front.front), *(r for r in front.records if not r.on_front)]
    names = dict.fromkeys([*(name for record in records for name in record.objectives), *LABELS])
    columns: dict[str, list[Any]] = {}
    for name in names:
        columns[label(name)] = [record.result.metrics.get(name) for record in records]
    for name in names:
        scores = [(record.held_out or {}).get(name) for record in records]
        columns[f"held-out {label(name)}"] = scores
    shown = {head: cells for head, cells in columns.items() if any(c is not None for c in cells)}
    rows = [
        [record.result.trial_id, _state(record), describe(record.config), *cells]
        for record, *cells in zip(records, *shown.values(), strict=True)
    ]
    header = ("trial", "state", "setting", *shown)
    return Grid(header, rows, marks=dict.fromkeys(range(len(front.front)), "chosen"))


def _state(record: TrialRecord) -> str:
    if record.on_front:
        return "front"
    if record.result.status == "pruned":
        return "stopped early"
    if record.point is None:
        return record.result.status
    return "dominated" if record.feasible else "out of bounds"
