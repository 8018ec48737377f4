"""Deployments put in place whole or not at all.

What a deployment consists of is made in a hidden folder beside its place and then moved. A
deployment file, named behind its adapter, is taken away before it and comes after it, so at no
moment does a file stand beside an adapter that is not its own.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vgid.errors import InputError

FOLDER = "deployments"
"""Where deployments are in an output folder."""


@contextmanager
def staged(deployments: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder; what the block leaves in it takes its place when the block is done.

    If the block fails, nothing has changed.

    Args:
        deployments: the folder of deployments, made if need be.
        names: files and folders that the block makes and that replace those of the same name, in
            the order in which they come into place; the old ones go in the opposite order.

    Raises:
        InputError: another process writes there, or the folder cannot be written.
    """
    made = not deployments.exists()
    staging = deployments / f".{os.getpid()}.new"
    try:
        deployments.mkdir(parents=True, exist_ok=True)
        lock = FileLock(deployments / ".lock")
        lock.acquire(blocking=False)
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
        _replace(staging, deployments, names)
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


def _replace(staging: Path, deployments: Path, names: Sequence[str]) -> None:
    old = staging / "old"
    old.mkdir()
    done: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        done.append((source, target))

    try:
        for name in reversed(names):
            if (deployments / name).exists():
                move(deployments / name, old / name)
        for name in names:
            move(staging / name, deployments / name)
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _unwritable(deployments: Path, error: OSError) -> InputError:
    return InputError(
        f"{deployments}: cannot be written ({error.strerror}); free some space or name another "
        "folder with --output."
    )
