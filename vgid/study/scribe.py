"""Writes tables, or MLflow, while the trials go on."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from vgid.errors import InputError


class Scribe:
    """One thread that writes in the order in which it is told to.

    The process may end while it still waits for a server.

    Attributes:
        error: the first sentence that a write ended with; the study ends then.
        fault: the kind of the first other exception; the study goes on, ``study.log`` has the
            place.
        seconds: spent on writing.
    """

    def __init__(self, name: str) -> None:
        self.error: str | None = None
        self.fault: str | None = None
        self.seconds = 0.0
        self._queue: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Queue a write; returns at once."""
        self._queue.put(lambda: call(*arguments))

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until everything is written; after ``timeout_s`` what still waits is left out."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._given_up = True

    @property
    def busy(self) -> bool:
        """Whether it is still at work, after ``close`` on a write that does not end."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None and not self._given_up:
            began = time.monotonic()
            try:
                call()
            except InputError as error:
                self.error = self.error or str(error)
            except Exception as error:
                self.fault = self.fault or type(error).__name__
                print(f"Not written: {type(error).__name__}", file=sys.stderr)
                traceback.print_tb(error.__traceback__)
            self.seconds += time.monotonic() - began
