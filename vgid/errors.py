"""Exceptions that a user is meant to read, and how those that nobody is are logged."""

import sys
import traceback


class InputError(Exception):
    """Bad input, in one sentence that names file, field and remedy; ends a command with code 2."""


class DiskError(InputError):
    """A file that cannot be written: the disk is full or refuses. No fault of what is written."""


class SettingError(InputError):
    """A setting that one trial has and this study cannot run; other trials can."""


class SampleError(InputError):
    """A sample that a model cannot be asked or taught; ``problem`` ends a sentence about it."""

    def __init__(self, sample: str, problem: str) -> None:
        super().__init__(f"sample {sample}: {problem}")
        self.sample = sample
        self.problem = problem


class LossNotFiniteError(Exception):
    """The loss or its gradient became NaN or infinite; the trial has failed."""


def log_place(said: str, error: Exception) -> None:
    """Log on stderr what came of an exception, its kind and place; its message may be private."""
    print(f"{said}: {type(error).__name__}", file=sys.stderr)
    traceback.print_tb(error.__traceback__)
