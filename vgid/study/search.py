"""The search: Optuna proposes trials to Ray Tune, two to four objectives at once.

Ray's own Optuna adapter loses track of failed and stopped trials when there are several
objectives, so this is a thin ``Searcher`` of our own over Optuna's ask and tell. The ledger is the
truth: at the start Optuna's journal is written anew from it, so both agree whatever was killed
when. The journal stays in the output folder and opens with Optuna's own tools.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from vgid.cluster.losses import Losses
from vgid.cluster.mailbox import Job
from vgid.cluster.tune import JOB, Live
from vgid.config import Sampler, StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.report.records import TrialRecord
from vgid.requirement import minimised
from vgid.study.ledger import Ledger, Record, trial_id
from vgid.study.search_space import SearchSpace

if TYPE_CHECKING:
    import optuna

# Optuna's journal in the output folder: ``JournalStorage(JournalFileBackend(path))``.
JOURNAL = "optuna.log"
# The first so many trials the Gaussian process proposes; beyond, TPE, whose proposals cost nothing.
# On formulas shaped like tiny-llava's trials (``python -m tests.benchmarks.samplers``, 20 seeds of
# 32 trials) the hypervolume missing to the best front is 2.31e-3 [2.15, 2.47] with the first and
# 2.46e-3 [2.23, 2.70] with the second, at 0.19 and 0.003 CPU s a proposal: not told apart.
GP_UP_TO = 100
MAX_REFUSED = 200  # proposals in a row that are no valid trials end the study


def make_sampler(kind: Sampler, seed: int, number: int) -> "optuna.samplers.BaseSampler":
    """The sampler that proposes trial ``number`` of a study.

    It depends on the study's seed and the trial's number only, so a resumed study proposes what an
    uninterrupted one would have, given the same results, and so does one that is to be longer.

    Optuna's Gaussian process knows only the parameters that all trials share. Sigma, which a trial
    has under Gaussian noise only, it leaves to another sampler, by default a random one; here that
    is TPE, which learns from the trials that have a sigma. Since trials that differ in sigma alone
    look equal to the Gaussian process, objectives count as noisy.
    """
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    if kind == "auto":
        kind = "gp" if number < GP_UP_TO else "tpe"
    # A sampler a trial, seeded by both: one sampler's state would depend on how many proposals it
    # made before, which a resumed study does not know. The factor keeps (0, 1) and (1, 0) apart.
    mixed = (seed * 1_000_003 + number) % 2**32
    if kind == "random":
        return samplers.RandomSampler(seed=mixed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # By groups, since trials with and without sigma have other parameters; lying, since trials
        # that run are to count as bad where they are, or two slots would be sent to the same place.
        tpe = samplers.TPESampler(seed=mixed, multivariate=True, group=True, constant_liar=True)
    if kind == "tpe":
        return tpe
    # The warning would come at every sigma, which is left to TPE on purpose.
    return samplers.GPSampler(seed=mixed, independent_sampler=tpe, warn_independent_sampling=False)


def open_journal(output: Path) -> "optuna.storages.JournalStorage":
    """The Optuna journal of an output folder."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(output / JOURNAL)))


