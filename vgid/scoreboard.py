"""What the results of a study amount to at any moment: front, hypervolume, counts."""

from vgid.ledger import Ledger
from vgid.outputs import TrialRecord
from vgid.pareto import front_mask, hypervolume
from vgid.results import QuestionPart, Score

NOWHERE = (float("nan"), float("nan"))


class Scoreboard:
    """Results as the ledger and the scorings give them; nothing is kept that could disagree.

    Args:
        ledger: the study's record.

    Attributes:
        base: scores of the base model by part of the questions, as far as they are known.
        held_out: held-out scores of trials on the front, by trial id.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.base: dict[QuestionPart, dict[str, Score]] = {}
        self.held_out: dict[str, dict[str, Score]] = {}

    def trials(self) -> list[TrialRecord]:
        """All ended trials by id, with the front marked and held-out scores where known."""
        plain = [
            TrialRecord(record.config, record.result)
            for record in self._ledger.ended
            if record.result is not None
        ]
        if not plain:
            return []
        mask = front_mask([trial.point or NOWHERE for trial in plain])
        return [
            TrialRecord(
                trial.config,
                trial.result,
                bool(on_front),
                self.held_out.get(trial.result.trial_id),
            )
            for trial, on_front in zip(plain, mask, strict=True)
        ]

    def front(self) -> list[TrialRecord]:
        """The trials that no other trial dominates, by id."""
        return [trial for trial in self.trials() if trial.on_front]

    def counts(self) -> dict[str, int]:
        """Ended trials by status."""
        found = {"completed": 0, "pruned": 0, "failed": 0}
        for trial in self.trials():
            found[trial.result.status] += 1
        return found

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
        if reference is None:
            return None
        points = [trial.point for trial in self.trials() if trial.point is not None]
        return hypervolume(points, reference) if points else 0.0
