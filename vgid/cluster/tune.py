"""Ray Tune's side of a trial: a trainable that hands its config to a slot and passes reports on.

It holds no resources and no model, and Tune reuses its process for the next trial.
"""

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler

from vgid.cluster.mailbox import Job, Outcome
from vgid.requirement import OBJECTIVES
from vgid.results import EpochReport

# Key of a Tune config: the job as JSON, which is all that a trial goes by. The searched fields
# stand beside it for Ray's tables and dashboard, which show a parameter a column.
JOB = "job"
CANCEL_S = 5.0  # how long the end of a study waits for a mailbox that may be starting again
REPORT, OUTCOME = "report", "outcome"  # keys of a Tune result, each with one as JSON


def told(message: EpochReport | Outcome) -> dict[str, Any]:
    """What Ray Tune is told of a message: the objectives, and the message as one text."""
    # In the driver Tune keeps statistics of every number that a trial ever reported: of all of a
    # trial's scores, 0.4 MB a trial.
    if isinstance(message, EpochReport):
        return {REPORT: message.model_dump_json()}
    metrics = {} if message.result is None else message.result.metrics
    shown = {name: metrics[name] for name in OBJECTIVES if name in metrics}
    return {**shown, OUTCOME: message.model_dump_json(), "done": True}


class SlotTrial(tune.Trainable):
    """One trial as Ray Tune sees it: a step is an epoch, the last step carries the outcome."""

    def setup(self, config: dict[str, Any], mailbox: Any = None) -> None:
        """Keep the mailbox; the job is submitted by the first step."""
        self._mailbox = mailbox
        # A trial whose process Tune lost may be asked for by two processes at once; the mailbox
        # answers the newer one, by this name.
        self._caller = secrets.token_hex(8)
        self._job = Job.model_validate_json(config[JOB])
        self._open = False

    def step(self) -> dict[str, Any]:
        """Wait for the trial's next epoch report or its outcome."""
        if not self._open:
            ray.get(self._mailbox.submit.remote(self._job, self._caller))
            self._open = True
        message = ray.get(self._mailbox.next_message.remote(self._job.id, self._caller))
        return told(message)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process; a trial that Tune stopped frees its slot."""
        self.cleanup()
        self._job = Job.model_validate_json(new_config[JOB])
        return True

    def cleanup(self) -> None:
        """Free the slot if the trial still runs in it; have its outcome forgotten if not."""
        if self._open:
            ray.get(self._mailbox.cancel.remote(self._job.id, self._caller))
            self._open = False


class Live:
    """A part of Tune that belongs to the running study: Tune pickles it at the start, empty."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the study lives in the ledger, not in a pickle."""
        return {}


@dataclass(eq=False)
class Recorder(Live, tune.Callback):
    """Tells the study what its trials do, in the driver, in the order in which it happens.

    ``on_end`` is told None for the outcome of a trial that the scheduler stopped, whose last report
    it is given instead, or whose process died.
    """

    on_end: Callable[[str, Outcome | None, EpochReport | None], None]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass the outcome of a trial on; Tune, which keeps every trial, need not keep it."""
        last = trial.last_result or {}
        text = last.pop(OUTCOME, None)
        outcome = None if text is None else Outcome.model_validate_json(text)
        report = EpochReport.model_validate_json(last[REPORT]) if REPORT in last else None
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()
        self.on_end(_job(trial).id, outcome, report)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trainable's own process died; the slot's worker may be well."""
        self.on_end(_job(trial).id, None, None)


@dataclass(eq=False)
class Verdicts(Live, FIFOScheduler):
    """Passes epoch reports on, and stops the trials that are not to go on after theirs."""

    on_epoch: Callable[[str, EpochReport], bool]

    def __post_init__(self) -> None:
        super().__init__()

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial trains on, as Tune calls it."""
        if REPORT in result:
            report = EpochReport.model_validate_json(result[REPORT])
            if not self.on_epoch(_job(trial).id, report):
                return str(self.STOP)
        return str(self.CONTINUE)


@dataclass(eq=False)
class _StopWhenOver(Live, tune.Stopper):
    """Stops the whole search as soon as it is over, and wakes everyone who waits for a trial."""

    is_over: Callable[[], bool]
    mailbox: Any

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if not self.is_over():
            return False
        with contextlib.suppress(ray.exceptions.RayError):  # without a mailbox nobody waits for it
            ray.get(self.mailbox.cancel_all.remote(), timeout=CANCEL_S)
        return True


def run_trials(
    search: Any,
    mailbox: Any,
    verdicts: Verdicts,
    recorder: Recorder,
    is_over: Callable[[], bool],
    storage: Path,
) -> None:
    """Have Ray Tune run what the search proposes; ``OSError`` if it cannot write its own files."""
    # No CPU: the slots need them all. On the head, where the driver and mailbox are.
    # The smallest share there is: 10,000 trials may be in flight.
    resources = tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.0001}])
    trainable = tune.with_parameters(SlotTrial, mailbox=mailbox)
    tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            # The search says when it is over; a lost trial is one more to Tune.
            search_alg=search,
            scheduler=verdicts,
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{secrets.token_hex(4)}",
            storage_path=str(storage),
            verbose=0,
            # The slot's worker keeps the trial's state itself. By itself Tune has each trial saved
            # at its end, and keeps its outcome with the place.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[recorder],
            stop=_StopWhenOver(is_over, mailbox),
        ),
    ).fit()


def _job(trial: Any) -> Job:
    return Job.model_validate_json(trial.config[JOB])
