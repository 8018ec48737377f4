"""Chromium and PostgreSQL for the browser tests: Debian's, found or installed.

``python -m tests.browser.programs`` (``make test`` runs it) installs what is missing where that is
possible, and says in one line what the tests then have to do without.
"""

import os
import shutil
import subprocess
from pathlib import Path

PACKAGES = ("chromium", "postgresql")


def chromium() -> str | None:
    """Path of the browser."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def postgres_folder() -> Path | None:
    """Folder of ``initdb`` and ``postgres``, the newest; Debian keeps it off the PATH."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4])
    )
    on_path = shutil.which("initdb")
    found += [Path(on_path).resolve()] if on_path and not found else []
    return found[-1].parent if found else None


def missing() -> list[str]:
    """Packages whose programs are not there."""
    here = (chromium(), postgres_folder())
    return [name for name, found in zip(PACKAGES, here, strict=True) if found is None]


def reason() -> str:
    """Why the browser tests are left out, in one line."""
    return (
        f"tests/browser is LEFT OUT, so MLflow's pages are not tested: no "
        f"{' and no '.join(missing())} here; install Debian's packages of these names."
    )


def main() -> None:
    """Install what is missing, quietly; print one line if something still is."""
    packages = missing()
    if packages and shutil.which("apt-get") and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["apt-get", "-qq", "update"], check=False, **quiet)
        install = ["apt-get", "-qq", "--yes", "--no-install-recommends", "install", *packages]
        subprocess.run(install, check=False, **quiet)
    if missing():
        print(reason())


if __name__ == "__main__":
    main()
