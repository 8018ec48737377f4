"""Signals that end a study in order."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_interrupt(interrupt: Callable[[], None]) -> Iterator[None]:
    """Call ``interrupt`` on SIGINT or SIGTERM; a second signal does what it did before.

    Python lets only its main thread have signals; in any other, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        interrupt()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
