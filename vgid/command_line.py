"""What the studies' command lines share: one sentence for bad input, and the exit code."""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vgid.credentials import without_credentials
from vgid.errors import DiskError, InputError
from vgid.interrupts import terminated_like_interrupted
from vgid.paths import refusals_told


class Parser(argparse.ArgumentParser):
    """Reports a bad command line like any other bad input; its help shows the defaults."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> Any:
        """Raise instead of printing usage and exiting.

        Raises:
            InputError: always.
        """
        raise InputError(f"command line: {without_credentials(message)}; see --help.")


def words(text: str) -> tuple[str, ...]:
    """Parse a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def duration(seconds: float) -> str:
    """Seconds for people: ``47 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def exit_code(run: Callable[[], Mapping[str, Any]], interrupted: str) -> int:
    """Run a command and say how it ended.

    Args:
        run: does the work; its summary says under ``interrupted`` whether a signal ended it, and
            under ``error``, in one sentence, what it could not do.
        interrupted: what to tell the user then.

    Returns:
        0 when done, 1 when something could not be, 2 after bad input (each one sentence on
        stderr), 130 when interrupted.
    """
    try:
        with terminated_like_interrupted(), refusals_told():
            summary = run()
        stopped, error = summary.get("interrupted", False), summary.get("error")
    except InputError as bad:
        print(bad, file=sys.stderr)
        return 1 if isinstance(bad, DiskError) else 2
    except KeyboardInterrupt:
        stopped, error = True, None
    if stopped:
        print(interrupted, file=sys.stderr)
        return 130
    if error is not None:
        print(error, file=sys.stderr)
        return 1
    return 0
