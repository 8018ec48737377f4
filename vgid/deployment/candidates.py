"""The candidates of a pick: a study's front, scored again before the choice.

A study scores its front once on held-out questions. Here every candidate, and the base, is scored
on them with several seeds (of few-shot people, test poses and bootstrap), plainly and under the
reverse prompt, so that the winner is no lucky draw of one seed. Scores come from the store where a
study or an earlier pick has them already.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vgid.deployment.record import NOT_RUN, REVERSED, Attack
from vgid.deployment.rules import Marks, Measure
from vgid.errors import InputError
from vgid.evaluation.suppression import doubt
from vgid.results import QuestionPart, Score
from vgid.seeds import held_out_seed
from vgid.study.finished import Trial

if TYPE_CHECKING:
    from pathlib import Path

    from vgid.trial import TrialSession

PART: QuestionPart = "held_out"

MIN_SEEDS = 3


@dataclass(frozen=True)
class Scored:
    """A model's scores, pooled over the seeds (see ``pooled``).

    Attributes:
        plain: questions as they are.
        reverse: the same under the reverse prompt.
    """

    plain: Mapping[str, Score]
    reverse: Mapping[str, Score]


@dataclass(frozen=True)
class Candidates:
    """A front, ready to be chosen from.

    Attributes:
        seeds: what was scored with.
        base: the base model's scores.
        trials: the front.
        scores: each trial's scores, in the same order.
    """

    seeds: tuple[int, ...]
    base: Scored
    trials: tuple[Trial, ...]
    scores: tuple[Scored, ...]

    def marks(self) -> list[Marks]:
        """What the rules judge, in the same order.

        Raises:
            InputError: the data has no held-out generation questions.
        """
        return [
            marks_of(trial.trial_id, self.base, scored)
            for trial, scored in zip(self.trials, self.scores, strict=True)
        ]

    def of(self, trial_id: str) -> tuple[Trial, Scored]:
        """One candidate by its trial id."""
        return next(
            pair
            for pair in zip(self.trials, self.scores, strict=True)
            if pair[0].trial_id == trial_id
        )


def pick_seeds(study_seed: int, count: int) -> tuple[int, ...]:
    """The seeds of a pick; the first is the one that the study scored its front with."""
    return tuple(held_out_seed(study_seed, study=True) + i for i in range(count))


def score_with_seeds(
    session: "TrialSession", seeds: Sequence[int], adapter: "Path | None"
) -> Scored:
    """Scores of an adapter, or of the base, on the held-out questions over ``seeds``.

    Args:
        session: a loaded base with its request.
        seeds: of few-shot people, test poses and bootstrap.
        adapter: PEFT folder, None for the base.

    Raises:
        InputError: the adapter lacks a file, or there are too few few-shot people.
    """
    if adapter is None:
        plain = [session.base_scores(PART, seed) for seed in seeds]
    else:
        plain = [session.rescore(adapter, PART, seed) for seed in seeds]
    reverse = [session.rescore_attacked(adapter, PART, seed) for seed in seeds]
    return Scored(pooled(plain), pooled(reverse))


def score_front(
    session: "TrialSession",
    trials: Sequence[Trial],
    seeds: Sequence[int],
    tell: Callable[[str], None],
) -> Candidates:
    """Score a front and its base.

    Args:
        session: a loaded base with the study's request.
        trials: the front.
        seeds: see ``pick_seeds``.
        tell: shows a line of progress.

    Raises:
        InputError: see ``score_with_seeds``.
    """
    tell(f"Scoring the base model on held-out questions, {len(seeds)} seeds")
    base = score_with_seeds(session, seeds, None)
    unsure = doubt(base.plain)
    if unsure is not None:
        tell(f"Warning: {unsure}")
    scores = []
    for number, trial in enumerate(trials, start=1):
        tell(f"Scoring trial {trial.trial_id} ({number} of {len(trials)})")
        scores.append(score_with_seeds(session, seeds, trial.adapter))
    return Candidates(tuple(seeds), base, tuple(trials), tuple(scores))


def pooled(runs: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """Scores over several seeds as one.

    The seeds ask the same people nearly the same questions, so they are no independent samples:
    the value is the mean, the interval the envelope of all intervals, n that of one seed.
    """
    return {
        name: Score(
            value=sum(run[name].value for run in runs) / len(runs),
            n=min(run[name].n for run in runs),
            # Taken for three samples, three seeds would make the interval narrower by two fifths
            # for asking the same people again.
            low=min(run[name].low for run in runs),
            high=max(run[name].high for run in runs),
        )
        for name in runs[0]
        if all(name in run for run in runs)
    }


def marks_of(trial_id: str, base: Scored, scored: Scored) -> Marks:
    """What the rules judge of a candidate.

    Reduction, drop and rise are differences of the same people's answers, with paired intervals.

    Raises:
        InputError: the data has no held-out generation questions.
    """
    reduction = _score(scored.plain, "forget_rougeL_reduction")
    retain = _score(scored.plain, "retain_rougeL")
    drop = _score(scored.plain, "retain_rougeL_drop")
    rise = _score(scored.reverse, "forget_rougeL_rise")
    cloze = scored.plain.get("forget_cloze")
    return Marks(
        trial_id=trial_id,
        before=_score(base.plain, "forget_rougeL").value,
        reduction=Measure(reduction.value, reduction.low),
        retain=Measure(retain.value, retain.low),
        retain_drop=Measure(drop.value, drop.high),
        reverse_rise=Measure(rise.value, rise.high),
        cloze=None if cloze is None else Measure(cloze.value, cloze.high),
    )


def attacks_of(scored: Scored) -> tuple[tuple[Attack, ...], tuple[str, ...]]:
    """The attacks that scores tell of, and what was not run, for the deployment record.

    The reverse prompt is scored on those who are to be forgotten, or were earlier; an attack whose
    questions the data lacks counts as not run.
    """
    plain, reverse = scored.plain, scored.reverse
    forgotten = ("forget_", "test_", "earlier_")
    rows = {
        REVERSED: _only(reverse, lambda name: name.startswith(forgotten)),
        "new portraits and wording (test set)": _only(
            plain, lambda name: name.startswith("test_") and not name.endswith(("_text", "_raw"))
        ),
        "questions as they stand, without answer instructions": _only(
            plain, lambda name: name.startswith(forgotten) and name.endswith("_raw")
        ),
        "text-only questions": _only(
            plain, lambda name: name.startswith(forgotten) and name.endswith("_text")
        ),
        "answer forced (memorisation)": _only(
            plain, lambda name: name.startswith("forget_memorisation")
        ),
    }
    run = tuple(Attack(name=name, scores=scores) for name, scores in rows.items() if scores)
    missing = tuple(
        f"{name}: the data has no such questions" for name, scores in rows.items() if not scores
    )
    return run, (*missing, *NOT_RUN)


def _only(scores: Mapping[str, Score], wanted: Callable[[str], bool]) -> dict[str, Score]:
    return {name: score for name, score in scores.items() if wanted(name)}


def _score(scores: Mapping[str, Score], name: str) -> Score:
    if name not in scores:
        raise InputError(
            f"{name}: the data has no held-out questions for this score; add generation questions."
        )
    return scores[name]
