"""Why this trial, in words and numbers: sentences, the table, ``candidates.csv``.

The pictures are drawn by ``vgid.deployment.pick_pictures``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vgid.deployment.rules import Choice, Marks
from vgid.deployment.scores import Candidates, Scored
from vgid.evaluation.suppression import verdict
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
