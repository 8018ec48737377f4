"""What the results of a study amount to at any moment: front, hypervolume, counts."""

from collections.abc import Sequence
from dataclasses import replace

from vgid.pareto import GrowingFront
from vgid.report.records import TrialRecord
from vgid.results import QuestionPart, Score, TrialResult, trial_order
from vgid.study.console import Standing
from vgid.study.ledger import Ledger, Record


class Scoreboard:
    """Results as the ledger and the scorings give them.

    Each ended trial is taken in once, so that what a trial costs does not grow with the study;
    the trials themselves are the ledger's, which is open.

    Attributes:
        base: scores of the base model by part of the questions, as far as they are known.
        held_out: held-out scores of trials on the front, by trial id.
        lost: why trials are lost that have not ended, by trial id; known when the study stops.
        unscored: why the base or trials of the front have no held-out scores, by name.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._front = GrowingFront()
        self._counts: dict[str, int] = {"completed": 0, "pruned": 0, "failed": 0}
        self._volume: float | None = None
        self.base: dict[QuestionPart, dict[str, Score]] = {}
        self.held_out: dict[str, dict[str, Score]] = {}
        self.lost: dict[str, str] = {}
        self.unscored: dict[str, str] = {}
        for record in ledger.ended:
            self.add(record)

    def add(self, record: Record) -> TrialRecord:
        """Take in a trial that has ended, once; returns it as it stands now."""
        trial = self._trial(record)
        if trial.point is not None and self._front.add(record.trial_id, trial.point):
            # Computed anew only when the front changes: most trials of a long study are not on it.
            self._volume = None
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

    def front(self) -> list[TrialRecord]:
        """The trials that no other trial dominates, by id."""
        names = sorted(self._front.names, key=trial_order)
        return [self._trial(self._ledger.records[name]) for name in names]

    def with_scores(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """The same trials, those on the front with their scores, which the ledger has on disk."""
        found = []
        for trial in trials:
            whole = self._ledger.whole(trial.result.trial_id).result if trial.on_front else None
            found.append(trial if whole is None else replace(trial, result=whole))
        return found

    def counts(self) -> dict[str, int]:
        """Ended and lost trials by status."""
        return {**self._counts, "lost": len(self.lost_trials())}

    def show_on(self, standing: Standing) -> None:
        """Bring the console's numbers up to date."""
        standing.counts = self.counts()
        standing.front = len(self._front)
        standing.hypervolume = self.hypervolume

    @property
    def reference_point(self) -> tuple[float, float] | None:
        """Where the hypervolume counts from: nothing forgotten, half the base's retain score.

        Fixed by the base model, whatever the front is; None until the base is scored.
        """
        base = self.base.get("search")
        return None if base is None else (0.0, 0.5 * base["retain_rougeL"].value)

    @property
    def hypervolume(self) -> float | None:
        """Of the front above the reference point; None until the base is scored."""
        reference = self.reference_point
        if reference is not None and self._volume is None:
            self._volume = self._front.hypervolume(reference)
        return self._volume

    def _trial(self, record: Record) -> TrialRecord:
        assert record.result is not None
        name = record.trial_id
        return TrialRecord(
            record.config, record.result, name in self._front, self.held_out.get(name)
        )
