"""The result of a study in words: a Markdown note for the tracking server.

MLflow keeps a note in 8,000 characters and shows Markdown with tables and images, of which only
those under a relative or an ``http`` address (its sanitiser drops ``data:`` images).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgid.evaluation.suppression import MIN_FORGET, share_gone, verdict
from vgid.report.front import Front
from vgid.report.mlflow_links import chart_page, compare_page, run_page, table_page
from vgid.report.page import rendered
from vgid.report.records import TrialRecord, describe
from vgid.report.tables import Grid
from vgid.results import OBJECTIVES, LeftOut, Score, Verbatim, describe_left_out

NOTE_PICTURE = "front-small.png"
"""Shown at its own size, so one that fits beside the run's details."""

INSIGHTS = "insights.png"

MAX_COMPARED = 8
"""Runs side by side on one page, those of the front that forget most."""

MAX_ROWS = 16
"""Rows of the table, so that the note stays within MLflow's limit."""

PAPER_RETAIN_DROP = 0.055
"""What the paper's own setting costs in retain ROUGE-L (table 1); more is no good bargain."""


@dataclass(frozen=True)
class NoteLinks:
    """Where the note's links lead, each relative to the address of the tracking server.

    ``runs`` are the pages of the trials' runs by trial id, ``pages`` further ones of MLflow by what
    they show; ``insights`` is the picture of what made the difference, if there is one.
    """

    picture: str
    insights: str | None = None
    runs: Mapping[str, str] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)

    def trial(self, trial_id: str) -> str:
        """The trial's id, linked to its run where that is known."""
        page = self.runs.get(trial_id)
        return trial_id if page is None else f"[{trial_id}]({page})"


def note_links(
    front: Front,
    experiment_id: str,
    study_run_id: str,
    study_id: str,
    runs: Mapping[str, str],
    files: Sequence[Path],
) -> NoteLinks:
    """The links of the note that MLflow's run ``study_run_id`` shows of a study.

    ``runs`` are the run ids by trial id, ``files`` that run's artifacts.
    """
    artifact = f"get-artifact?path={{}}&run_uuid={study_run_id}"
    pages = {
        "all trials as a table": table_page(experiment_id, study_id),
        "as charts": chart_page(experiment_id, study_id),
    }
    compared = [runs[r.result.trial_id] for r in front.front if r.result.trial_id in runs]
    if compared:
        page = compare_page(experiment_id, compared[-MAX_COMPARED:])
        pages["the front's runs side by side"] = page
    return NoteLinks(
        artifact.format(NOTE_PICTURE),
        artifact.format(INSIGHTS) if any(file.name == INSIGHTS for file in files) else None,
        {trial_id: run_page(experiment_id, run_id) for trial_id, run_id in runs.items()},
        pages,
    )


def study_note(
    front: Front,
    phases: Mapping[str, float],
    links: NoteLinks,
    verbatim: Verbatim | None = None,
    left_out: LeftOut | None = None,
    outlook: str | None = None,
) -> str:
    """The note in Markdown: the result in three sentences, the picture, the front as a table.

    ``phases`` are seconds by phase in the order to show them, ``verbatim`` says which scored
    questions training sees, ``left_out`` what of the data was left out as defective, ``outlook``
    whether more trials are worth it.
    """
    pick, again = recommended(front), front.base_held_out
    values: dict[str, Any] = {}
    if pick is not None:
        base, where = front.base, "on the search questions"
        scores: Mapping[str, Score] = pick.result.scores
        known: Mapping[str, float] = pick.result.metrics
        if again is not None and (pick.held_out or {}).keys() >= set(OBJECTIVES):
            base, where, scores = again, "on held-out questions", pick.held_out or {}
            known = {name: score.value for name, score in scores.items()}
        values = {
            "setting": describe(pick.config),
            "base": base,
            "where": where,
            "scores": known,
            "verdict": verdict(base, scores),
            "questions": "held-out questions" if front.held_out() else "the search questions",
            # MLflow's tables have no space between columns.
            "table": _table(front, links).markdown(gap="&emsp;"),
            "more": len(front.front) - MAX_ROWS,
        }
    return rendered(
        "vgid.report",
        "note.md.jinja",
        front=front,
        links=links,
        pick=pick,
        missing=len(front.records) - len(front.drawn),
        phases=phases,
        left_out=describe_left_out(left_out or {}),
        verbatim=verbatim or {},
        outlook=outlook,
        **values,
    )


def recommended(front: Front) -> TrialRecord | None:
    """The front's trial that forgets most while retain ROUGE-L drops no more than in the paper.

    Where none is that gentle, the one with the smallest drop of those that forget enough to be
    called so (``MIN_FORGET``); where none does, the one that forgets most. Chosen by search scores,
    so that its held-out scores are not the best of many.
    """
    known, kept = (front.base[f"{split}_rougeL"].value for split in ("forget", "retain"))
    points = [(record, *record.point) for record in front.front if record.point is not None]
    able = [(r, y) for r, x, y in points if share_gone(known, known - x) >= MIN_FORGET]
    # The front is in order of what is forgotten, so of those that are gentle the last forgets most.
    for record, y in reversed(able):
        if y >= kept - PAPER_RETAIN_DROP:
            return record
    return able[0][0] if able else next(reversed(front.front), None)


def _table(front: Front, links: NoteLinks) -> Grid:
    titles = dict(zip(OBJECTIVES, ("reduction", "retain"), strict=True))
    rows: list[Mapping[str, Any]] = [record.result.metrics for record in front.front]
    if front.held_out():
        titles |= {"celebrity_rougeL": "celebrities", "test_rougeL": "test"}
        titles["forget_cloze"] = "cloze"
        rows = [record.held_out or {} for record in front.front]
    shown = [name for name in titles if any(name in row for row in rows)]
    lines = [
        [links.trial(record.result.trial_id), describe(record.config), *map(row.get, shown)]
        for record, row in zip(front.front[-MAX_ROWS:], rows[-MAX_ROWS:], strict=True)
    ]
    return Grid(("trial", "setting", *(titles[name] for name in shown)), lines)
