"""Why this trial, for people: what a pick and a comparison of backbones show.

``pick.html`` and ``pick.png`` show on the left what each candidate forgets and keeps, with its
intervals, and on the right what is still answered of what was to be forgotten, by attack; sentences
and the table stand below, and ``candidates.csv`` has the scores. Several backbones' deployments
stand on one page, ``comparison.html``. Backbones start from different scores, so its picture shows
shares: how much of the base's forget ROUGE-L is gone, and of its retain ROUGE-L kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vgid.deployment.rules import Choice, Marks
from vgid.deployment.scores import Scored
from vgid.evaluation.suppression import verdict
from vgid.files import write_atomically
from vgid.report.drawing import BASE, FRONT, HELD_OUT, INK, TRIAL, Panel, Picture, Scale, Series
from vgid.report.front import setting_lines
from vgid.report.page import rendered, write_picture
from vgid.report.records import describe
from vgid.report.tables import FOUR_PARTS, Grid, four_cells
from vgid.study.finished import Trial

KEY_SCORES = (
    "forget_rougeL", "retain_rougeL", "test_rougeL", "forget_cloze", "test_cloze", "retain_cloze",
    "celebrity_rougeL", "celebrity_cloze", "forget_memorisation", "forget_refusal",
    "forget_rougeL_text", "test_rougeL_text",
    "forget_rougeL_raw", "test_rougeL_raw", "retain_rougeL_raw", "forget_refusal_raw",
    "retain_refusal", "retain_refusal_raw",
)  # fmt: skip
"""Columns of ``candidates.csv``; the deployment file has every score of the choice."""

COLUMNS = (
    ("plain", "forget_rougeL", "forget"),
    ("reverse", "forget_rougeL", "reversed"),
    ("plain", "test_rougeL", "test"),
    ("plain", "forget_cloze", "cloze"),
    ("plain", "retain_rougeL", "retain"),
    ("plain", "celebrity_rougeL", "celebrities"),
)
"""What a table shows of a model: how it was asked, the score, and what the column is called."""

ATTACKS = (
    ("plain", "forget_rougeL", "as asked", "circle", HELD_OUT),
    ("reverse", "forget_rougeL", "reverse prompt", "triangle-right", FRONT),
    ("plain", "test_rougeL", "new portraits and wording", "square", "#e9a23b"),
    ("plain", "forget_rougeL_text", "by name, without image", "triangle-up", "#7b5ea7"),
    ("plain", "forget_cloze", "cloze (accuracy)", "diamond", TRIAL),
)
"""Rows of the right picture: questions, score, label, mark, colour."""

COMPARISON = ("comparison.html", "comparison.png", "comparison.csv")
COLOURS = ("#1f6f8b", "#d1495b", "#e9a23b", "#7b5ea7", "#3b8f5c")

STYLE = Path(__file__).with_name("pick.css").read_text(encoding="utf-8").rstrip()


@dataclass(frozen=True)
class PickReport:
    """What is told of a pick; ``warning`` is what it does to people of earlier requests, if any."""

    backbone: str
    study_id: str
    seeds: tuple[int, ...]
    base: Scored
    candidates: Mapping[str, tuple[Trial, Scored]]  # the front, by trial id
    choice: Choice
    warning: str | None = None

    @property
    def rows(self) -> list[tuple[Marks, Trial, Scored]]:
        """Every candidate, the choice first."""
        return [(marks, *self.candidates[marks.trial_id]) for marks in self.choice.order]

    @property
    def sentences(self) -> list[str]:
        """The result, how sure it is, and what to think of numbers that were chosen by."""
        base, (marks, trial, chosen) = self.base.plain, self.rows[0]
        text = rendered(
            "vgid.deployment",
            "pick.txt.jinja",
            backbone=self.backbone,
            trial=trial,
            setting=describe(trial.config),
            choice=self.choice,
            base=base,
            forget=chosen.plain["forget_rougeL"],
            retain=chosen.plain["retain_rougeL"],
            reverse=chosen.reverse,
            unsure=[check for check in self.choice.bounds.checks(marks) if not check.surely],
            warning=self.warning,
            count=len(self.choice.order),
            seeds=len(self.seeds),
            verdict=verdict(base, chosen.plain, chosen.reverse),
        )
        return text.splitlines()


def report_grid(report: PickReport) -> Grid:
    """The choice and the runners-up with why not, and the base; what is said stands below."""
    shown = _columns([report])

    def cells(scored: Scored) -> list[float | None]:
        found = (scored.get(kind, name) for kind, name, _ in shown)
        return [None if score is None else score.value for score in found]

    rows = [
        [trial.trial_id, describe(trial.config), *cells(scored), report.choice.why[trial.trial_id]]
        for _, trial, scored in report.rows
    ]
    return Grid(
        ("trial", "setting", *(title for *_, title in shown), "why"),
        [*rows, ["base", "", *cells(report.base), ""]],
        f"Candidates on {report.backbone}, held-out",
        report.sentences,
        marks={0: "chosen", len(rows): "base"},
    )


def _columns(reports: Sequence[PickReport]) -> list[tuple[str, str, str]]:
    """Those of ``COLUMNS`` that a base has; data without celebrities lacks theirs."""
    return [
        (kind, name, title)
        for kind, name, title in COLUMNS
        if name != "celebrity_rougeL" or any(name in r.base.plain for r in reports)
    ]


def _candidates_csv(report: PickReport) -> bytes:
    """The base, then each candidate with what the rules and people look at.

    ``_worst`` is the unfavourable end of an interval, ``reverse_`` the score under the reverse
    prompt; ``_low``, ``_high`` and ``_n`` as in ``front.csv``.
    """
    scores = [(kind, name) for kind in ("plain", "reverse") for name in KEY_SCORES]
    names = [("reverse_" if kind == "reverse" else "") + name for kind, name in scores]
    marks = ("reduction", "retain_drop", "reverse_rise")

    def cells(scored: Scored) -> list[float | None]:
        return [cell for column in scores for cell in four_cells(scored.get(*column))]

    rows: list[list[Any]] = [
        ["base", None, None, "", *[None] * 2 * len(marks), *cells(report.base)]
    ]
    for judged, trial, scored in report.rows:
        chosen, within = judged is report.choice.chosen, not report.choice.bounds.broken(judged)
        ends = [end for name in marks for end in getattr(judged, name)]
        rows.append([trial.trial_id, chosen, within, describe(trial.config), *ends, *cells(scored)])
    header = [
        *("model", "chosen", "within_bounds", "setting"),
        *(f"{name}{part}" for name in marks for part in ("", "_worst")),
        *(f"{name}{part}" for name in names for part in FOUR_PARTS),
    ]
    return Grid(header, rows).csv()


def write_report(folder: Path, report: PickReport) -> None:
    """Write ``pick.png``, ``pick.html`` and ``candidates.csv``."""
    write_atomically(folder / "candidates.csv", _candidates_csv(report))
    body = report_grid(report).html()
    write_picture(folder, "pick", pick_picture(report), style=STYLE, body=body)


def pick_picture(report: PickReport) -> Picture:
    """The picture of a pick; hovering a point shows its setting and scores."""
    chosen, count = report.choice.chosen.trial_id, len(report.choice.order)
    lines = [(trial.trial_id, scored) for _, trial, scored in report.rows]
    lines.append(("base", report.base))
    series = [_candidates(report, chosen) for chosen in (False, True)]
    ends = [end for one in series for bounds in one.x_bounds for end in bounds]
    reach = (min(ends) - 0.05, max(ends) + 0.05)
    left = Panel(
        Scale("Reduction of forget ROUGE-L (higher: more is forgotten)", range=reach),
        Scale("Retain ROUGE-L (higher: more is kept)"),
        [*_levels(report, reach), *series],
        "What is forgotten and kept",
    )
    names = [(place, name) for place, (name, _) in enumerate(lines)]
    right = Panel(
        Scale("Score on what was to be forgotten (lower: less is left)", range=(-0.04, 1.04)),
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
    rows = [row for row in report.rows if (row[0] is report.choice.chosen) == chosen]
    gone = [scored.plain["forget_rougeL_reduction"] for _, _, scored in rows]
    retain = [scored.plain["retain_rougeL"] for _, _, scored in rows]
    return Series(
        "chosen" if chosen else "on the front",
        [score.value for score in gone],
        [score.value for score in retain],
        FRONT if chosen else TRIAL,
        size=13 if chosen else 9,
        x_bounds=[(score.low, score.high) for score in gone],
        y_bounds=[(score.low, score.high) for score in retain],
        hover=[_hover(report, trial, scored) for _, trial, scored in rows],
        labels=[marks.trial_id for marks, _, _ in rows],
        listed=bool(rows),
    )


def _levels(report: PickReport, reach: tuple[float, float]) -> list[Series]:
    """Retain scores to compare with: the base's, and the least that the bound allows."""
    base = report.base.plain["retain_rougeL"].value
    found = [(base, f"base model, {base:.3f}", True)]
    bound = report.choice.bounds.retain_drop
    if bound is not None:
        found.append((base - bound, f"retain drop {bound:g}", False))
    return [
        Series(name, reach, [y, y], INK, "", line=1, dotted=dotted, hover=[name] * 2)
        for y, name, dotted in found
    ]


