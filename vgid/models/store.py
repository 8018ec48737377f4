"""Tensors on disk by content hash: computed once, shared between processes, bounded in size.

    ROOT/store.json                  marks the folder as a store and states its bound
    ROOT/<kind>/<key>.safetensors    one entry; its modification time is its last use
    ROOT/<kind>/<key>.lock           held by the process that computes the entry
    ROOT/<kind>/<key>.<pid>.*.tmp    an entry while it is written; it appears by a rename
    ROOT/evict.lock                  held by the process that removes entries

A key is the hash of all that an entry depends on, so no entry is ever out of date and no race can
give a wrong result: locks only spare work, and an entry may vanish at any moment.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout
from rich.filesize import decimal
from safetensors import SafetensorError

from vgid.config import Config
from vgid.errors import DiskError, InputError
from vgid.files import refuse_links

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "store.json"
KEY = re.compile(r"[0-9a-f]{64}")
ENTRY = re.compile(rf"{KEY.pattern}\.safetensors")
LEFTOVER = re.compile(rf"({KEY.pattern})\.(lock|\d+\.[0-9a-f]+\.tmp)")
ABANDONED_S = 3600.0  # age of a temporary file: another node's lock may not be seen here


def key_of(described: Any) -> str:
    """SHA-256 of the canonical JSON of all that an entry depends on; NaN is a ``ValueError``."""
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ContentStore:
    """One kind of entries in a store, shared between processes, least recently used first out.

    ``limit_bytes`` bounds all kinds of the root together, but never removes the entry just written.
    A folder that cannot be made is a ``DiskError``, a link out of the store an ``InputError``.
    """

    def __init__(self, root: Path, kind: str, limit_bytes: int | None = None) -> None:
        self.root, self.folder, self.limit_bytes = root, root / kind, limit_bytes
        self.hits = self.misses = 0  # entries that were found, and that were computed
        refuse_links(root, itself=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        marker = root / MARKER
        stated = json.dumps({"limit_bytes": limit_bytes}).encode()
        if not (marker.is_file() and marker.read_bytes() == stated):
            # A store that can only be read serves hits; a miss says what is wrong.
            with contextlib.suppress(DiskError, OSError):
                self._evict()  # first: the marker may need the space
                _replace(marker, stated)

    def get_or_compute(
        self, key: str, compute: "Callable[[], dict[str, Tensor]]", wait: bool = True
    ) -> "dict[str, Tensor]":
        """The tensors of ``key``, computed and stored if they are not there or their file is torn.

        They are contiguous, on the CPU, and share no memory. Of the processes that want an entry
        one computes it and the others wait; without ``wait`` they get a ``filelock.Timeout``, and
        can do something else meanwhile. A disk that cannot be written is a ``DiskError``, and
        nothing is left behind. A ``key`` that is not of ``key_of`` is a ``ValueError``.
        """
        from safetensors.torch import save

        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key: key_of gives 64 hexadecimal digits")
        path = self.folder / f"{key}.safetensors"
        if (found := self._find(path)) is not None:
            return found
        # Looked for again inside: whoever held the lock may have computed just this. Without the
        # lock ten workers that begin a study would run the same teacher ten times.
        with _alone(path.with_suffix(".lock"), wait):
            if (found := self._find(path)) is not None:
                return found
            tensors = {name: x.detach().cpu().contiguous() for name, x in compute().items()}
            _replace(path, save(tensors))
            self.misses += 1
        # Outside the entry's lock: who waits for the entry need not wait for the sweep.
        self._evict(keep=path)
        return tensors

    def _find(self, path: Path) -> "dict[str, Tensor] | None":
        """The tensors of a file, which counts as used now; None if there is no whole file."""
        from safetensors.torch import load

        try:
            # Not mapped: if another node removes such a file from a network disk, the reader dies.
            tensors = load(path.read_bytes())
        except (OSError, SafetensorError):
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile, or a store that can only be read
            _use(path)
        self.hits += 1
        return tensors

    def _evict(self, keep: Path | None = None) -> None:
        with _alone(self.root / "evict.lock"):
            _clear_leftovers(self.root, ABANDONED_S)
            entries = sorted(_entries(self.root))
            total = sum(entry.bytes for entry in entries)
            for entry in entries:
                if self.limit_bytes is None or total <= self.limit_bytes:
                    break
                if entry.path != keep:
                    _remove(entry)
                    total -= entry.bytes


class Usage(Config):
    """What a store, or one kind of it, takes; uses are in UTC, ISO 8601, None if it is empty."""

    entries: int
    bytes: int
    oldest_use: str | None
    newest_use: str | None

    @property
    def size(self) -> str:
        """The bytes for people to read, such as ``1.2 MB``."""
        return decimal(self.bytes)


class StoreInfo(Usage):
    """What a store holds, or what was removed from it, together and by kind."""

    root: Path
    limit_bytes: int | None  # as last stated by a process that opened the store
    by_kind: dict[str, Usage]


def find_root(folder: Path) -> Path:
    """The store in a study's output folder, or ``folder`` if it is one; else an ``InputError``."""
    for root in (folder, folder / "store"):
        if (root / MARKER).is_file():
            return root
    what = "the folder holds no store" if folder.is_dir() else "no such folder"
    raise InputError(f"{folder}: {what}; name a study's output folder or its store.")


