"""What becomes of a job that ended with an exception: whose fault it is, and whether it runs again.

The environment's fault is what would not have happened to the same job elsewhere or later: a
worker, slot, node or mailbox that died, a full disk, any error of the operating system, of Ray or
between the workers of a trial, memory that is not there. The input's is an ``InputError``, and all
else that a trial's own code raises is the trial's.

What the environment lost has not ended: a lost trial's record stays in flight, its checkpoint
stays, and Optuna is told nothing.
"""

import errno
import os
import re
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vgid.cluster.mailbox import Job, Outcome, failure
from vgid.errors import DiskError, InputError, SettingError
from vgid.interrupts import POLL_S

RETRIES = 3  # how often a lost job is put in flight again in one run of the study
IN_A_ROW = 3  # different trials lost one after the other, of one cause, stop the study
# Classes of Ray and torch go by their names: neither need be there. After this one, the accelerator
# does nothing any more for its process.
BROKEN_ACCELERATOR = "torch.AcceleratorError"
ENVIRONMENTS = ("ray.exceptions.RayError", "torch.distributed.DistError", BROKEN_ACCELERATOR)
# Errors of the system, of memory and between workers that come as another kind of exception.
TOLD_BY_MESSAGE = re.compile(r"\(os error \d+\)|DefaultCPUAllocator|gloo/")


def blame(job: Job, error: Exception, has_session: bool, folders: Sequence[Path] = ()) -> Outcome:
    """The outcome of a job that ended with an exception.

    ``has_session``: model and data had been loaded by then. ``folders``: where the job writes, to
    name the one that is full.
    """
    own = has_session and (job.kind == "rescore" or isinstance(error, SettingError))
    # Once, it may be the neighbour on the card; a job for which memory is short again is too large
    # itself, and fails as any other trial does.
    if _is_environments(error) or (is_a(error, "torch.OutOfMemoryError") and job.attempt == 1):
        said = str(error) if isinstance(error, DiskError) else disk_sentence(error, folders)
        outcome = failure(job, said, lost=True)
    elif isinstance(error, InputError) and not own:
        outcome = Outcome(job_id=job.id, error=str(error), fatal=True)
    else:
        outcome = failure(job, str(error) if isinstance(error, InputError) else where(error))
    trace = "".join([*traceback.format_tb(error.__traceback__), f"{type(error).__name__}\n"])
    return outcome.model_copy(update={"trace": trace})


def is_a(error: BaseException, name: str) -> bool:
    """Whether an exception is of the class of that full name, or of one derived from it."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == name for kind in type(error).__mro__)


def where(error: BaseException) -> str:
    """Name an exception by its kind and place; its message may quote a question or an answer."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def disk_sentence(error: Exception, folders: Sequence[Path]) -> str:
    """Says which of the folders is full, if one is, else what the system refused, if it did."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # of a library written in Rust
    number = error.errno if isinstance(error, OSError) else told and int(told[1])
    if number in (errno.ENOSPC, errno.EDQUOT):
        there = [folder for folder in (*folders, Path(tempfile.gettempdir())) if folder.is_dir()]
        fullest = min(there, key=lambda folder: shutil.disk_usage(folder).free)
        return f"{fullest}: its disk is full; free some space."
    return f"{where(error)} ({os.strerror(number)})" if number else where(error)


def _is_environments(error: Exception) -> bool:
    if isinstance(error, (OSError, MemoryError, DiskError)):
        return True
    if any(is_a(error, name) for name in ENVIRONMENTS):
        return True
    return not isinstance(error, InputError) and bool(TOLD_BY_MESSAGE.search(str(error)))


class Losses:
    """What one run of a study has lost."""

    def __init__(self) -> None:
        self.causes: dict[str, str] = {}  # by each trial that was lost and has not ended since
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
        """The cause that lost ``IN_A_ROW`` trials one after the other, if there is one."""
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
    """Wait for a scoring's outcome, asked for again where lost; ``is_over`` ends the wait."""
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
