"""Signals that end a command in order, and threads for what must not be waited for without end."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from vgid.errors import log_place

GRACE_S = 3.0  # after a signal, for what a study would like to have: figures, MLflow
POLL_S = 0.1  # between looks of a wait at whether a signal came, which its handler only notes

T = TypeVar("T")


class StudyInterruptedError(Exception):
    """A signal came while the study waited for something that it now goes without."""


class Interrupt:
    """A signal that ends a study in order; use as a context manager.

    The first SIGINT or SIGTERM is only noted, and heard where the study waits or looks; a second
    one does what it did before.
    """

    def __init__(self) -> None:
        self._at: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if _has_signals():
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def came(self) -> bool:
        """Whether a signal has come."""
        return self._at is not None

    def check(self) -> None:
        """Raise ``StudyInterruptedError`` if a signal has come."""
        if self.came:
            raise StudyInterruptedError

    def result(self, future: "Future[T]") -> T:
        """Wait for what a thread makes; ``StudyInterruptedError`` if a signal comes first."""
        while not _done(future):
            self.check()
        return future.result()

    def allows(self, future: "Future[Any]") -> bool:
        """Wait for a thread's work, and raise what it raises; whether a signal left it the time."""
        while not _done(future):
            # A thread cannot be stopped from outside in Python; it can only be waited for, or not.
            if self._at is not None and time.monotonic() > self._at + GRACE_S:
                return False
        future.result()
        return True

    def _note(self, number: int, frame: Any) -> None:
        self._at = time.monotonic()
        # At once and for both signals, so that whoever sends SIGINT and then SIGTERM is heard the
        # second time.
        for known, handler in self._before.items():
            signal.signal(known, handler)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises ``KeyboardInterrupt``, as SIGINT does: commands leave ``with`` blocks."""
    with sigterm_kept():
        if _has_signals():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """What SIGTERM does is the same after the block, whatever a library makes of it inside."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if _has_signals():
            signal.signal(signal.SIGTERM, before)


def _has_signals() -> bool:
    """Whether this is Python's main thread: any other has no signals, and nothing changes there."""
    return threading.current_thread() is threading.main_thread()


def _done(future: "Future[Any]") -> bool:
    return future.done() or bool(wait([future], POLL_S).done)


class Background:
    """One thread that does what it is given, in that order, and ends with the process.

    An executor's threads are joined when the interpreter ends, so that a call that hangs would
    outlive every signal.
    """

    def __init__(self, name: str) -> None:
        # Kind of the first exception that a ``write`` ended with; ``study.log`` has the place.
        self.fault: str | None = None
        self.seconds = 0.0  # spent on what ``write`` was given
        self._given_up = False
        self._last: Future[Any] | None = None
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Have the thread call something; what comes of it is in the future."""
        # As an executor's work item does it, so that a future that was cancelled is never run.
        future: Future[T] = Future()

        def work() -> None:
            if self._given_up:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._last = future
        self._work.put(work)
        return future

    def write(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have the thread write something; nobody waits for it, and an error keeps no later one."""

        def noted() -> None:
            began = time.monotonic()
            try:
                call(*arguments)
            except Exception as error:
                self.fault = self.fault or type(error).__name__
                log_place("Not written", error)
            self.seconds += time.monotonic() - began

        self.submit(noted)

    def give_up(self) -> None:
        """Leave out what still waits; what is under way goes on."""
        self._given_up = True

    @property
    def busy(self) -> bool:
        """Whether something is under way or waits."""
        return self._last is not None and not self._last.done()

    def _run(self) -> None:
        while True:
            self._work.get()()


def made(future: "Future[T]") -> T | None:
    """What a thread has made; None if it has not, or not yet."""
    if not future.done() or future.cancelled() or future.exception() is not None:
        return None
    return future.result()
