"""MLflow servers for the browser tests: one on SQLite, one on PostgreSQL, both on the loopback."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.browser.programs import postgres_folder
from tests.end_to_end.conftest import free_port

PATIENCE_S = 180


@contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program with its children, stopped at the end."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def mlflow_server(store: str, folder: Path, *artifacts: str) -> Iterator[str]:
    """An MLflow server over ``store``; yields its address once it answers."""
    port = free_port()
    with mlflow_process(store, folder, port, *artifacts):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def mlflow_process(
    store: str, folder: Path, port: int, *artifacts: str
) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server in a process group, once it answers.

    It keeps ``artifacts`` as these flags say, or in the folder.
    Where it listens and whom it answers is left to MLflow, as by the command that a study prints.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += artifacts or ["--artifacts-destination", str(folder / "artifacts")]
    command += ["--workers", "1", "--port", str(port)]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    log = folder / "server.log"
    with running(command, log, cwd=folder, env=environment) as process:
        _wait_for(lambda: _answers(f"http://127.0.0.1:{port}/health"), process, log)
        yield process


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own behind a socket that no one else can open; yields its URI.

    PostgreSQL refuses to run as root, so then it runs as the user that Debian's package makes.
    """
    programs = postgres_folder()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="vgid-pg-"))  # short: a socket's path has 107 bytes
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": "/"}
        shutil.chown(folder, "postgres", "postgres")
    try:
        initdb = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "vgid", "-A", "trust"]
        subprocess.run(
            [*initdb, "--no-sync", "-E", "UTF8"], check=True, stdout=subprocess.DEVNULL, **user
        )
        server = [str(programs / "postgres"), "-D", str(folder / "data"), "-k", str(folder)]
        server += ["-c", "listen_addresses=", "-c", "fsync=off"]
        log = folder / "server.log"
        ready = [str(programs / "pg_isready"), "-q", "-h", str(folder)]
        with running(server, log, **user) as process:
            _wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, process, log)
            yield f"postgresql+psycopg2://vgid@/postgres?host={folder}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def _wait_for(ready: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
