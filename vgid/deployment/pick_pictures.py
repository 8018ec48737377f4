"""The picture of a pick, ``pick.png`` and ``pick.html``, and what lies beside it.

On the left what each candidate forgets and keeps, with its intervals; on the right what is still
answered of what was to be forgotten, by attack.
"""

from collections.abc import Mapping
from pathlib import Path

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
from vgid.report.drawing import FRONT, HELD_OUT, INK, TRIAL, Panel, Picture, Scale, Series
from vgid.report.front import setting_lines
from vgid.report.page import write_page
from vgid.results import Score

X_LABEL = "Reduction of forget ROUGE-L (higher: more is forgotten)"
Y_LABEL = "Retain ROUGE-L (higher: more is kept)"
LEFT_LABEL = "Score on what was to be forgotten (lower: less is left)"

ATTACKS = (
    ("plain", "forget_rougeL", "as asked", "circle", HELD_OUT),
    ("reverse", "forget_rougeL", "reverse prompt", "triangle-right", FRONT),
    ("plain", "test_rougeL", "new portraits and wording", "square", "#e9a23b"),
    ("plain", "forget_rougeL_text", "by name, without image", "triangle-up", "#7b5ea7"),
    ("plain", "forget_cloze", "cloze (accuracy)", "diamond", TRIAL),
)
"""Rows of the right picture: questions, score, label, mark, colour."""

STYLE = """.picture { flex: none; height: 520px; }
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
    picture = pick_picture(report)
    write_atomically(folder / "candidates.csv", candidates_csv(report))
    write_atomically(folder / "pick.png", picture.png())
    below = f"{html_table(report)}{paragraphs(report)}"
    write_page(folder / "pick.html", picture, style=STYLE, body=below)


def pick_picture(report: PickReport) -> Picture:
    """The picture of a pick; hovering a point shows its setting and scores."""
    chosen, count = report.choice.chosen.trial_id, len(report.choice.order)
    lines = [(marks.trial_id, scored) for marks, _, scored in report.rows()]
    lines.append(("base", report.candidates.base))
    names = [(place, name) for place, (name, _) in enumerate(lines)]
    left = Panel(
        Scale(X_LABEL),
        Scale(Y_LABEL),
        [*_levels(report), *(_candidates(report, chosen) for chosen in (False, True))],
        "What is forgotten and kept",
    )
    right = Panel(
        Scale(LEFT_LABEL, range=(-0.04, 1.04)),
        Scale(range=(count + 0.6, -0.6), ticks=names, marked=chosen),
        [series for attack in ATTACKS for series in _attack(lines, *attack)],
        "What is left to attacks",
    )
    return Picture(
        f"{report.backbone}: trial {chosen} of {count} on the front",
        [left, right],
        f"by {report.choice}, on held-out questions",
        size=(12, 4.9 + 0.22 * max(0, count - 6)),
    )


def _candidates(report: PickReport, chosen: bool) -> Series:
    """The choice, or the others of the front, with intervals and ids."""
    rows = [row for row in report.rows() if (row[0] is report.choice.chosen) == chosen]
    x_bounds, y_bounds = [], []
    for marks, _, scored in rows:
        forget, retain = scored.plain["forget_rougeL"], scored.plain["retain_rougeL"]
        start = marks.reduction.value + forget.value
        x_bounds.append((start - forget.high, start - forget.low))
        y_bounds.append((retain.low, retain.high))
    return Series(
        "chosen" if chosen else "on the front",
        [marks.reduction.value for marks, _, _ in rows],
        [marks.retain.value for marks, _, _ in rows],
        FRONT if chosen else TRIAL,
        size=13 if chosen else 9,
        x_bounds=x_bounds,
        y_bounds=y_bounds,
        hover=[_hover(report, marks, scored) for marks, _, scored in rows],
        labels=[marks.trial_id for marks, _, _ in rows],
        listed=bool(rows),
    )


def _levels(report: PickReport) -> list[Series]:
    """Retain scores to compare with: the base's, and the least that the bound allows."""
    base = report.candidates.base.plain["retain_rougeL"].value
    found = [(base, f"base model, {base:.3f}", True)]
    bound = report.choice.bounds.retain_drop
    if bound is not None:
        found.append((base - bound, f"retain drop {bound:g}", False))
    places = [marks.reduction.value for marks in report.choice.order]
    x = [min(places) - 0.05, max(places) + 0.05]
    return [
        Series(name, x, [y, y], INK, "", line=1, dotted=dotted, hover=[name] * 2)
        for y, name, dotted in found
    ]


def _attack(
    lines: list[tuple[str, Scored]], kind: str, name: str, label: str, mark: str, colour: str
) -> list[Series]:
    """What one attack still gets out of each model, from top to bottom."""
    found = [(y, line, _score(scored, kind, name)) for y, (line, scored) in enumerate(lines)]
    points = [(y, line, score) for y, line, score in found if score is not None]
    if not points:
        return []
    told = [f"{line}, {label}\n{interval_text(s)}, n = {s.n}" for _, line, s in points]
    x, y = [score.value for _, _, score in points], [place for place, _, _ in points]
    return [Series(f"{label}, n = {points[0][2].n}", x, y, colour, mark, 10, hover=told)]


def _score(scored: Scored, kind: str, name: str) -> Score | None:
    scores: Mapping[str, Score] = getattr(scored, kind)
    return scores.get(name)


def _hover(report: PickReport, marks: Marks, scored: Scored) -> str:
    trial, _ = report.candidates.of(marks.trial_id)
    lines = [f"trial {marks.trial_id}", *setting_lines(trial.config)]
    for kind, name, label, *_ in ATTACKS:
        score = _score(scored, kind, name)
        if score is not None:
            lines.append(f"forget, {label}: {interval_text(score)}")
    retain = scored.plain["retain_rougeL"]
    return "\n".join(
        [*lines, f"retain: {interval_text(retain)}", report.choice.why[marks.trial_id]]
    )
