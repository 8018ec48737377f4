"""Paths that users name: absolute, on a disk, and such that all libraries take them as they are."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from vgid.errors import InputError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_IN_ADDRESSES = "?#%"
_REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EROFS)


def usable(path: Path) -> Path:
    """The absolute path.

    Raises:
        ValueError: the system cannot even look for it.
    """
    try:
        path = path.expanduser().absolute()
        path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of nobody
        reason = getattr(error, "strerror", None) or "there is no such home"
        raise ValueError(f"{str(path)[:80]} cannot be used ({reason}); name another") from None
    return path


def on_a_disk(path: Path) -> Path:
    """The path of a folder that is written to.

    Raises:
        ValueError: it is an address such as ``s3://bucket/folder``, which would become a folder
            ``s3:`` in the working folder.
    """
    if _ADDRESS.match(str(path)):
        raise ValueError(
            f"{path} is an address; mount it and name its folder, or name one on a disk"
        )
    return path


def named_plainly(path: Path) -> Path:
    """The path of a study's folder, which Ray and MLflow take for a part of an address.

    Raises:
        ValueError: it has a character that means something else in an address.
    """
    found = [character for character in _IN_ADDRESSES if character in str(path)]
    if found:
        raise ValueError(
            f"{path} has a {found[0]!r}, after which Ray and MLflow would look elsewhere; choose "
            "another name"
        )
    return path


def numbered(stem: Path, last: bool) -> Path:
    """The next free ``<stem>-<number>``, or the last one that is there."""
    number = 1
    while stem.with_name(f"{stem.name}-{number}").exists():
        number += 1
    return stem.with_name(f"{stem.name}-{max(1, number - 1) if last else number}")


def new_folder(path: Path) -> Path:
    """``WrittenFolder`` for an argument of a command.

    Raises:
        InputError: it is none.
    """
    try:
        return usable(on_a_disk(path))
    except ValueError as error:
        raise InputError(f"command line: {error}.") from None


@contextmanager
def refusals_told() -> Iterator[None]:
    """Make a sentence of the error where the system refuses a path that a command was given.

    Raises:
        InputError: in its place.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in _REFUSED:
            raise
        raise InputError(
            f"{error.filename}: {error.strerror}; name another path, or make this one accessible."
        ) from None


UsablePath = Annotated[Path, AfterValidator(usable)]
WrittenFolder = Annotated[Path, AfterValidator(on_a_disk), AfterValidator(usable)]
StudyFolder = Annotated[WrittenFolder, AfterValidator(named_plainly)]
