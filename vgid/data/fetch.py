"""Brings the public MLLMU-Bench from the Hugging Face hub, at a pinned commit.

The download goes to a hidden folder beside the wanted one and is renamed when all of it is there.
One that was cut short is continued by the next call, within a file at the byte where it broke.

Source: https://huggingface.co/datasets/MLLMMU/MLLMU-Bench (layout in ``vgid.data.layout``).
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal

from vgid.config import Config
from vgid.data.check import Report, check_benchmark
from vgid.data.layout import CONFIGS
from vgid.errors import InputError
from vgid.files import lock

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

REPOSITORY = "MLLMMU/MLLMU-Bench"
REVISION = "e91a01eb060b61be8dbde7edb48b121341bd0890"
"""The data set's sixteenth commit, the first that holds all ten configs and the final card."""

PROVENANCE = "fetched.json"  # beside the configs: where they are from, and the size of each

_SHARD = re.compile(rf"({'|'.join(CONFIGS)})/train-\d+-of-\d+\.parquet")


class Fetched(Config):
    """A benchmark folder from the hub.

    ``commit`` is the 40 hexadecimal digits that ``revision``, a commit, branch or tag, stands for.
    """

    data: Path
    repository: str = REPOSITORY
    revision: str
    commit: str
    files: int
    bytes: int
    check: Report

    def print(self, console: Console) -> None:
        """Print the check, then what came."""
        self.check.print(console)
        line = f"{self.data}: {self.files} files, {decimal(self.bytes)}, commit {self.commit}."
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def fetch_benchmark(folder: Path, revision: str | None = None, progress: bool = False) -> Fetched:
    """Bring MLLMU-Bench into ``folder``, then check it.

    The hub is the one that ``HF_ENDPOINT`` names, the account that of ``HF_TOKEN``. A folder that
    was fetched before at this revision (``REVISION``) is checked again without a download.

    Raises:
        InputError: the folder holds something else, or the hub cannot be reached, refuses access,
            does not know the revision, or the disk has no room.
    """
    folder, revision = folder.expanduser().absolute(), revision or REVISION
    known = _provenance(folder)
    if known is None or known["commit"] != revision:
        known = _download(folder, revision, known, progress)
    return Fetched(
        data=folder,
        revision=revision,
        commit=known["commit"],
        files=len(known["bytes"]),
        bytes=sum(known["bytes"].values()),
        check=check_benchmark(folder, progress),
    )


def _provenance(folder: Path) -> dict[str, Any] | None:
    """What an earlier fetch noted in ``folder``; None where there is nothing yet."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        known = json.loads((folder / PROVENANCE).read_text())
        if known["repository"] == REPOSITORY and {"commit", "bytes"} <= known.keys():
            return dict(known)
    raise InputError(
        f"{folder}: not an empty folder and not one that was fetched; name a new one, or look at "
        f"what is there with `vgid data check {folder}`."
    )


def _shard_sizes(info: "DatasetInfo", revision: str) -> dict[str, int]:
    found = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    sizes = {name: size for name, size in sorted(found.items()) if _SHARD.fullmatch(name)}
    for config in CONFIGS:
        if not any(name.startswith(f"{config}/") for name in sizes):
            raise InputError(
                f"{REPOSITORY} at revision {revision}: no parquet file of config {config}; choose "
                f"another --revision, such as {REVISION}."
            )
    return sizes


def _download(
    folder: Path, revision: str, known: dict[str, Any] | None, progress: bool
) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()  # one sentence in the end, not a line for each retry
    if not progress:
        disable_progress_bars()
    with _explained(folder, revision):
        info = HfApi().dataset_info(REPOSITORY, revision=revision, files_metadata=True)
    commit, sizes = str(info.sha), _shard_sizes(info, revision)
    if known is not None:
        if known["commit"] == commit:
            return known
        raise InputError(
            f"{folder}: holds commit {known['commit']} of {REPOSITORY}, not {commit}; name another "
            "folder for another revision."
        )
    partial = folder.with_name(f".{folder.name}.{commit[:12]}.partial")
    lock_file = folder.with_name(f".{folder.name}.lock")
    taken = f"{folder}: another process is fetching it; wait for that one to end."
    with _explained(folder, revision), ExitStack() as held:
        # A partial folder belongs to one commit, so no file of another is left in it.
        partial.mkdir(parents=True, exist_ok=True)
        held.callback(lock(lock_file, taken).release)
        wanted = sum(size for name, size in sizes.items() if not (partial / name).is_file())
        free = shutil.disk_usage(partial).free
        if wanted > free:
            raise InputError(
                f"{folder}: {wanted / 1e9:.1f} GB are wanted and {free / 1e9:.1f} GB are free; "
                "make room, or name a folder on another disk."
            )
        # By commit, not by branch: all files are of one moment. Files that are there are kept.
        whole: Any = {"repo_type": "dataset", "local_dir": partial, "allow_patterns": list(sizes)}
        snapshot_download(REPOSITORY, revision=commit, **whole)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's own notes
        sizes = {name: (partial / name).stat().st_size for name in sizes}
        record = {"repository": REPOSITORY, "revision": revision, "commit": commit, "bytes": sizes}
        (partial / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(folder)
        lock_file.unlink(missing_ok=True)
    return record


@contextmanager
def _explained(folder: Path, revision: str) -> Iterator[None]:
    """Turn what the hub client raises into one sentence: its own words, and what to look at."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the client, its transports and a proxy's answers: many classes
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError

        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
            causes.append(cause)
        # The hub's answer says most; without one the first cause does, such as a full disk.
        told = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), causes[-1])
        words = " ".join(str(told).split()).rstrip(".") or type(told).__name__
        page = f"{constants.ENDPOINT}/datasets/{REPOSITORY}"
        raise InputError(
            f"{REPOSITORY} at revision {revision}: {words}; call again to go on, see that "
            f"--revision is listed at {page}/commits/main, that HF_TOKEN is of an account that may "
            "read it, that HF_ENDPOINT is a hub that has it and that the folder can be written, or "
            f"copy the data set's folder to {folder} by hand."
        ) from None
