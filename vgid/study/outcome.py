"""What a study leaves: ``study.json``, why it has not all, and the outcome on MLflow."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgid.models.store import info
from vgid.provenance import provenance
from vgid.report.records import TrialRecord
from vgid.results import TrialStatus, Verbatim
from vgid.study.ending import Ending
from vgid.study.ledger import Ledger, Record, now
from vgid.study.plan import Plan
from vgid.study.scoreboard import Scoreboard

TABLES = ("study.json", "trials.csv", "front.csv")
TRIAL_PHASES = ("teacher", "train", "evaluate", "save")

Phases = dict[str, dict[str, float]]
"""Seconds by phase: ``total_s`` over the study, ``median_s`` of a trial."""


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
    """What a study is made of, as far as it is known.

    Attributes:
        hashes: SHA-256 of the ``dataset`` and of the ``base``.
        verbatim: which scored questions training sees (``splits.count_verbatim``).
    """

    hashes: dict[str, str] = field(default_factory=dict)
    verbatim: Verbatim = field(default_factory=dict)


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
        "front": [trial.result.trial_id for trial in board.front()],
        "counts": board.counts(),
        "started": header.started,
        "ended": now(),
        "wall_s": ending.elapsed_s,
        "phases": phases(ledger.ended, study_s),
        "store": store_use(ledger.ended, plan.config.output / "store"),
        "files": TABLES,
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
    if unscored:
        name, cause = next(iter(unscored.items()))
        return (
            f"No held-out scores for {len(unscored)} of the base and the front, such as {name}: "
            f"{_clause(cause)}."
        )
    return None


def said_of_a_stop(cause: str) -> str:
    """The sentence for a study that the environment ended."""
    return f"The study stopped: {_clause(cause)}; go on with --resume."


def _commonest(trials: Sequence[TrialRecord], status: TrialStatus) -> str:
    errors = Counter(trial.result.error for trial in trials if trial.result.status == status)
    return _clause(errors.most_common(1)[0][0] or "unknown")


def _clause(sentence: str) -> str:
    return sentence.rstrip(".")
