"""What a field of a config says of its flag on a command line (``vgid.command_line``)."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Flag:
    """How a field is given, as far as name, type, default and description of it do not tell.

    It stands among the field's annotations: ``Annotated[str, Flag("URI")]``.

    Attributes:
        metavar: stands for the value in the help; None: by the type.
        name: the flag, or a word for an argument without one; None: the field's name.
        read: makes the value of the text, or raises ``argparse.ArgumentTypeError``; None: by the
            type.
        required: whether a field without default must be given.
    """

    metavar: str | None = None
    name: str | None = None
    read: Callable[[str], Any] | None = None
    required: bool = True


def words(text: str) -> tuple[str, ...]:
    """Parse a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def seconds(text: str) -> float:
    """Parse a duration: ``90``, ``90s``, ``10m``, ``1.5h``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration, write for example 10m")
    return float(match[1]) * _UNITS[match[2] or "s"]