def _attack(
    lines: list[tuple[str, Scored]], kind: str, name: str, label: str, mark: str, colour: str
) -> list[Series]:
    """What one attack still gets out of each model, from top to bottom."""
    found = [(y, line, scored.get(kind, name)) for y, (line, scored) in enumerate(lines)]
    points = [(y, line, score) for y, line, score in found if score is not None]
    if not points:
        return []
    told = [f"{line}, {label}\n{score}, n = {score.n}" for _, line, score in points]
    x, y = [score.value for _, _, score in points], [place for place, _, _ in points]
    return [Series(f"{label}, n = {points[0][2].n}", x, y, colour, mark, 10, hover=told)]


def _hover(report: PickReport, trial: Trial, scored: Scored) -> str:
    attacks = [(label, scored.get(kind, name)) for kind, name, label, *_ in ATTACKS]
    return "\n".join(
        [
            f"trial {trial.trial_id}",
            *setting_lines(trial.config),
            *(f"forget, {label}: {score}" for label, score in attacks if score is not None),
            f"retain: {scored.plain['retain_rougeL']}",
            report.choice.why[trial.trial_id],
        ]
    )


def comparison_grid(reports: Sequence[PickReport]) -> Grid:
    """Every backbone's choice, base to deployed."""
    shown = _columns(reports)
    rows = []
    for report in reports:
        _, trial, chosen = report.rows[0]
        base = report.base
        pairs = [(base.get(kind, name), chosen.get(kind, name)) for kind, name, _ in shown]
        cells = [" → ".join(f"{s.value:.3f}" for s in pair if s is not None) for pair in pairs]
        setting = describe(trial.config)
        rows.append([report.backbone, trial.trial_id, setting, *cells, len(report.choice.order)])
    return Grid(
        ("backbone", "trial", "setting", *(label for _, _, label in shown), "of front"),
        rows,
        "Deployments, base to deployed, held-out",
    )


