"""A benchmark behind an address, such as ``s3://bucket/folder``: copied once, then a folder.

pyarrow's file systems know s3, gs, abfss, hdfs and hf, and with ``fsspec+`` before it whatever
fsspec knows. They find credentials where the store's own tools do: the environment, its files, or
the machine's role.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock

from vgid.credentials import without_credentials
from vgid.errors import InputError
from vgid.files import address, appearing

CACHE = "vgid/benchmarks"  # in the user's cache folder


def local(place: Path) -> Path:
    """The folder to read: ``place``, or the copy of what it is the address of.

    What changes there, by name, size or time, is copied anew. ``InputError`` where nobody answers,
    or there is no benchmark.
    """
    named = address(place)
    if named is None:
        return place
    # Here, since every plan of a study asks whether its data is a folder.
    import pyarrow as pa
    from pyarrow import fs

    from vgid.data.layout import CONFIGS, SHARD_NAME

    shown = without_credentials(named)
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / CACHE
    try:
        remote, folder = fs.FileSystem.from_uri(named)
        listed = {
            f"{config}/{file.base_name}": [file.size, file.mtime_ns]
            for config in CONFIGS
            for file in remote.get_file_info(
                fs.FileSelector(f"{folder}/{config}", allow_not_found=True)
            )
            if SHARD_NAME.fullmatch(file.base_name)
        }
        if not listed:
            raise InputError(
                f"{shown}: no MLLMU-Bench config (a folder such as forget_5 with "
                "train-00000-of-00001.parquet) is there; name the folder that holds them."
            )
        key = hashlib.sha256(json.dumps([named, listed], sort_keys=True).encode()).hexdigest()
        copy = root / key[:16]
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # people's data
        with FileLock(root / f"{key[:16]}.lock"):
            if not copy.is_dir():
                with appearing(copy) as new:
                    for name in listed:
                        (new / name).parent.mkdir(exist_ok=True)
                        source = f"{folder}/{name}"
                        fs.copy_files(source, str(new / name), source_filesystem=remote)
    except (pa.ArrowException, OSError, ImportError, ValueError) as error:
        why = without_credentials(" ".join(str(error).split())).rstrip(".")[:300]
        raise InputError(
            f"{shown}: cannot be read ({why}); check the address, the credentials in the "
            "environment and AWS_ENDPOINT_URL, or copy the benchmark to a folder."
        ) from None
    return copy


def keep(folder: Path, at: Path) -> None:
    """Have a benchmark at another place too, where all nodes see it; by links where that goes."""
    with appearing(at) as new:
        shutil.copytree(folder, new, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
