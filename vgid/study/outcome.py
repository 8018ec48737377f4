"""What a study amounts to: its scoreboard at any moment, and ``study.json`` at the end."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from vgid.models.store import info
from vgid.pareto import FLAT, flat_since, front_mask, hypervolume
from vgid.provenance import provenance
from vgid.report.records import TrialRecord, misses_of
from vgid.requirement import minimised
from vgid.results import (
    QuestionPart,
    Score,
    TrialResult,
    TrialStatus,
    Verbatim,
    origin,
    trial_order,
)
from vgid.study.console import Standing
from vgid.study.ending import Ending
from vgid.study.ledger import Ledger, Record, now
from vgid.study.plan import Plan

TABLES = ("study.json", "trials.csv", "front.csv")
CANDIDATES = "candidates.csv"  # of a study that harvests
TRIAL_PHASES = ("teacher", "train", "evaluate", "save")

# Seconds by phase: ``total_s`` over the study, ``median_s`` of a trial.
Phases = dict[str, dict[str, float]]


class Scoreboard:
    """Results as the ledger and the scorings give them.

    Each ended trial is taken in once, so that what a trial costs does not grow with the study;
    the trials themselves are the ledger's, which is open.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._objectives = ledger.header.config.objectives
        self._front: dict[str, tuple[float, ...]] = {}
        self._counts: dict[str, int] = {"completed": 0, "pruned": 0, "failed": 0}
        # What each ended trial put on the front, in the order of their ends.
        self._points: list[list[tuple[float, ...]]] = []
        self._growth: list[float] = []  # as far as it was asked for, with the front that it is of
        self._grown: list[tuple[float, ...]] = []
        self.base: dict[QuestionPart, dict[str, Score]] = {}  # as far as they are known
        self.held_out: dict[str, dict[str, Score]] = {}  # of trials on the front
        # Why trials are lost that have not ended, known when the study stops; and why the base or
        # trials of the front have no held-out scores.
        self.lost: dict[str, str] = {}
        self.unscored: dict[str, str] = {}
        for record in sorted(ledger.ended, key=lambda record: record.ended or ""):
            self.add(record)

    def add(self, record: Record) -> TrialRecord:
        """Take in a trial that has ended, once; returns it as it stands now."""
        trial = self._trial(record)
        own = {
            each.result.trial_id: each.point
            for each in (trial, *trial.harvested)
            if each.point is not None and each.feasible
        }
        if own:
            # What dominates it or is dominated by it is on the front, which stays small: no need to
            # look at all points.
            points = {**self._front, **own}
            kept = zip(points.items(), front_mask(list(points.values())), strict=True)
            self._front = {name: point for (name, point), on_front in kept if on_front}
        self._points.append([point for name, point in own.items() if name in self._front])
        self._counts[trial.result.status] += 1
        return self._trial(record)

    def trials(self) -> list[TrialRecord]:
        """Ended and lost trials by id, with the front marked and held-out scores where known."""
        ended = [self._trial(record) for record in self._ledger.ended]
        return sorted([*ended, *self.lost_trials()], key=lambda t: trial_order(t.result.trial_id))

    def lost_trials(self) -> list[TrialRecord]:
        """Trials that were lost and have not ended, by id."""
        return [
            TrialRecord(record.config, TrialResult(trial_id=name, status="lost", error=cause))
            for name, cause in self.lost.items()
            if (record := self._ledger.records[name]).result is None
        ]

    def candidates(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """The same trials, and what was harvested of each behind it."""
        return [
            candidate
            for trial in trials
            for candidate in (trial, *map(self._placed, trial.harvested))
        ]

    def front(self) -> list[TrialRecord]:
        """The candidates that no other dominates, by id."""
        trials = {origin(name)[0]: None for name in sorted(self._front, key=trial_order)}
        found = self.candidates([self._trial(self._ledger.records[name]) for name in trials])
        return [candidate for candidate in found if candidate.on_front]

    def with_scores(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """The same trials, those on the front with their scores, which the ledger has on disk."""
        return [self._whole(trial) if trial.on_front else trial for trial in trials]

    def _whole(self, candidate: TrialRecord) -> TrialRecord:
        name = candidate.result.trial_id
        trial = self._trial(self._ledger.whole(origin(name)[0]))
        return next(each for each in self.candidates([trial]) if each.result.trial_id == name)

    def counts(self) -> dict[str, int]:
        """Ended and lost trials by status."""
        return {**self._counts, "lost": len(self.lost_trials())}

    def show_on(self, standing: Standing) -> None:
        """Bring the console's numbers up to date."""
        standing.counts = self.counts()
        standing.front = len(self._front)
        standing.hypervolume = self.hypervolume

    @property
    def reference_point(self) -> tuple[float, ...] | None:
        """Nothing forgotten, and half the base's score of what is kept; each as a point has it.

        None until the base is scored.
        """
        base = self.base.get("search")
        if base is None:
            return None
        known = {name: score.value for name, score in base.items()}
        return tuple(_reference(name, known) for name in self._objectives)

    @property
    def growth(self) -> Sequence[float]:
        """Hypervolume above the reference point after each ended trial; empty without the base."""
        reference = self.reference_point
        if reference is None:
            return ()
        for added in self._points[len(self._growth) :]:
            volume = self._growth[-1] if self._growth else 0.0
            if added:
                points = [*self._grown, *added]
                self._grown = [points[i] for i in np.flatnonzero(front_mask(points))]
                volume = hypervolume(self._grown, reference)
            self._growth.append(volume)
        return self._growth

    @property
    def history(self) -> list[tuple[float, float]]:
        """Seconds from the study's start, pauses included, to each trial's end, and the growth."""
        start = datetime.fromisoformat(self._ledger.header.started)
        ends = sorted(datetime.fromisoformat(each.ended or "") for each in self._ledger.ended)
        growth = zip(ends, self.growth, strict=False)  # none without the base
        return [((end - start).total_seconds(), volume) for end, volume in growth]

    @property
    def hypervolume(self) -> float | None:
        """Of the front above the reference point; None until the base is scored."""
        if self.reference_point is None:
            return None
        return self.growth[-1] if self.growth else 0.0

    def is_flat(self, trials: int | None) -> bool:
        """Whether the last so many ended trials have added next to nothing; never for None.

        Nor while no trial is on the front: what there is to find has not been found then.
        """
        if trials is None or not self.hypervolume:
            return False
        return len(self.growth) - flat_since(self.growth) >= trials

    def _trial(self, record: Record) -> TrialRecord:
        assert record.result is not None
        objectives = self._objectives
        return self._placed(TrialRecord(record.config, record.result, objectives=objectives))

    def _placed(self, candidate: TrialRecord) -> TrialRecord:
        name = candidate.result.trial_id
        return replace(candidate, on_front=name in self._front, held_out=self.held_out.get(name))


def _reference(objective: str, base: Mapping[str, float]) -> float:
    if objective not in base:  # a reduction
        return 0.0
    return -base[objective] if minimised(objective) else 0.5 * base[objective]


def phases(ended: Sequence[Record], study_s: Mapping[str, float]) -> Phases:
    """Where the time went, by phase; ``study_s`` has the study's own.

    ``teacher`` is the part of training that the teacher store may spare. ``overhead`` is everything
    of a trial after its slot's first that is neither train nor evaluate: the teacher, saving,
    reporting, and waiting for the next trial.
    """
    seconds = [record.result.seconds for record in ended if record.result is not None]
    spent = {name: [row[name] for row in seconds if name in row] for name in TRIAL_PHASES}
    spent["overhead"] = [r.overhead_s for r in ended if r.overhead_s is not None]
    found: Phases = {
        name: {"total_s": sum(each), "median_s": statistics.median(each)}
        for name, each in spent.items()
        if each
    }
    found |= {name: {"total_s": total} for name, total in study_s.items()}
    if ended:
        found["log"]["median_s"] = study_s["log"] / len(ended)
    order = ("start-up", "load", *TRIAL_PHASES, "log", "re-score", "overhead")
    return {name: found[name] for name in order if name in found}


def store_use(ended: Sequence[Record], store: Path) -> dict[str, Any]:
    """What the store in a folder holds, and how often it spared a teacher after the first trial."""
    # The first trial fills an empty store, and would hide how well the store serves the others.
    used = [r.result.store for r in ended if r.result and r.result.store]
    if not used:
        return {}
    later = sum(map(Counter, used[1:]), Counter[str]())
    asked = later["teacher_hits"] + later["teacher_misses"]
    held = info(store)
    return {
        "hit_rate_after_first_trial": later["teacher_hits"] / asked if asked else None,
        "targets_after_first_trial": asked,
        "vision_passes_after_first_trial": later["vision_misses"],
        "bytes": held.bytes,
        "entries": held.entries,
        "limit_bytes": held.limit_bytes,
        "bytes_by_kind": {kind: usage.bytes for kind, usage in held.by_kind.items()},
    }


@dataclass(frozen=True)
class Material:
    """What a study is made of, as far as it is known."""

    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of ``dataset`` and ``base``
    verbatim: Verbatim = field(default_factory=dict)  # see ``splits.count_verbatim``


def study_summary(
    plan: Plan,
    ledger: Ledger,
    board: Scoreboard,
    material: Material,
    ending: Ending,
    study_s: Mapping[str, float],
) -> dict[str, Any]:
    """The content of ``study.json``; ``study_s`` are seconds of the study's own phases."""
    header, trials = ledger.header, board.trials()
    metrics = [trial.result.metrics for trial in trials]
    shown = [found["retain_seen_shown"] for found in metrics if "retain_seen_shown" in found]
    return {
        "study_id": header.study_id,
        "config": plan.config,
        "warm_start": plan.prior,
        "seed": plan.config.seed,
        "output": plan.config.output,
        "interrupted": ending.cut_short,
        "error": shortfall(trials, ending.stopped, board.unscored),
        **provenance(),
        "data_sha256": material.hashes.get("dataset"),
        "base_sha256": material.hashes.get("base"),
        "search_space_sha256": plan.space.sha256,
        "search_space": plan.space.section,
        "trained_verbatim": material.verbatim,
        "retain_seen": {
            "people": plan.request.retain_people // 2,
            "shown_least": min(shown, default=None),
            "shown_most": max(shown, default=None),
        },
        "left_out": plan.left_out,
        "base": dict(board.base),
        "reference_point": board.reference_point,
        "hypervolume": board.hypervolume,
        "flat_since": flat_since(board.growth),
        "outlook": said_of_growth(board.growth),
        "agreement": said_of_rungs(ledger.ended, plan.config.objectives),
        "front": [trial.result.trial_id for trial in board.front()],
        "counts": board.counts(),
        "started": header.started,
        "ended": now(),
        "wall_s": ending.elapsed_s,
        "phases": phases(ledger.ended, study_s),
        "store": store_use(ledger.ended, plan.config.output / "store"),
        "files": (*TABLES, *([CANDIDATES] if plan.config.harvest else [])),
    }


def shortfall(
    trials: Sequence[TrialRecord], stopped: str | None, unscored: Mapping[str, str]
) -> str | None:
    """Why a study has not all that it should have, in one sentence; None if it has.

    ``stopped`` is what of the environment ended it, ``unscored`` why there are no held-out scores.
    """
    status = Counter(trial.result.status for trial in trials)
    if stopped is not None:
        return said_of_a_stop(stopped)
    if status["lost"]:
        cause = _commonest(trials, "lost")
        return f"Lost, {status['lost']} of {len(trials)} trials: {cause}; go on with --resume."
    if status["failed"] and not status["completed"]:
        cause = _commonest(trials, "failed")
        return (
            f"No trial completed, {status['failed']} of {len(trials)} failed: {cause}; run them "
            "again with --resume --retry-failed once it is mended."
        )
    candidates = [each for t in trials for each in (t, *t.harvested) if each.point is not None]
    infeasible = [candidate for candidate in candidates if not candidate.feasible]
    if infeasible and len(infeasible) == len(candidates):
        nearest = min(infeasible, key=lambda trial: max(trial.result.missed.values()))
        return (
            f"No trial keeps what --require asks; the nearest, {nearest.result.trial_id}, misses "
            f"{misses_of(nearest.result)}. Ask for less in a new study, or go on with --resume and "
            "more --trials."
        )
    if unscored:
        name, cause = next(iter(unscored.items()))
        return (
            f"No held-out scores for {len(unscored)} of the base and the front, such as {name}: "
            f"{cause.rstrip('.')}."
        )
    return None


def said_of_growth(volumes: Sequence[float]) -> str | None:
    """Whether more trials are worth it, in a sentence; None while none is on the front.

    ``volumes`` are the hypervolumes after each trial. A quarter of the trials, and four, are what a
    front must have been flat for to be called so.
    """
    ended, since = len(volumes), flat_since(volumes)
    if not since or not volumes[-1]:
        return None
    idle = ended - since
    if idle >= max(4, ended / 4):
        return (
            f"The front is flat: the last {idle} of {ended} trials added less than {FLAT:.1%} of "
            "the hypervolume."
        )
    return f"The front still grew at trial {since} of {ended}; more trials may be worth it."


def said_of_rungs(ended: Sequence[Record], objectives: Sequence[str]) -> str | None:
    """Whether trials stood at the rungs as at their end, in a sentence; None without three trials.

    By Kendall's tau-b of each objective over the trials that were trained to the end: 1 where a
    rung ranks them as the end does, 0 where it knows nothing of that.
    """
    rungs: dict[int, list[tuple[Mapping[str, float], Mapping[str, float]]]] = {}
    for record in ended:
        for heard in record.epochs:
            then, result = heard.report.metrics, record.result
            if objectives[0] in then and result is not None and result.status == "completed":
                rungs.setdefault(heard.report.epoch, []).append((then, result.metrics))
    known = sorted((at, pairs) for at, pairs in rungs.items() if len(pairs) > 2)
    if not known:
        return None
    # Only now: it takes a second, which a signal may not leave to a study without rungs.
    from scipy.stats import kendalltau

    told = []
    for epoch, pairs in known:
        taus = []
        for name in objectives:
            tau = kendalltau([then[name] for then, _ in pairs], [end[name] for _, end in pairs])
            taus.append(f"{tau.statistic:.2f} in {name}")
        told.append(f"behind epoch {epoch} {', '.join(taus)} ({len(pairs)} trials)")
    rest = "of rung and end, over the trials that were not stopped"
    return f"Kendall's tau {rest}: {'; '.join(told)}."


def said_of_a_stop(cause: str) -> str:
    """The sentence for a study that the environment ended."""
    return f"The study stopped: {cause.rstrip('.')}; go on with --resume."


def _commonest(trials: Sequence[TrialRecord], status: TrialStatus) -> str:
    errors = Counter(trial.result.error for trial in trials if trial.result.status == status)
    return (errors.most_common(1)[0][0] or "unknown").rstrip(".")