def reconcile(
    ledger: Ledger, space: SearchSpace, trials: int
) -> "tuple[optuna.storages.JournalStorage, optuna.study.Study]":
    """Write Optuna's journal anew from the ledger, trial ids for numbers.

    Trials in flight come back as running, and first points that were not started as enqueued.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for path in ledger.output.glob(f"{JOURNAL}*"):  # with the lock that a killed process left
        path.unlink()
    storage = open_journal(ledger.output)
    objectives = ledger.header.config.objectives
    directions = ["minimize" if minimised(name) else "maximize" for name in objectives]
    name = ledger.header.study_id
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(objectives))
    for record in ledger.records.values():
        distributions = space.distributions(record.config.model_dump())
        state, values, attributes = _standing(record, objectives)
        trial = optuna.trial.create_trial(
            state=state,
            values=values,
            params={name: getattr(record.config, name) for name in distributions},
            distributions=distributions,
            user_attrs=attributes,
            constraints=missed_by(record),
        )
        trial.datetime_start = _local(record.started)
        trial.datetime_complete = None if record.ended is None else _local(record.ended)
        study.add_trial(trial)
    for point in space.first_points[len(ledger.records) : trials]:
        searched = {name: value for name, value in point.items() if name in space.searched}
        study.enqueue_trial(searched)
    return storage, study


@dataclass(eq=False, repr=False)
class ParetoSearch(Live, Searcher):
    """Proposes trials to Ray Tune and tells Optuna how they ended.

    While trials run, the next proposal is already being made in a thread: with the Gaussian
    process one costs a third of a second, more on busy cores. It is made from every result that
    was known when the trial before it started, and a result that comes in meanwhile waits for it,
    so that with one trial at a time the same seed gives the same study.
    """

    ledger: Ledger  # open; a trial is recorded before it is handed out
    space: SearchSpace
    config: StudyConfig  # its seed is every trial's too: they are compared on the same draws
    concurrent: Callable[[], int]  # how many trials may run at a time, now
    losses: Losses  # counts the attempts of each trial
    enough: Callable[[], bool] = lambda: False  # no new trial once this is true
    on_start: Callable[[Record], None] = lambda record: None  # told of each that is handed out

    def __post_init__(self) -> None:
        objectives = self.config.objectives
        modes = ["min" if minimised(name) else "max" for name in objectives]
        super().__init__(metric=list(objectives), mode=modes)
        self._lost: list[str] = []
        self._new_first = False
        self._storage, self._study = reconcile(self.ledger, self.space, self.config.trials)
        self._again = [record.trial_id for record in self.ledger.in_flight]
        self._numbers: dict[str, int] = {}  # in Optuna, where refused proposals have some as well
        self._running: set[str] = set()
        self._next: Future[tuple[str, TrialConfig]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="proposal")
        if not self._again:
            self._propose_ahead()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial: one that a killed study left in flight, a lost one, or a new proposal.

        It is a Tune config: what is searched, for Tune's own tables, and the job. None while enough
        trials run, or those that do may yet be lost and come back; else ``Searcher.FINISHED``.
        """
        if len(self._running) >= self.concurrent():
            return None
        if self.enough():
            return Searcher.FINISHED
        # What is known goes first, but for a lost trial that a new one is to go before.
        known = self._again
        if not known and not (self._new_first and self._next is not None):
            known = self._lost
        if known:
            name = known.pop(0)
            config = self.ledger.records[name].config
        elif self._next is not None:
            name, config = self._next.result()
            self._next = None
            self._new_first = False
        else:
            # Not finished while trials run: one of them may be lost and come back, and a search
            # that has said FINISHED is not asked again.
            return None if self._running else Searcher.FINISHED
        self._running.add(trial_id)
        self.on_start(self.ledger.start(name, config))
        if not self._again:
            self._propose_ahead()
        job = Job(
            id=name,
            kind="trial",
            trial=config,
            adapter=self.ledger.adapter(name),
            checkpoints=self.ledger.checkpoints(name),
            attempt=self.losses.begin(name),
        )
        searched = config.model_dump(include=set(self.space.searched), exclude_none=True)
        return {**searched, JOB: job.model_dump_json()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Free the trial's place; ``tell`` gives Optuna its result."""
        self._running.discard(trial_id)

    def try_again(self, name: str) -> None:
        """Put a lost trial in flight again, under its id; Optuna does not hear of it."""
        # If there is a new trial that one goes first: should it be lost too, it is known sooner
        # that the fault is in no trial.
        if name not in self._lost:
            self._lost.append(name)
        self._new_first = True

    def tell(self, record: Record) -> None:
        """Tell Optuna how a trial ended, from its record in the ledger."""
        from optuna.trial import Trial

        if self._next is not None:
            self._next.exception()  # waits: the proposal in the making must not see this result
        # A proposal that was refused has a number in Optuna and no trial here, so the two counts
        # part.
        number = self._numbers.get(record.trial_id, int(record.trial_id))
        storage = self._storage
        study = storage.get_study_id_from_name(self._study.study_name)
        trial = storage.get_trial_id_from_study_id_trial_number(study, number)
        state, values, attributes = _standing(record, self.config.objectives)
        for name, value in attributes.items():
            storage.set_trial_user_attr(trial, name, value)
        for bound, by in missed_by(record).items():
            Trial(self._study, trial).set_constraint(bound, by)
        self._study.tell(number, values, state)

    def close(self) -> None:
        """End the search; a proposal that was refused or never started leaves no trace."""
        self._thread.shutdown(wait=True)
        shifted = any(int(name) != number for name, number in self._numbers.items())
        # From then on a trial's number in the journal is its id again, which is what a reader
        # expects.
        if self._next is not None or shifted:
            reconcile(self.ledger, self.space, trials=0)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to save with Tune's snapshots: the ledger is written as trials start and end."""

    def _propose_ahead(self) -> None:
        if self._next is None and len(self.ledger.records) < self.config.trials:
            self._next = self._thread.submit(self._propose)

    def _propose(self) -> tuple[str, TrialConfig]:
        """The next trial; a point that is no valid trial fails for Optuna and costs no trial."""
        from optuna.trial import TrialState

        number, config = len(self.ledger.records), self.config
        for attempt in range(MAX_REFUSED):
            # A sampler does not learn from failures and might insist.
            kind: Sampler = "random" if attempt else config.sampler
            seed = config.seed + attempt
            self._study.sampler = make_sampler(kind, seed, number)
            trial = self._study.ask()
            try:
                proposed = self.space.trial_config(self.space.suggest(trial), config.seed)
            except InputError as error:
                refused = error
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                self._numbers[trial_id(number)] = trial.number
                return trial_id(number), proposed
        raise InputError(
            f"{refused} {MAX_REFUSED} proposals in a row were refused; search less of it."
        )


def _standing(
    record: Record, objectives: tuple[str, ...]
) -> "tuple[optuna.trial.TrialState, tuple[float, ...] | None, dict[str, Any]]":
    """A trial's state and values for Optuna, and what it is to keep beside; see ``reconcile``."""
    from optuna.trial import TrialState

    if (result := record.result) is None:
        return TrialState.RUNNING, None, {}
    scored = TrialRecord(record.config, result, objectives=objectives)
    values = scored.values  # without them, a completed trial has failed
    state = TrialState.PRUNED if result.status == "pruned" else TrialState.FAIL
    attributes: dict[str, Any] = {"metrics": result.metrics, "seconds": result.seconds}
    if result.error is not None:
        attributes["error"] = result.error
    return state if values is None else TrialState.COMPLETE, values, attributes


def missed_by(record: Record) -> dict[str, float]:
    """By how much an ended trial misses each of the study's bounds, which Optuna learns from."""
    return {} if record.result is None else record.result.missed


def _local(iso: str) -> datetime:
    """Optuna keeps local times without a zone."""
    return datetime.fromisoformat(iso).astimezone().replace(tzinfo=None)
