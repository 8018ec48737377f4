"""Files that the platform writes: whole or not at all, and inside their folder.

It makes no symbolic links, and none may lead out: who can put a link into such a folder could
otherwise have files elsewhere overwritten, moved or passed off as the study's own.
"""

import os
import tempfile
from pathlib import Path

from vgid.errors import DiskError, InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: write beside it, sync, rename.

    Raises:
        DiskError: no space, or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)  # mkstemp lets nobody else read
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> DiskError:
    """The sentence for a file that cannot be written."""
    return DiskError(
        f"{path}: cannot be written ({error.strerror}); free some space or name another "
        "folder with --output."
    )


def refuse_links(folder: Path, itself: bool = False) -> None:
    """Nothing below a folder leads out of it; what is no folder has nothing below.

    Args:
        folder: the folder; it is not followed into other folders by links.
        itself: whether the folder must not be a link either.

    Raises:
        InputError: the first link that leads out.
    """
    if itself and folder.is_symlink():
        raise _leads_out(folder)
    root = folder.resolve()
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.is_symlink():
                        if not path.resolve().is_relative_to(root):
                            raise _leads_out(path)
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
        except (FileNotFoundError, NotADirectoryError):  # it may have been removed meanwhile
            continue
        except OSError as error:
            raise InputError(
                f"{place}: cannot be read ({error.strerror}); restore it or choose another folder."
            ) from None


def _leads_out(path: Path) -> InputError:
    return InputError(
        f"{path}: is a symbolic link out of the folder; put in its place what it leads to, or "
        "choose another folder."
    )
