"""Writes tables and MLflow while the trials go on."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vgid.errors import InputError


class Scribe:
    """One thread that writes in the order in which it is told to.

    Attributes:
        error: the first sentence that a write ended with; the study ends then.
        seconds: spent on writing.
    """

    def __init__(self) -> None:
        self.error: str | None = None
        self.seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scribe")

    def write(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Queue a write; returns at once."""

        def timed() -> None:
            began = time.monotonic()
            try:
                call(*arguments)
            except InputError as error:
                self.error = self.error or str(error)
            self.seconds += time.monotonic() - began

        self._thread.submit(timed)

    def close(self) -> None:
        """Wait until everything is written."""
        self._thread.shutdown(wait=True)
