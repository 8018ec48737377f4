"""What something was made with: versions of the libraries, and the commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("vgid", "ray", "torch", "transformers", "peft", "optuna", "mlflow")


def provenance() -> dict[str, Any]:
    """Versions of what this process makes things with, and the commit if this is a checkout."""
    versions = {name: version(name) for name in LIBRARIES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # an installed package is no checkout
        return None
    return done.stdout.strip() or None
