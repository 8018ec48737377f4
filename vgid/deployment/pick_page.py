"""Why this trial, for people: what a pick and a comparison of backbones show.

``pick.html`` and ``pick.png`` show on the left what each candidate forgets and keeps, with its
intervals, and on the right what is still answered of what was to be forgotten, by attack; sentences
and the table stand below, and ``candidates.csv`` has the scores. Several backbones' deployments
stand on one page, ``comparison.html``, with a picture and a table. Backbones start from different
scores, so that picture shows shares: how much of the base's forget ROUGE-L is gone, and how much of
its retain ROUGE-L is kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vgid.deployment.rules import Choice, Marks
from vgid.deployment.scores import Candidates, Scored
from vgid.evaluation.suppression import verdict
from vgid.files import write_atomically
from vgid.report.drawing import BASE, FRONT, HELD_OUT, INK, TRIAL, Panel, Picture, Scale, Series
from vgid.report.front import setting_lines
from vgid.report.page import write_page
from vgid.report.records import describe
from vgid.report.tables import FOUR_PARTS, Grid, four_cells
from vgid.results import Score

KEY_SCORES = (
    "forget_rougeL",
    "retain_rougeL",
    "test_rougeL",
    "forget_cloze",
    "test_cloze",
    "retain_cloze",
    "celebrity_rougeL",
    "celebrity_cloze",
    "forget_memorisation",
    "forget_refusal",
    "forget_rougeL_text",
    "test_rougeL_text",
    "forget_rougeL_raw",
    "test_rougeL_raw",
    "retain_rougeL_raw",
    "forget_refusal_raw",
    "retain_refusal",
    "retain_refusal_raw",
)
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

Column = tuple[str, str, str]


@dataclass(frozen=True)
class PickReport:
    """What is told of a pick.

    Attributes:
        backbone: name.
        study_id: the study.
        candidates: the front and its scores.
        choice: what was chosen.
        warning: what it does to people of earlier requests, if that is to be told.
    """

    backbone: str
    study_id: str
    candidates: Candidates
    choice: Choice
    warning: str | None = None

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
            f"{forget}, n = {forget.n}, and retain ROUGE-L from "
            f"{base['retain_rougeL'].value:.3f} to {retain}, n = {retain.n}; "
            f"under the reverse prompt forget ROUGE-L is "
            f"{chosen.reverse['forget_rougeL']}.",
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
        if self.warning is not None:
            told.append(self.warning)
        chance = (
            f"It is the best of {count} on the very questions that it is scored on, so expect "
            "slightly less on others; "
            if count > 1
            else ""
        )
        told.append(
            f"{chance}{'values' if chance else 'Values'} are means over {seeds} seeds of few-shot "
            "people, test poses and bootstrap, intervals the envelope of theirs."
        )
        told.append(f"{verdict(base, chosen.plain, chosen.reverse)} Suppressed is not erased.")
        return told


def report_grid(report: PickReport) -> Grid:
    """The choice and the runners-up with why not, and the base."""
    shown = columns([report])
    rows = [
        [marks.trial_id, setting, *_values(scored, shown), report.choice.why[marks.trial_id]]
        for marks, setting, scored in report.rows()
    ]
    return Grid(
        ("trial", "setting", *(title for *_, title in shown), "why"),
        [*rows, ["base", "", *_values(report.candidates.base, shown), ""]],
        f"Candidates on {report.backbone}, held-out",
        marks={0: "chosen", len(rows): "base"},
    )


def columns(reports: Sequence[PickReport]) -> list[Column]:
    """Those of ``COLUMNS`` that a base has; data without celebrities lacks theirs."""
    return [
        (kind, name, title)
        for kind, name, title in COLUMNS
        if name != "celebrity_rougeL" or any(name in r.candidates.base.plain for r in reports)
    ]


def shown_score(scored: Scored, column: Column) -> Score | None:
    """What stands in a column, None if it was not asked."""
    scores: Mapping[str, Score] = getattr(scored, column[0])
    return scores.get(column[1])


def _values(scored: Scored, shown: Sequence[Column]) -> list[float | None]:
    found = [shown_score(scored, column) for column in shown]
    return [None if score is None else score.value for score in found]


def candidates_csv(report: PickReport) -> bytes:
    """``candidates.csv``: the base, then each candidate with what the rules and people look at.

    ``_worst`` is the unfavourable end of an interval, ``reverse_`` the score under the reverse
    prompt; ``_low``, ``_high`` and ``_n`` as in ``front.csv``.
    """
    models: list[tuple[str, str, Marks | None, Scored]]
    models = [("base", "", None, report.candidates.base)]
    models += [(m.trial_id, s, m, scored) for m, s, scored in report.rows()]
    scores = [(kind, name) for kind in ("", "reverse_") for name in KEY_SCORES]
    marks = ("reduction", "retain_drop", "reverse_rise")
    header = [
        "model",
        "chosen",
        "within_bounds",
        "setting",
        *(f"{name}{part}" for name in marks for part in ("", "_worst")),
        *(f"{kind}{name}{part}" for kind, name in scores for part in FOUR_PARTS),
    ]
    rows = []
    for model, setting, judged, scored in models:
        row: list[Any] = [model, None, None, setting]
        if judged is not None:
            row[1:3] = [judged is report.choice.chosen, report.choice.bounds.keeps(judged)]
        for name in marks:
            row += [None, None] if judged is None else list(getattr(judged, name))
        for kind, name in scores:
            row += four_cells((scored.reverse if kind else scored.plain).get(name))
        rows.append(row)
    return Grid(header, rows).csv()


def html_table(report: PickReport) -> str:
    """The table for a page."""
    return report_grid(report).html()


def paragraphs(report: PickReport) -> str:
    """The sentences for a page."""
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in report.sentences)


def interval_text(score: Score) -> str:
    """A score with its interval."""
    return str(score)


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
h3 { font-size: 14px; margin: 16px 24px 0; }
table { border-collapse: collapse; margin: 8px 24px 12px; }
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


COMPARISON = ("comparison.html", "comparison.png", "comparison.csv")

SHARE_GONE = "Share of the base's forget ROUGE-L that is gone"
SHARE_KEPT = "Share of the base's retain ROUGE-L that is kept"
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
        [Panel(Scale(SHARE_GONE, percent=True), Scale(SHARE_KEPT, percent=True), drawn)],
        "large: the deployment; small: the others of its front; held-out",
    )
