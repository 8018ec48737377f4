"""Paths that users name, and files that the platform writes: whole or not at all, in their folder.

Written are one file (``write_atomically``), one folder (``appearing``), or several of both that
belong together and replace others (``staged``), all made in a hidden folder beside their places.
When all is there, that folder gets another name in one step. A process that is killed before it
leaves what was there; behind it the new ones are what will be, and whoever reads or writes there
next makes the moves that are left (``recover``). Files go before folders and come after them, so at
no moment does a record stand beside a folder that is not its own. ::

    PLACE/.<pid>*.new/    being made, or to be deleted
    PLACE/.ready/         made: what is still to be moved to its place
    PLACE/.ready/.old/    what it replaces

No symbolic link may lead out: who can put one into such a folder could otherwise have files
elsewhere overwritten, moved or passed off as the study's own.
"""

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import AfterValidator, PlainSerializer

from vgid.credentials import without_credentials
from vgid.errors import DiskError, InputError

READY, OLD = ".ready", ".old"
WAIT_S = 10.0  # for another process that is moving files, which takes a moment

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EROFS)


def _usable(path: Path) -> Path:
    """The absolute path; ValueError if the system cannot even look for it."""
    try:
        path = path.expanduser().absolute()
        path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of nobody
        reason = getattr(error, "strerror", None) or "there is no such home"
        raise ValueError(f"{str(path)[:80]} cannot be used ({reason}); name another") from None
    return path


def address(path: Path) -> str | None:
    """The address that was given as a path, which makes its slashes one; None if it is none."""
    match = _ADDRESS.match(str(path))
    if match is None:
        return None
    slashes = "///" if match[1].lower() == "file" else "//"
    return f"{match[1]}:{slashes}{str(path)[match.end() :]}"


def as_given(path: Path) -> str:
    """A path or an address as it was given."""
    return address(path) or str(path)


def _written(path: Path) -> Path:
    """The absolute path of a folder on a disk that stays."""
    # What is written is locked and renamed, which a bucket, even mounted, is not.
    if told := address(path):
        raise ValueError(
            f"{without_credentials(told)} is an address; name a folder on a disk or on NFS, and "
            "have results in a bucket by --tracking-uri, an MLflow server that keeps artifacts "
            "there"
        )
    path = _usable(path)
    # The copy of ``--working-dir`` in which Ray starts a job, and which it deletes.
    if "working_dir_files" in path.parts:
        raise ValueError(
            f"{path} lies in this Ray job's temporary package folder; give an absolute path, on "
            "storage that all nodes share"
        )
    return path