def info(root: Path) -> StoreInfo:
    """What a store holds; ``InputError`` as for ``find_root``."""
    root = find_root(root)
    return _sum_up(root, list(_entries(root)))


def clear(root: Path) -> StoreInfo:
    """Remove a store's entries, and files that no process uses; gives what was removed."""
    root = find_root(root)
    with _alone(root / "evict.lock"):
        removed = list(_entries(root))
        for entry in removed:
            _remove(entry)
        _clear_leftovers(root)
    return _sum_up(root, removed)


class _Entry(NamedTuple):
    """One file of a store; sorts by last use, and by name where that is the same."""

    used_ns: int
    path: Path
    bytes: int


def _replace(path: Path, content: bytes) -> None:
    """Write and rename, unsynced: what a crash of the machine tears is computed again."""
    temporary = path.with_suffix(f".{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        _use(temporary)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _use(path: Path) -> None:
    # Without a time the kernel's own goes in steps of milliseconds, in which the order is lost.
    os.utime(path, ns=(time.time_ns(),) * 2)


@contextlib.contextmanager
def _alone(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, and remove it before letting go: filelock's waiters notice and go on."""
    lock = FileLock(path, poll_interval=0.01, blocking=wait)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Files left behind would soon outnumber the entries, and one removed after the release
            # may already be another process's lock.
            path.unlink()
        lock.release()


def _unwritable(folder: Path, error: OSError) -> DiskError:
    return DiskError(
        f"{folder}: the store cannot be written ({error.strerror}); free some space, lower the "
        "store's bound or choose another folder."
    )


def _kinds(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())


def _files(root: Path) -> list[Path]:
    return [path for folder in _kinds(root) for path in folder.iterdir()]


def _entries(root: Path) -> Iterator[_Entry]:
    for path in _files(root):
        if ENTRY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                yield _Entry(state.st_mtime_ns, path, state.st_size)


def _remove(entry: _Entry) -> None:
    try:
        entry.path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(entry.path.parent, error) from None


def _clear_leftovers(root: Path, age_s: float = 0.0) -> None:
    """Remove lock and temporary files, at least ``age_s`` old, whose entry nobody is computing."""
    for path in _files(root):
        match = LEFTOVER.fullmatch(path.name)
        with contextlib.suppress(OSError, DiskError):
            if match and time.time() - path.stat().st_mtime >= age_s:
                # Whoever computes an entry holds its lock, until its file is renamed.
                with _alone(path.with_name(f"{match[1]}.lock"), wait=False):
                    path.unlink()


def _sum_up(root: Path, entries: list[_Entry]) -> StoreInfo:
    try:
        limit = json.loads((root / MARKER).read_text())["limit_bytes"]
    except (ValueError, KeyError, TypeError):
        limit = None  # a damaged file is written again by the next process that opens the store
    by_kind = {
        kind.name: _usage([e for e in entries if e.path.parent == kind]) for kind in _kinds(root)
    }
    whole = _usage(entries).model_dump()
    return StoreInfo(root=root, limit_bytes=limit, by_kind=by_kind, **whole)


def _usage(entries: list[_Entry]) -> Usage:
    times = (datetime.fromtimestamp(entry.used_ns / 1e9, UTC) for entry in sorted(entries))
    uses = [when.isoformat(timespec="milliseconds") for when in times]
    return Usage(
        entries=len(entries),
        bytes=sum(entry.bytes for entry in entries),
        oldest_use=uses[0] if uses else None,
        newest_use=uses[-1] if uses else None,
    )
