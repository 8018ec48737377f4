"""A Ray cluster of several nodes of this machine, some of which see other folders than the first.

For root on Linux, in a network namespace that has a loopback and nothing else; there each further
node has an address and a mount namespace of its own.
"""

import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
# Nothing outlives whoever started it: without its first process a PID namespace is gone.
ENDS = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child")
ALONE = (
    *(*ENDS, "--net", "--mount", "--mount-proc"),
    *("sh", "-c", 'ip link set lo up && exec "$@"', "sh"),
)
WITHOUT_ROOT = "only root may give nodes views of their own; `unshare -r pytest FILE` runs it so"
STORE_BYTES = 100 * 2**20
JOIN_S = 120.0


def run_alone(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module in such a namespace, where it finds Ray's token in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return subprocess.run(
        [*ALONE, sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=clean | ray | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def can_be_alone() -> bool:
    """Whether this process may make such a namespace."""
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


class Nodes:
    """A head of one core; use as a context manager, in which further nodes are added."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Nodes":
        host, port = self.address.split(":")
        head = f"--head --port={port} --node-ip-address={host} --num-gpus=0"
        self._start(f"{head} --include-dashboard=false")
        wait_for(lambda: _answers(host, int(port)), "the head does not start")
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._started):
            self.end(process)

    def add(self, number: int, mount: str = "true", gpus: int = 0) -> subprocess.Popen[bytes]:
        """Add the node 127.0.0.``number``, for which ``mount`` changes what it sees."""
        flags = f"--address={self.address} --node-ip-address=127.0.0.{number} --num-gpus={gpus}"
        return self._start(flags, mount)

    def _start(self, flags: str, mount: str = "true") -> subprocess.Popen[bytes]:
        ray = shlex.quote(str(Path(sys.executable).with_name("ray")))
        flags += f" --num-cpus=1 --object-store-memory={STORE_BYTES} --block"
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f"{mount} && exec {ray} start {flags}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._started.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a node with all its processes."""
        self._started.remove(process)
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, timeout=10)
        process.wait()


def _answers(host: str, port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex((host, port)) == 0


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Wait until something holds; its value."""
    deadline = time.monotonic() + JOIN_S
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return value