def _readable(path: Path) -> Path:
    told = address(path)
    if told is None:
        return _usable(path)
    if told != without_credentials(told):
        raise ValueError(
            f"{without_credentials(told)} was given with credentials, which would be recorded; "
            "leave them to the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return path


def _named_plainly(path: Path) -> Path:
    """Nothing that means something else in an address, for which Ray and MLflow take the path."""
    if found := re.search("[?#%]", str(path)):
        raise ValueError(
            f"{path} has a {found[0]!r}, after which Ray and MLflow would look elsewhere; choose "
            "another name"
        )
    return path


UsablePath = Annotated[Path, AfterValidator(_usable)]
# A study's folder, or ``mlflow:`` and the id of its run.
StudyName = Annotated[
    str,
    AfterValidator(lambda name: name if name.startswith("mlflow:") else str(_usable(Path(name)))),
]
# A folder, or an address that ``vgid.data.address`` copies.
ReadFolder = Annotated[
    Path,
    AfterValidator(_readable),
    PlainSerializer(as_given, when_used="json"),
]
WrittenFolder = Annotated[Path, AfterValidator(_written)]
StudyFolder = Annotated[WrittenFolder, AfterValidator(_named_plainly)]


def new_folder(path: Path) -> Path:
    """``WrittenFolder`` for an argument of a command; ``InputError`` if it is none."""
    try:
        return _written(path)
    except ValueError as error:
        raise InputError(f"command line: {error}.") from None


def numbered(stem: Path, last: bool) -> Path:
    """The next free ``<stem>-<number>``, or the last one that is there."""
    number = 1
    while stem.with_name(f"{stem.name}-{number}").exists():
        number += 1
    return stem.with_name(f"{stem.name}-{max(1, number - 1) if last else number}")


@contextmanager
def refusals_told() -> Iterator[None]:
    """``InputError`` in place of the error where the system refuses a path that it was given."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in _REFUSED:
            raise
        raise InputError(
            f"{error.filename}: {error.strerror}; name another path, or make this one accessible."
        ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: write beside it, sync, rename; ``DiskError`` if it cannot be."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            # On the disk before the rename is, or a power cut leaves an empty file of that name.
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)  # mkstemp lets nobody else read
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise unwritable(path, error) from None


@contextmanager
def appearing(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder that takes its place when the block is done, or vanishes.

    What is there is deleted then if ``replace``; otherwise ``OSError`` unless it is empty.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if replace and folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lock(file: Path, taken: str) -> FileLock:
    """Lock a file until the lock is released; ``InputError(taken)`` if another process holds it."""
    held = FileLock(file)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise InputError(taken) from None
    return held


@contextmanager
def staged(place: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder, whose ``names`` the block makes and which replace those in ``place``.

    ``InputError`` if another process writes there, it cannot be written or a link leads out; what
    fails changes nothing.
    """
    refuse_links(place, itself=True)
    made = not place.exists()
    staging = place / f".{os.getpid()}.new"
    try:
        place.mkdir(parents=True, exist_ok=True)
        held = lock(
            place / ".lock",
            f"{place}: another pick writes there; wait for it or name another --output.",
        )
        _finish(place)
        for stray in place.glob(".*.new"):  # of a killed process
            shutil.rmtree(stray)
        staging.mkdir()
    except OSError as error:
        raise InputError(str(unwritable(place, error))) from None
    try:
        yield staging
        for name in names:
            (staging / name).stat()
        staging.rename(place / READY)
        done: list[tuple[Path, Path]] = []
        try:
            _finish(place, done)
        except OSError:
            # Only where a rename fails, on a full or read-only disk: what was moved goes back, the
            # last move first.
            for source, target in reversed(done):
                target.rename(source)
            (place / READY).rename(staging)
            raise
    except OSError as error:
        raise InputError(str(unwritable(place, error))) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        held.release()
        left = [path for path in place.iterdir() if path.name != ".lock"]
        if made and not left:
            with suppress(OSError):
                (place / ".lock").unlink()
                place.rmdir()


def recover(place: Path) -> None:
    """Bring into place what a killed process had ready, if there is such a thing and it can be."""
    ready = place / READY
    if ready.is_dir():
        refuse_links(ready, itself=True)
        with suppress(OSError), FileLock(place / ".lock", timeout=WAIT_S):
            _finish(place)


def _finish(place: Path, done: list[tuple[Path, Path]] | None = None) -> None:
    """Move what is ready to its place, from wherever it was left; ``done`` gets every move."""
    ready = place / READY
    if not ready.is_dir():
        return
    old = ready / OLD
    old.mkdir(exist_ok=True)

    # The deployment `b.yaml` with its folder `b` replaces another of that name, step by step:
    #
    #     b.yaml -> .old    the old record is gone before its adapter is
    #     b      -> .old
    #     .ready/b -> b     the new adapter is there before its record
    #     .ready/b.yaml -> b.yaml
    #
    # Killed anywhere between, what is left in `.ready` says what is still to do.
    new = sorted((p for p in ready.iterdir() if p != old), key=lambda p: (p.is_file(), p.name))
    replaced = [place / path.name for path in reversed(new) if (place / path.name).exists()]
    before = len(list(old.iterdir()))  # of a process that was killed on the way
    moves = [(path, old / f"{n}-{path.name}") for n, path in enumerate(replaced, start=before)]
    for source, target in moves + [(path, place / path.name) for path in new]:
        source.rename(target)
        if done is not None:
            done.append((source, target))
    # In one step: half deleted, it would be taken for what is still to come.
    discarded = place / f".{os.getpid()}.{secrets.token_hex(4)}.new"
    ready.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def unwritable(path: Path, error: OSError) -> DiskError:
    """The sentence for a file that cannot be written."""
    return DiskError(
        f"{path}: cannot be written ({error.strerror}); free some space or name another "
        "folder with --output."
    )


def refuse_links(folder: Path, itself: bool = False) -> None:
    """``InputError`` for a link that leads out of a folder, or the folder ``itself`` being one."""
    root = folder.resolve()

    def refuse(path: Path) -> None:
        raise InputError(
            f"{path}: is a symbolic link out of the folder; put in its place what it leads to, or "
            "choose another folder."
        )

    if itself and folder.is_symlink():
        refuse(folder)
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        for path in (Path(place, name) for name in folders + files):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                refuse(path)


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # removed meanwhile
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); restore it or choose another "
            "folder."
        ) from None
