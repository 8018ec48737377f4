"""A Ray head of its own, closed by a token, that outlives the studies which join it."""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.end_to_end.conftest import free_port

PATIENCE_S = 180


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        process: what ``ray start`` stays as; Ray's processes are its children.
        environment: of the head: no other Ray, its token, its folder, this Python first.
        port: of its control store.
        dashboard: port of the dashboard.
        folder: for Ray's temporary files.
    """

    process: psutil.Popen
    environment: dict[str, str]
    port: int
    dashboard: int
    folder: Path

    @property
    def joining(self) -> dict[str, str]:
        """What a driver's environment needs to join it."""
        shown = {name: self.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        return {"RAY_ADDRESS": f"127.0.0.1:{self.port}", **shown}


@contextmanager
def ray_head(cores: int = 2, **more: str) -> Iterator[Head]:
    """A head with so many cores and further environment; it ends with the block."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    port, dashboard = free_port(), free_port()
    # Short, since a socket's path has 107 bytes.
    with tempfile.TemporaryDirectory(
        prefix="vgid", dir="/tmp", ignore_cleanup_errors=True
    ) as short:
        environment = clean | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": short,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_urlsafe(32),
            **more,
        }
        process = psutil.Popen(
            [
                *("ray", "start", "--head", "--block", f"--num-cpus={cores}", f"--port={port}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                *(f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={short}"),
            ],
            cwd=Path(__file__).parent.parent.parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            end = time.monotonic() + PATIENCE_S
            while not (Path(short) / "ray_current_cluster").exists():  # the last that a start does
                assert process.is_running() and time.monotonic() < end, "the head does not start"
                time.sleep(0.2)
            yield Head(process, environment, port, dashboard, Path(short))
        finally:
            for child in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()
