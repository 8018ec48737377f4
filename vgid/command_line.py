"""Command lines: flags from configs, one sentence for bad input, and the exit code.

An option's name, default, check and help stand in one place, the field of its config. Of ready-made
generators, pydantic-settings' answers bad input in its own words and shows types in place of
metavars, and typer wants a signature, so that every field would be said twice.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from vgid.config import Config, Flag, parse
from vgid.credentials import without_credentials
from vgid.errors import DiskError, InputError
from vgid.files import refusals_told
from vgid.interrupts import terminated_like_interrupted

C = TypeVar("C", bound=Config)

_METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}


class Printed(Config):
    """How a command prints what it found."""

    as_json: Annotated[bool, Flag(name="--json")] = Field(
        False, description="print one JSON object, for machines"
    )


class Parser(argparse.ArgumentParser):
    """The command line of some configs; each field is a flag, and its help tells the default.

    A field of booleans takes no value; one of tuples takes several, after one flag or after many.
    What a field that may be None does without a value is for its description to say. Fields in
    ``without`` have no flag; ``given`` holds the values of the flags that were given.
    """

    def __init__(
        self, prog: str, description: str, *models: type[Config], without: Sequence[str] = ()
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            # What was not given is absent, so that a config or a caller has the default.
            argument_default=argparse.SUPPRESS,
            # An abbreviation in somebody's script would break with the next flag of that beginning.
            allow_abbrev=False,
        )
        self.given: dict[str, Any] = {}
        for model in models:
            for name, field in model.model_fields.items():
                if name not in without:
                    self._add(name, field)

    def _add(self, name: str, field: FieldInfo) -> None:
        flag = next((mark for mark in field.metadata if isinstance(mark, Flag)), Flag())
        negated = "no-" if field.default is True else ""
        option = flag.name or f"--{negated}{name.replace('_', '-')}"
        help_text = (field.description or "").replace("%", "%%")
        if field.default not in (None, ()) and not field.is_required() and not negated:
            shown = field.default if isinstance(field.default, tuple) else (field.default,)
            help_text += f" (default: {', '.join(map(str, shown))})"
        settings = {"help": help_text, **_by_type(_plain(field.annotation), flag, field.default)}
        if not option.startswith("-"):
            self.add_argument(name, nargs="?", **settings | {"metavar": option, "default": None})
            return
        required = field.is_required() and flag.required
        self.add_argument(option, dest=name, required=required, **settings)

    def read(self, arguments: Sequence[str] | None) -> Self:
        """Read flags; None takes the process's own."""
        read = vars(self.parse_args(arguments))
        self.given = {name: value for name, value in read.items() if value is not None}
        return self

    def config(self, model: type[C], **otherwise: Any) -> C:
        """What was given for one of the configs, or ``otherwise``, in place of its defaults."""
        own = {name: value for name, value in self.given.items() if name in model.model_fields}
        return parse(model, {**otherwise, **own}, "command line")

    def error(self, message: str) -> Any:
        """Raise ``InputError`` instead of printing usage and exiting."""
        raise InputError(f"command line: {without_credentials(message)}; see --help.")


def _plain(annotation: Any) -> Any:
    """A type without None and without what pydantic checks."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    return annotation


def _by_type(kind: Any, flag: Flag, default: Any) -> dict[str, Any]:
    """What ``add_argument`` is told of a value."""
    if kind is bool:
        return {"action": "store_const", "const": not default}
    if flag.read is not None:
        return {"type": flag.read, "metavar": flag.metavar}
    if get_origin(kind) is tuple:
        item = _by_type(_plain(get_args(kind)[0]), flag, None)
        return {**item, "action": "extend", "nargs": "+"}
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return {"type": type(choices[0]), "choices": choices}
    return {"type": kind, "metavar": flag.metavar or _METAVARS[kind]}


def duration(seconds: float) -> str:
    """Seconds for people: ``47 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def exit_code(run: Callable[[], Mapping[str, Any]], interrupted: str) -> int:
    """Run a command and say how it ended, with one sentence on stderr unless it is done.

    What ``run`` returns says under ``interrupted`` whether a signal ended it, to be told in that
    sentence, and under ``error``, in one sentence, what it could not do.

    Returns:
        0 when done, 1 when something could not be, 2 after bad input, 130 when interrupted.
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
