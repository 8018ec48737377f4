"""What becomes of trials' reports while they run, in Ray Tune's callbacks in the driver.

``Listener`` decides what a report means: it writes the ledger, tells the search, tries a lost trial
again. ``Bulletin`` then tells people: on the console, on MLflow, in ``trials.csv``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vgid.cluster.losses import Losses
from vgid.cluster.mailbox import Outcome
from vgid.errors import log_place
from vgid.interrupts import Background
from vgid.report.records import TrialsTable, describe
from vgid.results import EpochReport, TrialResult
from vgid.study.console import StudyConsole
from vgid.study.ending import Ending
from vgid.study.halving import goes_on
from vgid.study.ledger import Ledger, Record, now
from vgid.study.outcome import Scoreboard

if TYPE_CHECKING:
    from vgid.study.search import ParetoSearch
    from vgid.study.tracking import Tracker


@dataclass
class Bulletin:
    """Tells of trials: the console at once, table and MLflow in a thread each, in order."""

    console: StudyConsole
    board: Scoreboard
    table: TrialsTable
    ending: Ending

    def __post_init__(self) -> None:
        self._tracker: Tracker  # from ``catch_up`` on
        # The second may be at work after ``close``, on a server that hangs.
        self._tables, self.mlflow = Background("tables"), Background("mlflow")

    @property
    def faults(self) -> list[str]:
        """Kinds of exceptions for which not all was written."""
        return [side.fault for side in (self._tables, self.mlflow) if side.fault is not None]

    @property
    def seconds(self) -> float:
        """Spent on writing."""
        return self._tables.seconds + self.mlflow.seconds

    def catch_up(self, records: Iterable[Record], tracker: "Tracker") -> None:
        """Bring table and MLflow in line with what the ledger has of earlier runs."""
        self._tracker = tracker
        self._tabulate(self.table.write, self.board.trials())
        for record in records:
            self.mlflow.write(self._tracker.log_trial, record)
        self.board.show_on(self.console.standing)

    def running(self, record: Record, report: EpochReport | None = None) -> None:
        """A trial was put in flight, or reached the end of an epoch."""
        self.console.epoch(record.trial_id, describe(record.config), report)
        self.mlflow.write(self._tracker.log_trial, record)

    def ended(self, record: Record) -> None:
        """A trial ended; a console that fails keeps it from nobody else."""
        result = record.result
        assert result is not None
        trial = self.board.add(record)
        with kept_from_tune(self.ending):
            if result.seconds:
                self.console.standing.trial_s.append(sum(result.seconds.values()))
            self.board.show_on(self.console.standing)
            self.console.ended(record.trial_id, result)
        self.mlflow.write(self._tracker.log_trial, record)
        if self.table.holds(trial):
            self._tabulate(self.table.add, trial)
        else:
            self._tabulate(self.table.write, self.board.trials())

    def lost(self, trial_id: str, cause: str) -> None:
        """The environment lost a trial, which stays in flight."""
        self.console.ended(trial_id, TrialResult(trial_id=trial_id, status="lost", error=cause))

    def still_lost(self, causes: dict[str, str], records: Mapping[str, Record]) -> None:
        """No more trials run: what is lost now stands in the tables and on MLflow as such."""
        self.board.lost = causes
        for trial in self.board.lost_trials():
            ended = {"result": trial.result, "ended": now()}
            lost = records[trial.result.trial_id].model_copy(update=ended)
            self.mlflow.write(self._tracker.log_trial, lost)

    def close(self) -> None:
        """Wait until all is written; what a signal leaves MLflow no time for is left out."""
        self._tables.submit(lambda: None).result()
        self.ending.finishes(self.mlflow.submit(lambda: None))
        self.mlflow.give_up()

    def _tabulate(self, write: Callable[[Any], None], what: Any) -> None:
        self._tables.write(self.ending.heeded()(write), what)


@dataclass
class Listener:
    """Hears how trials go, and makes it so: first of all in the ledger."""

    ledger: Ledger
    search: "ParetoSearch"
    losses: Losses
    bulletin: Bulletin
    ending: Ending
    mailbox: Any  # its actor's handle
    seconds: dict[str, float]  # by phase of the study; ``load`` grows with each outcome
    eta: int = 1  # ``StudyConfig.halving``
    _slots_used: set[int] = field(default_factory=set, init=False)

    def on_epoch(self, trial_id: str, report: EpochReport) -> bool:
        """Record an epoch; whether the trial is to train on."""
        with kept_from_tune(self.ending):
            record = self.ledger.epoch(trial_id, report)
            with kept_from_tune(self.ending):
                self.bulletin.running(record, report)
            if report.metrics.keys() >= set(self.ledger.header.config.objectives):
                own, *others = self.ledger.rung(trial_id, report.epoch)
                return goes_on(own, others, self.eta)
        return True

    def on_end(self, trial_id: str, outcome: Outcome | None, report: EpochReport | None) -> None:
        """Record how a trial ended, if it did (see ``vgid.cluster.tune.Recorder``)."""
        if self.ledger.records[trial_id].result is not None:
            return  # Tune stumbled over a trial that had ended
        if outcome is None and report is not None:
            self._end(TrialResult(trial_id=trial_id, status="pruned", metrics=report.metrics))
            return
        if outcome is None:
            outcome = Outcome(job_id=trial_id, error="its Ray Tune process died", lost=True)
        outcome.log_trace()
        cause = outcome.error or "for an unknown cause"
        if outcome.lost and outcome.fatal:
            self.ending.stop(cause)
        elif outcome.lost:
            self._lose(trial_id, cause)
        elif outcome.result is not None:
            self.seconds["load"] += outcome.load_s
            self._end(outcome.result, slot=outcome.slot, overhead_s=self._overhead(outcome))
        elif outcome.fatal and outcome.error is not None:  # otherwise it was interrupted
            self.ending.fail(outcome.error)

    def _end(self, result: TrialResult, **details: Any) -> None:
        """Record an end and tell everyone; one who fails keeps it from nobody else."""
        with kept_from_tune(self.ending):
            record = self.ledger.end(result.trial_id, result, **details)
            # The ledger has the result by now: whatever fails below, a resume makes good.
            self.losses.end(result.trial_id)
            with kept_from_tune(self.ending):
                self.search.tell(record)
            self.bulletin.ended(record)

    def _lose(self, trial_id: str, cause: str) -> None:
        """The environment lost a trial: it stays in flight, and is tried again so many times."""
        error = cause
        if self.losses.lose(trial_id, cause):
            self.search.try_again(trial_id)
            error = f"{cause.rstrip('.')}; it is tried again"
        else:
            self.mailbox.cancel.remote(trial_id)  # a slot may still be at it, for nobody
        self.bulletin.lost(trial_id, error)
        if self.losses.hopeless is not None:
            self.ending.stop(self.losses.hopeless)

    def _overhead(self, outcome: Outcome) -> float | None:
        first = outcome.slot not in self._slots_used
        self._slots_used.add(outcome.slot)
        if first or outcome.cycle_s is None or outcome.result is None:
            return None
        work = ("train", "evaluate")
        return outcome.cycle_s - sum(outcome.result.seconds.get(name, 0.0) for name in work)


@contextmanager
def kept_from_tune(ending: Ending) -> Iterator[None]:
    """Keep an error of the study's own from Ray Tune, which would fail the trial for it.

    Bad input or a full disk ends the study; anything else is only logged.
    """
    try:
        with ending.heeded():
            yield
    except Exception as error:
        log_place("Ignored", error)
