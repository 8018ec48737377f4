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
from vgid.report.records import TrialRecord, describe, held_out_scores
from vgid.report.tables import Grid
from vgid.results import OBJECTIVES, LeftOut, Verbatim, describe_left_out

NOTE_PICTURE = "front-small.png"
"""The note shows a picture at its own size, so it gets one that fits beside the run's details."""

INSIGHTS = "insights.png"
"""The picture that the note shows below the front, if the study made it."""

MAX_COMPARED = 8
"""Runs side by side on one page, those of the front that forget most."""

MAX_ROWS = 16
"""Rows of the table, so that the note stays within MLflow's limit."""

PAPER_RETAIN_DROP = 0.055
"""What the paper's own setting costs in retain ROUGE-L (table 1); more is no good bargain."""


@dataclass(frozen=True)
class NoteLinks:
    """Where the note's links lead, each relative to the address of the tracking server.

    Attributes:
        picture: the small picture of the front.
        insights: the picture of what made the difference, if there is one.
        runs: page of each trial's run by trial id.
        pages: further pages of MLflow by what they show.
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
    """The links of the note of a study's parent run, ``study_run_id``.

    Args:
        front: the study's trials.
        experiment_id: the backbone's experiment.
        study_run_id: MLflow's id of the run that shows the note.
        study_id: the study's own id.
        runs: run id of each trial by trial id.
        files: the parent run's artifacts.
    """
    artifact = f"get-artifact?path={{}}&run_uuid={study_run_id}"
    pages = {
        "all trials as a table": table_page(experiment_id, study_id),
        "as charts": chart_page(experiment_id, study_id),
    }
    compared = [runs[r.result.trial_id] for r in front.front if r.result.trial_id in runs]
    if compared:
        side_by_side = compare_page(experiment_id, compared[-MAX_COMPARED:])
        pages["the front's runs side by side"] = side_by_side
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
) -> str:
    """The note in Markdown: the result in three sentences, the picture, the front as a table.

    Args:
        front: the study's trials and its base model's scores.
        phases: seconds by phase, in the order to show them.
        links: where its links lead.
        verbatim: which scored questions training sees.
        left_out: what of the data was left out as defective.
    """
    parts = [_result(front, links)]
    found = [f"[{name}]({page})" for name, page in links.pages.items()]
    if found:
        parts.append(f"**Look closer.** {' · '.join(found)}")
    parts.append(f"![All trials, the front, the base model]({links.picture})")
    if front.front:
        parts.append(_table(front, links))
    if links.insights is not None:
        parts.append(f"![What made the difference]({links.insights})")
    if phases:
        cells = " · ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
        parts.append(f"**Time by phase.** {cells}")
    if left_out:
        parts.append(f"**Left out as defective.** {describe_left_out(left_out)}.")
    parts.append(
        "Trials are scored on the search questions; the front is scored again on held-out "
        "questions, with 95 % bootstrap intervals. Reduction: base forget-set ROUGE-L minus the "
        f"trial's.{_trained_on(verbatim or {})} Artifacts: `front.html` (hover and click), "
        "`insights.html`, `front.csv`, `trials.csv`, `study.json`."
    )
    return "\n\n".join(parts) + "\n"


def recommended(front: Front) -> TrialRecord | None:
    """The front's trial that forgets most while retain ROUGE-L drops no more than in the paper.

    Where none is that gentle, the one with the smallest drop of those that forget enough to be
    called so (``MIN_FORGET``); where none does, the one that forgets most. Chosen by search scores,
    so that its held-out scores are not the best of many.
    """
    known, kept = front.base["forget_rougeL"].value, front.base_point[1] - PAPER_RETAIN_DROP
    points = [(record, *record.point) for record in front.front if record.point is not None]
    able = [(r, y) for r, x, y in points if share_gone(known, known - x) >= MIN_FORGET]
    # The front is in order of what is forgotten, so of those that are gentle the last forgets most.
    for record, y in reversed(able):
        if y >= kept:
            return record
    return able[0][0] if able else next(reversed(front.front), None)


def _result(front: Front, links: NoteLinks) -> str:
    pick = recommended(front)
    if pick is None or pick.point is None:
        return f"**Result.** {len(front.records)} trials, and no front yet."
    scores = held_out_scores(pick)
    if scores is not None and scores.keys() >= set(OBJECTIVES) and front.base_held_out is not None:
        base, where = front.base_held_out, "on held-out questions"
        further: Mapping[str, float] = {name: score.value for name, score in scores.items()}
    else:
        scores, further = pick.result.scores, pick.result.metrics
        base, where = front.base, "on the search questions"
    reduction, retain = (further[name] for name in OBJECTIVES)
    forget, kept = base["forget_rougeL"].value, base["retain_rougeL"].value
    share = f"{reduction / forget:.0%}" if forget > 0 else "none"
    labels = {
        "test_rougeL": "ROUGE-L under new portraits and wording",
        "forget_rougeL_raw": "ROUGE-L without answer instructions",
        "forget_cloze": "cloze accuracy",
        "forget_memorisation": "the share of true tokens still predicted when forced",
    }
    left = [f"{label} is {further[name]:.3f}" for name, label in labels.items() if name in further]
    rest = f"For the forget people {', '.join(left)}. " if left else ""
    refused = ""
    if {"retain_refusal", "retain_refusal_raw"} <= further.keys():
        refused = (
            f" ({further['retain_refusal']:.1%} of their questions refused, "
            f"{further['retain_refusal_raw']:.1%} without answer instructions)"
        )
    missing = len(front.records) - len(front.drawn)
    count = f"{len(front.front)} {'is' if len(front.front) == 1 else 'are'} on the front"
    count += f" and {missing} did not complete" if missing else ""
    unsure = "" if front.doubt is None else f"**Warning.** {front.doubt}\n\n"
    return (
        f"{unsure}**Result.** Of {len(front.records)} trials, {count}. "
        f"Trial {links.trial(pick.result.trial_id)} ({describe(pick.config)}) "
        f"removes {share} of the forget people's ROUGE-L ({forget:.3f} to "
        f"{forget - reduction:.3f}) {where}, and retain ROUGE-L goes from {kept:.3f} to "
        f"{retain:.3f}{refused}. {rest}{verdict(base, scores)} Suppressed is not erased."
    )


def _trained_on(verbatim: Verbatim) -> str:
    """A sentence on the scored questions that training sees word for word."""
    parts = []
    for part, splits in verbatim.items():
        told = [
            f"{split} {count['seen']} of {count['scored']}"
            for split, count in splits.items()
            if count["seen"] or not split.endswith("_text")
        ]
        parts.append(f"of the {part.replace('_', '-')} ones {', '.join(told)}")
    return f" Generation questions trained on word for word: {'; '.join(parts)}." if parts else ""


def _table(front: Front, links: NoteLinks) -> str:
    """The front's trials, by their held-out scores where there are any."""
    titles = dict(zip(OBJECTIVES, ("reduction", "retain"), strict=True))
    rows: list[Mapping[str, Any]] = [record.result.metrics for record in front.front]
    heading = "On the search questions"
    if front.held_out():
        titles |= {"celebrity_rougeL": "celebrities", "test_rougeL": "test"}
        titles["forget_cloze"] = "cloze"
        rows = [record.held_out or {} for record in front.front]
        heading = "On held-out questions"
    shown = [name for name in titles if any(name in row for row in rows)]
    lines = [
        [links.trial(record.result.trial_id), describe(record.config), *map(row.get, shown)]
        for record, row in zip(front.front[-MAX_ROWS:], rows[-MAX_ROWS:], strict=True)
    ]
    header = ("trial", "setting", *(titles[name] for name in shown))
    # MLflow's tables have no space between their columns.
    table = Grid(header, lines).markdown(gap="&emsp;")
    left_out = len(front.front) - MAX_ROWS
    more = f"\n\n({left_out} more in `front.csv`.)" if left_out > 0 else ""
    return f"**The front.** {heading}:\n\n{table}{more}"