def write_comparison(folder: Path, reports: Sequence[PickReport]) -> None:
    """Write the page, the picture and the table, ``COMPARISON``."""
    write_atomically(folder / COMPARISON[2], _comparison_csv(reports))
    sections = (f"<h2>{escape(r.backbone)}</h2>{report_grid(r).html()}" for r in reports)
    body = comparison_grid(reports).html() + "".join(sections)
    write_picture(folder, "comparison", comparison_picture(reports), style=STYLE, body=body)


def _comparison_csv(reports: Sequence[PickReport]) -> bytes:
    shown = _columns(reports)
    rows = []
    for report in reports:
        _, trial, chosen = report.rows[0]
        row: list[Any] = [report.backbone, report.study_id, trial.trial_id, str(report.choice)]
        row += [describe(trial.config), len(report.choice.order)]
        for kind, name, _ in shown:
            for model in (report.base, chosen):
                row += four_cells(model.get(kind, name))
        rows.append(row)
    header = [
        *("backbone", "study_id", "trial_id", "rule", "setting", "candidates"),
        *(
            f"{model}_{label}{part}"
            for _, _, label in shown
            for model in ("base", "deployed")
            for part in FOUR_PARTS
        ),
    ]
    return Grid(header, rows).csv()


def shares(report: PickReport) -> list[tuple[str, float, float]]:
    """Trial id, share forgotten and share kept of each candidate, the choice first."""
    retain = report.base.plain["retain_rougeL"].value
    return [
        (marks.trial_id, marks.gone.value, marks.retain.value / retain if retain > 0 else 0.0)
        for marks in report.choice.order
    ]


def comparison_picture(reports: Sequence[PickReport]) -> Picture:
    """Each backbone's front, its deployment large."""
    drawn = []
    for number, report in enumerate(reports):
        settings = {trial.trial_id: describe(trial.config) for _, trial, _ in report.rows}
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
    forgotten = Scale("Share of the base's forget ROUGE-L that is gone", percent=True)
    kept = Scale("Share of the base's retain ROUGE-L that is kept", percent=True)
    return Picture(
        "Deployments by backbone",
        [Panel(forgotten, kept, drawn)],
        "large: the deployment; small: the others of its front; held-out",
    )
