"""``SHA256SUMS`` of an export: what each of its files must be, and that there is no other.

The format is coreutils', so ``sha256sum --check SHA256SUMS`` reads it without this package. Whoever
can change a file can change this one too: the signature (``vgid.deployment.signing``) covers both.
"""

import hashlib
import re
from pathlib import Path

from vgid.deployment.signing import SIGNATURE

MANIFEST = "SHA256SUMS"

_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<name>.+)")


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files below a folder into it."""
    lines = (f"{sha256}  {name}\n" for name, sha256 in _found(folder).items())
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def manifest_fault(folder: Path) -> str | None:
    """How a folder differs from its manifest, None if it does not.

    A link counts as changed or added whatever it leads to: that may change later.
    """
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or cannot be read; export again"
    matches = [_LINE.fullmatch(line) for line in lines]
    recorded = {match["name"]: match["sha256"] for match in matches if match}
    if len(recorded) != len(lines) or not lines:
        return f"{MANIFEST} is damaged; export again"
    found = _found(folder)
    kinds = {
        "missing": recorded.keys() - found.keys(),
        "added": found.keys() - recorded.keys(),
        "changed": {n for n in found.keys() & recorded.keys() if found[n] != recorded[n]},
    }
    told = [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    return "; ".join(told) or None


def _found(folder: Path) -> dict[str, str]:
    """SHA-256 of each file but the manifest and the signature by relative path, in their order.

    Anything else but a folder has the hash "".
    """
    own = {MANIFEST, SIGNATURE}
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            found[name] = ""
        elif path.is_file() and name not in own:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
