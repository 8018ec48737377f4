"""Symbolic links in folders that the platform writes: it makes none, and none may lead out.

Who can put a link into such a folder could otherwise have files elsewhere overwritten, moved or
passed off as the study's own.
"""

import os
from pathlib import Path

from vgid.errors import InputError


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
