"""The result of a study in words: a Markdown note for the tracking server.

MLflow keeps a note in 8,000 characters and shows Markdown with tables and images, of which only
those under a relative or an ``http`` address (its sanitiser drops ``data:`` images).
"""

from collections.abc import Mapping

from vgid.outputs import OBJECTIVES, TrialRecord, describe, held_out_scores
from vgid.plots import Front
from vgid.results import Score

MAX_ROWS = 16
"""Rows of the table, so that the note stays within MLflow's limit."""

PAPER_RETAIN_DROP = 0.055
"""What the paper's own setting costs in retain ROUGE-L (table 1); more is no good bargain."""


def study_note(front: Front, phases: Mapping[str, float], picture: str) -> str:
    """Write the note: the result in a few sentences, the picture, the front as a table.

    Args:
        front: the study's trials and its base model's scores.
        phases: seconds by phase, in the order to show them.
        picture: address of ``front.png``, relative to the page that shows the note.

    Returns:
        Markdown.
    """
    parts = [_result(front), f"![All trials, the front, the base model]({picture})"]
    if front.front:
        parts.append(_table(front))
    if phases:
        cells = " · ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
        parts.append(f"**Time by phase.** {cells}")
    parts.append(
        "Trials are scored on the search questions; the front is scored again on held-out "
        "questions, with 95 % bootstrap intervals. Reduction: base forget-set ROUGE-L minus the "
        "trial's. Files: `front.html` (interactive), `front.csv`, `trials.csv`, `study.json`."
    )
    return "\n\n".join(parts) + "\n"


def recommended(front: Front) -> TrialRecord | None:
    """The front's trial that forgets most while retain ROUGE-L drops no more than in the paper.

    Where none is that gentle, the one with the smallest drop. Chosen by search scores, so that
    its held-out scores are not the best of many.
    """
    kept = front.base_point[1] - PAPER_RETAIN_DROP
    gentle = [r for r in front.front if r.point is not None and r.point[1] >= kept]
    return gentle[-1] if gentle else next(iter(front.front), None)


def _result(front: Front) -> str:
    pick = recommended(front)
    if pick is None or pick.point is None:
        return f"**Result.** {len(front.records)} trials, and no front yet."
    scores = held_out_scores(pick, front.base_held_out)
    if scores is not None and front.base_held_out is not None:
        reduction, retain = (scores[name].value for name in OBJECTIVES)
        base, where = front.base_held_out, "on held-out questions"
    else:
        (reduction, retain), base, where = pick.point, front.base, "on the search questions"
    forget, kept = base["forget_rougeL"].value, base["retain_rougeL"].value
    share = f"{reduction / forget:.0%}" if forget > 0 else "none"
    return (
        f"**Result.** {len(front.records)} trials, {front.caption}. "
        f"Trial {pick.result.trial_id} ({describe(pick.config)}) "
        f"removes {share} of the forget people's ROUGE-L ({forget:.3f} to "
        f"{forget - reduction:.3f}) {where}, and retain ROUGE-L goes from {kept:.3f} to "
        f"{retain:.3f}."
    )


def _table(front: Front) -> str:
    header = ["trial", "setting", "reduction", "retain"]
    held_out = front.held_out()
    if held_out:
        header += ["reduction, held out", "retain, held out", "test, held out", "cloze, held out"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    for record in front.front[-MAX_ROWS:]:
        x, y = record.point or (0.0, 0.0)
        cells = [record.result.trial_id, describe(record.config), f"{x:.3f}", f"{y:.3f}"]
        if held_out:
            scores = held_out_scores(record, front.base_held_out) or {}
            names = (*OBJECTIVES, "test_rougeL", "forget_cloze")
            cells += [_interval(scores.get(name)) for name in names]
        lines.append(" | ".join(cells))
    left_out = len(front.front) - MAX_ROWS
    more = f"\n\n({left_out} more in `front.csv`.)" if left_out > 0 else ""
    return "\n".join(f"| {line} |" for line in lines) + more


def _interval(score: Score | None) -> str:
    return "" if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
