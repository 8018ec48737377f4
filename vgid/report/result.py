"""The result of a study in three sentences, the same on its page and on MLflow."""

from collections.abc import Callable, Mapping

from vgid.evaluation.suppression import MIN_FORGET, share_gone, verdict
from vgid.report.front import Front
from vgid.report.records import TrialRecord, describe
from vgid.requirement import OBJECTIVES
from vgid.results import Score

PAPER_RETAIN_DROP = 0.055
"""What the paper's own setting costs in retain ROUGE-L (table 1); more is no good bargain."""

FURTHER = {
    "test_rougeL": "ROUGE-L under new portraits and wording",
    "forget_rougeL_raw": "ROUGE-L without answer instructions",
    "forget_cloze": "cloze accuracy",
    "forget_memorisation": "the share of true tokens still predicted when forced",
}
"""What else is told of the forget people."""


def result(front: Front, linked: Callable[[str], str] = str) -> list[str]:
    """What is on the front, what its recommended trial does, and how far that goes.

    ``linked`` writes a trial's id. Without a front, a single sentence.
    """
    trials = sum(not record.is_harvested for record in front.records)
    pick = recommended(front)
    if pick is None:
        return [f"{_count(trials, 'trial')}, and no front yet."]
    more = len(front.records) - trials
    harvested = f" and {more} candidates harvested of them" if more else ""
    missing = trials - len(front.trials)
    rest = f", and {missing} did not complete" if missing else ""
    be = "is" if len(front.front) == 1 else "are"
    base, where = front.base, "on the search questions"
    scores: Mapping[str, Score] = pick.result.scores
    values: Mapping[str, float] = pick.result.metrics
    held_out = pick.held_out or {}
    if front.base_held_out is not None and held_out.keys() >= set(OBJECTIVES):
        base, where, scores = front.base_held_out, "on held-out questions", held_out
        values = {name: score.value for name, score in scores.items()}
    known, gone = base["forget_rougeL"].value, values[OBJECTIVES[0]]
    refused = ""
    if {"retain_refusal", "retain_refusal_raw"} <= values.keys():
        plain, raw = values["retain_refusal"], values["retain_refusal_raw"]
        refused = (
            f" ({plain:.1%} of their questions refused, {raw:.1%} without answer instructions)"
        )
    told = [f"{label} is {values[name]:.3f}" for name, label in FURTHER.items() if name in values]
    further = f"; for the forget people {', '.join(told)}" if told else ""
    # A base in doubt is a warning of its own.
    said = None if front.doubt else verdict(base, scores)
    return [
        f"Of {_count(trials, 'trial')}{harvested}, {len(front.front)} {be} on the front{rest}.",
        f"Trial {linked(pick.result.trial_id)} ({describe(pick.config)}) removes "
        f"{share_gone(known, known - gone):.0%} of the forget people's ROUGE-L ({known:.3f} to "
        f"{known - gone:.3f}) {where}, and retain ROUGE-L goes from "
        f"{base['retain_rougeL'].value:.3f} to {values['retain_rougeL']:.3f}{refused}{further}.",
        " ".join(filter(None, (said, "Suppressed is not erased.", front.outlook))),
    ]


def recommended(front: Front) -> TrialRecord | None:
    """The front's trial that forgets most while retain ROUGE-L drops no more than in the paper.

    Where none is that gentle, the one with the smallest drop of those that forget enough to be
    called so (``MIN_FORGET``); where none does, the one that forgets most. Chosen by search scores,
    so that its held-out scores are not the best of many.
    """
    known, kept = (front.base[f"{split}_rougeL"].value for split in ("forget", "retain"))
    points = [(record, *record.place) for record in front.front if record.place is not None]
    able = [(r, y) for r, x, y in points if share_gone(known, known - x) >= MIN_FORGET]
    # The front is in order of what is forgotten, so of those that are gentle the last forgets most.
    for record, y in reversed(able):
        if y >= kept - PAPER_RETAIN_DROP:
            return record
    return able[0][0] if able else next(reversed(front.front), None)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
