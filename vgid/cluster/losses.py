"""What the environment lost: how often each job is tried again, and when that is no use.

A lost trial has not ended: its record stays in flight, its checkpoint stays, and Optuna is told
nothing. Whose fault an error is says ``vgid.cluster.blame``.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from vgid.cluster.mailbox import Job, Outcome
from vgid.interrupts import POLL_S

RETRIES = 3
"""How often a lost job is put in flight again in one run of the study."""

IN_A_ROW = 3
"""So many different trials lost one after the other, of one cause, and the study stops."""


class Losses:
    """What one run of a study has lost.

    Attributes:
        causes: why, by the id of each trial that was lost and has not ended since.
    """

    def __init__(self) -> None:
        self.causes: dict[str, str] = {}
        self._attempts: Counter[str] = Counter()
        self._cause = ""
        self._row: set[str] = set()  # of trials that were lost one after the other
        self._steps = 0  # how many things that died one after the other it takes to explain it
        self._begun: dict[str, int] = {}  # after how many of them a trial was put in flight

    def begin(self, trial_id: str) -> int:
        """A trial is put in flight; returns which attempt of this run it is, from 1."""
        self._begun[trial_id] = self._steps
        self._attempts[trial_id] += 1
        return self._attempts[trial_id]

    def lose(self, trial_id: str, cause: str) -> bool:
        """A trial was lost for ``cause``; returns whether it is to be tried again."""
        self.causes[trial_id] = cause
        if cause != self._cause:
            self._new_row()
            self._cause = cause
        self._row.add(trial_id)
        # Trials that ran side by side when one thing died are one step, not several.
        self._steps = max(self._steps, self._begun.pop(trial_id, self._steps) + 1)
        return self._attempts[trial_id] <= RETRIES

    def end(self, trial_id: str) -> None:
        """A trial ended, so the environment is well."""
        self.causes.pop(trial_id, None)
        self._new_row()

    @property
    def hopeless(self) -> str | None:
        """The cause that lost ``IN_A_ROW`` trials one after the other; None while there is none."""
        # Three trials, so that one that kills its worker each time does not end the study; three
        # steps, so that one node that takes three trials with it does not either.
        enough = min(self._steps, len(self._row)) >= IN_A_ROW
        return self._cause if enough else None

    def _new_row(self) -> None:
        self._row.clear()
        self._steps = 0
        self._begun = dict.fromkeys(self._begun, 0)


def outcome_of(
    mailbox: Any, job: Job, is_over: Callable[[], bool], out_of_time: Callable[[], bool]
) -> Outcome:
    """Wait for the outcome of a scoring; one that was lost is asked for again, so many times.

    If ``is_over``, the wait ends soon, whatever the slots are about.
    """
    import ray

    while True:
        # Asked once and waited for in short turns: a plain ray.get would hear no signal until
        # the job ends.
        asked = mailbox.next_message.remote(job.id)
        while not ray.wait([asked], timeout=POLL_S)[0]:
            if is_over():
                return Outcome(job_id=job.id, error="interrupted")
        outcome: Outcome = ray.get(asked)
        again = outcome.lost and not outcome.fatal and job.attempt <= RETRIES
        if not again or is_over() or out_of_time():
            return outcome
        job = job.model_copy(update={"attempt": job.attempt + 1})
        ray.get(mailbox.submit.remote(job))
