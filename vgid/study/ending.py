"""Why a study ends before its time, if it does, and the waits that hear of it."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vgid.errors import DiskError, InputError
from vgid.interrupts import Interrupt

INTERRUPTED = "The study was interrupted; go on with --resume."


@dataclass
class Ending:
    """What may end a study: a signal, bad input, the environment, its time budget.

    Whoever waits in a study waits for this too. Of several causes the first is told.
    """

    budget_s: float | None  # after which no new trial starts
    interrupt: Interrupt = field(default_factory=Interrupt, init=False)
    failure: str | None = field(default=None, init=False)  # bad input: no trial can get past it
    stopped: str | None = field(default=None, init=False)  # by the environment, for a resume
    cut_short: bool = field(default=False, init=False)  # a signal left something undone
    left: bool = field(default=False, init=False)  # the driver leaves by an exception of its own
    _started: float = field(default_factory=time.monotonic, init=False)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the study's start."""
        return time.monotonic() - self._started

    def is_over(self) -> bool:
        """Whether the study ends before its time."""
        ended = self.failure is not None or self.stopped is not None
        return ended or self.left or self.interrupt.came

    def out_of_time(self) -> bool:
        """Whether the time budget is over."""
        return self.budget_s is not None and self.elapsed_s > self.budget_s

    def stop(self, cause: str) -> None:
        """End the study for what is no trial's fault; a resume goes on from there."""
        self.stopped = self.stopped or cause

    def fail(self, sentence: str) -> None:
        """End the study for bad input."""
        self.failure = self.failure or sentence

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Bad input or a full disk in the block ends the study, not the block's caller."""
        try:
            yield
        except DiskError as error:
            self.stop(str(error))
        except InputError as error:
            self.fail(str(error))

    def finishes(self, work: "Future[Any]") -> bool:
        """Whether some work is done, as far as a signal leaves it the time."""
        done = self.interrupt.allows(work)
        self.cut_short |= not done
        return done
