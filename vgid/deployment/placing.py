"""Deployments put in place whole or not at all.

What a deployment consists of is made in a hidden folder beside its place. When all of it is there,
that folder gets another name in one step, and from then on the new deployment is what will be:
whatever moves are left then can be done by anyone, and are, by the next who reads or writes there
(``recover``). A process that is killed before that step leaves what was there, and one that is
killed behind it has placed the new deployment; the old one is deleted last. Files are taken away
before folders and come after them, so at no moment does a deployment file stand beside an adapter
that is not its own.

::

    deployments/.<pid>*.new/    being made, or to be deleted
    deployments/.ready/         made: what is still to be moved to its place
    deployments/.ready/.old/    what it replaces
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vgid.errors import InputError
from vgid.files import refuse_links

FOLDER = "deployments"
"""Where deployments are in an output folder."""

READY, OLD = ".ready", ".old"

WAIT_S = 10.0
"""For another process that is moving files, which takes a moment."""


@contextmanager
def staged(deployments: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder; what the block leaves in it takes its place when the block is done.

    If the block fails, nothing has changed.

    Args:
        deployments: the folder of deployments, made if need be.
        names: files and folders that the block makes and that replace those of the same name.

    Raises:
        InputError: another process writes there, the folder cannot be written, or a link leads out
            of it.
    """
    refuse_links(deployments, itself=True)
    made = not deployments.exists()
    staging = deployments / f".{os.getpid()}.new"
    try:
        deployments.mkdir(parents=True, exist_ok=True)
        lock = FileLock(deployments / ".lock")
        lock.acquire(blocking=False)
        _finish(deployments)
        for stray in deployments.glob(".*.new"):  # of a killed process
            shutil.rmtree(stray)
        staging.mkdir()
    except Timeout:
        raise InputError(
            f"{deployments}: another pick writes there; wait for it or name another --output."
        ) from None
    except OSError as error:
        raise _unwritable(deployments, error) from None
    try:
        yield staging
        for name in names:
            (staging / name).stat()
        staging.rename(deployments / READY)
        done: list[tuple[Path, Path]] = []
        try:
            _finish(deployments, done)
        except OSError:
            # Only where a rename fails, on a full or read-only disk: what was moved goes back, the
            # last move first.
            for source, target in reversed(done):
                target.rename(source)
            (deployments / READY).rename(staging)
            raise
    except OSError as error:
        raise _unwritable(deployments, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()
        left = [path for path in deployments.iterdir() if path.name != ".lock"]
        if made and not left:
            with contextlib.suppress(OSError):
                (deployments / ".lock").unlink()
                deployments.rmdir()


def recover(deployments: Path) -> None:
    """Bring into place what a killed process had ready; does nothing where there is no such thing.

    Where that cannot be, it is left to the next one: a reader says best what it misses.

    Raises:
        InputError: a link leads out of what is ready.
    """
    ready = deployments / READY
    if ready.is_dir():
        refuse_links(ready, itself=True)
        with contextlib.suppress(OSError), FileLock(deployments / ".lock", timeout=WAIT_S):
            _finish(deployments)


def _finish(deployments: Path, done: list[tuple[Path, Path]] | None = None) -> None:
    """Move what is ready to its place, from wherever it was left.

    Args:
        deployments: the folder, its lock held.
        done: gets every move, from where and to where.
    """
    ready = deployments / READY
    if not ready.is_dir():
        return
    old = ready / OLD
    old.mkdir(exist_ok=True)

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        if done is not None:
            done.append((source, target))

    # The deployment `b.yaml` with its folder `b` replaces another of that name, step by step:
    #
    #     b.yaml -> .old    the old record is gone before its adapter is
    #     b      -> .old
    #     .ready/b -> b     the new adapter is there before its record
    #     .ready/b.yaml -> b.yaml
    #
    # Killed anywhere between, what is left in `.ready` says what is still to do.
    new = sorted((p for p in ready.iterdir() if p != old), key=lambda p: (p.is_file(), p.name))
    for path in reversed(new):
        place = deployments / path.name
        if place.exists():
            move(place, old / f"{len(list(old.iterdir()))}-{path.name}")
    for path in new:
        move(path, deployments / path.name)
    # In one step: half deleted, it would be taken for what is still to come.
    discarded = deployments / f".{os.getpid()}.{secrets.token_hex(4)}.new"
    ready.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def _unwritable(deployments: Path, error: OSError) -> InputError:
    return InputError(
        f"{deployments}: cannot be written ({error.strerror}); free some space or name another "
        "folder with --output."
    )
