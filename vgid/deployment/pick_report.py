"""Why this trial, in words and numbers: sentences, the table, ``candidates.csv``.

The pictures are drawn by ``vgid.deployment.pick_pictures``. rich is imported when a table is made.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from vgid.deployment.candidates import Candidates, Scored
from vgid.deployment.rules import Choice, Marks
from vgid.evaluation.suppression import verdict
from vgid.report.records import as_text, describe
from vgid.results import Score

if TYPE_CHECKING:
    from rich.table import Table

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
            f"{interval_text(forget)}, n = {forget.n}, and retain ROUGE-L from "
            f"{base['retain_rougeL'].value:.3f} to {interval_text(retain)}, n = {retain.n}; "
            f"under the reverse prompt forget ROUGE-L is "
            f"{interval_text(chosen.reverse['forget_rougeL'])}.",
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


def report_table(report: PickReport) -> "Table":
    """The choice and the runners-up with why not, as a table for a terminal."""
    from rich.table import Table

    table = Table(title=f"Candidates on {report.backbone}, held-out", title_justify="left")
    table.add_column("trial")
    table.add_column("setting")
    shown = columns([report])
    for *_, title in shown:
        table.add_column(title, justify="right")
    table.add_column("why")
    base = report.candidates.base
    for marks, setting, scored in report.rows():
        chosen = marks is report.choice.chosen
        table.add_row(
            marks.trial_id,
            setting,
            *_cells(scored, shown),
            report.choice.why[marks.trial_id],
            style="bold" if chosen else None,
        )
    table.add_section()
    table.add_row("base", "", *_cells(base, shown), "", style="dim")
    return table


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


def _cells(scored: Scored, shown: Sequence[Column]) -> list[str]:
    found = [shown_score(scored, column) for column in shown]
    return ["" if score is None else f"{score.value:.3f}" for score in found]


def candidates_csv(report: PickReport) -> bytes:
    """``candidates.csv``: the base, then each candidate with what the rules and people look at.

    ``_worst`` is the unfavourable end of an interval, ``reverse_`` the score under the reverse
    prompt; ``_low``, ``_high`` and ``_n`` as in ``front.csv``.
    """
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


def html_table(report: PickReport) -> str:
    """The same table as ``report_table`` for a page."""
    shown = columns([report])
    head = ["trial", "setting", *(title for *_, title in shown), "why"]
    kinds = ["", "", *["number"] * len(shown), ""]
    rows = [("tr", head, "th")]
    for marks, setting, scored in report.rows():
        mark = 'tr class="chosen"' if marks is report.choice.chosen else "tr"
        why = report.choice.why[marks.trial_id]
        rows.append((mark, [marks.trial_id, setting, *_cells(scored, shown), why], "td"))
    rows.append(("tr", ["base", "", *_cells(report.candidates.base, shown), ""], "td"))
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


def interval_text(score: Score) -> str:
    """A score with its interval."""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
