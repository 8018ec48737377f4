"""A Ray cluster of several nodes on this one machine, to try and to test what a cluster does.

For root on Linux each node is nearly a machine of its own: an address and a network cable (network
namespace and veth), processes (a PID namespace, so that all of a node's end at once), Ray's files,
a token file, cores and memory. The disk they share, as a cluster's nodes share its storage. Without
root, nodes are processes on loopback, and a cut cable is a node that stands still.

::

    this machine, .254 ──┐          the head, .1, with Ray's dashboard
                         switch ────┤
                                    worker nodes, .2 and on

Ray's services ask for the token and cannot be reached from other machines. ``LocalCluster`` is the
same for tests.

Example:
    python studies/local_cluster.py --workers 2     and, in another terminal, what it prints
"""

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
from pydantic import Field

from vgid.command_line import Parser, exit_code
from vgid.config import Config
from vgid.errors import InputError

START_S = 120.0  # how long a head may take until its dashboard answers
OBJECT_STORE_BYTES = 100 * 2**20
# However this script ends, its namespaces end: each is gone with its first process.
BOUND = ("setpriv", "--pdeathsig", "KILL")
NAMESPACES = (*BOUND, "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child")
MACHINE = (*NAMESPACES, "--mount-proc")
PLUGGED = "until ip -o link show dev eth0 up 2>&1 | grep -q LOWER_UP; do sleep 0.05; done; "
# As a machine's service manager does: a node whose Ray gave up joins again.
FOREVER = "while :; do {}; sleep 1; done"
# A job's workers have its files, which those that Ray starts before it is asked have not.
ON_DEMAND = {"RAY_prestart_worker_first_driver": "0"}
COMMANDS = "add, kill N, start N, cut N SECONDS, stop"


class LocalConfig(Config):
    """What a cluster of this machine is made of."""

    workers: int = Field(2, ge=0, le=200, description="nodes beside the head")
    cpus: int = Field(1, ge=1, description="cores that each node says it has")
    memory_gb: float | None = Field(
        None, gt=0, description="and memory; without it, its share of what is free now"
    )


class Node:
    """One node, the head if its ``number`` is 0; ``LocalCluster`` makes it."""

    def __init__(self, cluster: "LocalCluster", number: int) -> None:
        self.number = number
        self.address = f"{cluster.net}.{number + 1}"
        self._cluster = cluster
        self._folder = cluster.folder / str(number)
        self._root: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Switch it on, if it is off; its Ray joins as soon as it can."""
        if self._root is not None:
            return
        cluster = self._cluster
        self._folder.mkdir(exist_ok=True)
        token = self._folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(cluster.token)
        environment = cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(token)}
        loop = FOREVER.format(shlex.join(cluster.ray_start(self.number, self._folder / "ray")))
        command = [*MACHINE, "sh", "-c", PLUGGED + loop]
        if not cluster.isolated:
            command = [*BOUND, "sh", "-c", loop] if shutil.which(BOUND[0]) else ["sh", "-c", loop]
        with (self._folder / "shown.txt").open("ab") as shown:
            self._root = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=shown, stderr=shown
            )
        if cluster.isolated:
            cluster.plug(self._root.pid, self.address, self._port)

    def kill(self) -> None:
        """Switch it off: SIGKILL to all its processes, and no word to anyone."""
        if self._root is None:
            return
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        self._root.wait()
        self._root = None
        if self._cluster.isolated:
            # The kernel does it too, some time after the last process.
            with contextlib.suppress(subprocess.CalledProcessError):
                self._cluster.at_switch("ip", "link", "delete", self._port)

    def cut(self, seconds: float) -> None:
        """Pull its cable, wait, and plug it in again; without a cable, it stands still.

        Raises:
            ValueError: the seconds are none that one can wait.
        """
        if not 0 <= seconds <= threading.TIMEOUT_MAX:
            raise ValueError(seconds)
        if self._cluster.isolated and self._root is not None:
            link = ("ip", "link", "set", self._port)
            self._cluster.at_switch(*link, "down")
            time.sleep(seconds)
            self._cluster.at_switch(*link, "up")
            return
        stopped = self.processes()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            time.sleep(seconds if number == signal.SIGSTOP else 0)

    def processes(self) -> list[psutil.Process]:
        """All its processes; none if it is off."""
        if self._root is None:
            return []
        try:
            root = psutil.Process(self._root.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @property
    def _port(self) -> str:
        return f"node{self.number}"


class LocalCluster:
    """A head and worker nodes; use as a context manager, which leaves nothing behind.

    Args:
        config: how many, and what they have.
        **environment: for all that runs on the nodes.

    Attributes:
        nodes: by their numbers, the head's is 0.
        dashboard: where ``ray job submit`` sends jobs.
        token: that Ray asks for.
        isolated: whether the nodes have namespaces.
        environment: what runs on the nodes has, and where ``ray job submit`` may run.

    Raises:
        InputError: the head does not start.
    """

    def __init__(self, config: LocalConfig, **environment: str) -> None:
        self.config = config
        self.token = secrets.token_urlsafe(32)
        self.isolated = can_isolate()
        self.nodes: dict[int, Node] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        here = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        programs = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.environment = here | programs | ON_DEMAND | {"RAY_AUTH_MODE": "token"} | environment
        self._ports = {"port": 6379, "dashboard-port": 8265}
        if not self.isolated:
            self._ports = {name: _free_port() for name in self._ports}

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="vgid-nodes-", dir="/tmp"))  # short, for sockets
        self.environment["RAY_AUTH_TOKEN_PATH"] = str(self.folder / "0" / "auth_token")
        try:
            self.net = self._switch_on() if self.isolated else f"127.{secrets.randbelow(254) + 1}.7"
            self.dashboard = f"http://{self.net}.1:{self._ports['dashboard-port']}"
            for _ in range(1 + self.config.workers):
                self.add()
            self.wait_for_head()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes.values():
            node.kill()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self) -> Node:
        """Start one more node."""
        node = self.nodes[len(self.nodes)] = Node(self, len(self.nodes))
        node.start()
        return node

    def wait_for_head(self) -> None:
        """Wait until the head takes jobs."""
        asked = urllib.request.Request(
            f"{self.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"}
        )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=5):
                return
            if time.monotonic() > deadline:
                shown = (self.folder / "0" / "shown.txt").read_text(errors="replace")
                raise InputError(f"ray: the head did not start; it said: {shown[-500:]}")
            time.sleep(0.2)

    def ray_start(self, number: int, files: Path) -> list[str]:
        """The command that starts Ray on a node."""
        share = psutil.virtual_memory().available / (1 + self.config.workers)
        memory = share if self.config.memory_gb is None else self.config.memory_gb * 1e9
        ports = [f"--{name}={port}" for name, port in self._ports.items()]
        place = [f"--address={self.net}.1:{self._ports['port']}"]
        if number == 0:
            place = ["--head", *ports, f"--dashboard-host={self.net}.1"]
        if not self.isolated:
            place.append(f"--dashboard-agent-listen-port={_free_port()}")
        return [
            *("ray", "start", "--block", "--disable-usage-stats", *place),
            *(f"--node-ip-address={self.net}.{number + 1}", f"--temp-dir={files}"),
            *(f"--num-cpus={self.config.cpus}", f"--memory={int(memory)}"),
            *("--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"),
        ]

    def at_switch(self, *command: str) -> None:
        """Run a command in the switch's network namespace."""
        assert self._switch is not None
        _run("nsenter", f"--net=/proc/{self._switch.pid}/ns/net", *command)

    def plug(self, pid: int, address: str, port: str) -> None:
        """Give the network namespace of a process an address, by a cable to the switch."""
        _wait_for_namespace(pid)
        peer = ("peer", "name", "eth0", "netns", str(pid))
        self.at_switch("ip", "link", "add", port, "type", "veth", *peer)
        self.at_switch("ip", "link", "set", port, "master", "switch", "up")
        inside = ("nsenter", f"--net=/proc/{pid}/ns/net", "ip")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")

    def _switch_on(self) -> str:
        """Start the switch, with a cable to this machine; the first three numbers of its net."""
        self._switch = subprocess.Popen([*BOUND, "unshare", "--net", "sleep", "infinity"])
        _wait_for_namespace(self._switch.pid)
        # Of 198.18.0.0/15, which is for tests of networks and nobody's (RFC 2544). Who holds the
        # interface of a number has its net.
        peer = ("peer", "name", "machine", "netns", str(self._switch.pid))
        for number in range(256):
            name = f"vgid{number}"
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "link", "add", name, "type", "veth", *peer)
                break
        else:
            raise InputError("network: 256 local clusters run here already; stop some of them.")
        _run("ip", "address", "add", f"198.18.{number}.254/24", "dev", name)
        _run("ip", "link", "set", name, "up")
        self.at_switch("ip", "link", "add", "switch", "type", "bridge")
        self.at_switch("ip", "link", "set", "switch", "up")
        self.at_switch("ip", "link", "set", "machine", "master", "switch", "up")
        return f"198.18.{number}"


def can_isolate() -> bool:
    """Whether this user may make namespaces and cables between them here."""
    if not all(map(shutil.which, ("ip", "nsenter", "setpriv", "unshare"))):
        return False
    probe = [*MACHINE, *["ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"]]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def _wait_for_namespace(pid: int) -> None:
    ours = Path("/proc/self/ns/net").readlink()
    while Path(f"/proc/{pid}/ns/net").readlink() == ours:
        time.sleep(0.01)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def obey(cluster: LocalCluster, line: str) -> bool:
    """Do what a line says; False for ``stop``.

    Raises:
        InputError: it is none of ``COMMANDS``.
    """
    try:
        match line.split():
            case []:
                pass
            case ["stop"]:
                return False
            case ["add"]:
                print(f"node {cluster.add().number}")
            case ["kill" | "start" as what, number]:
                getattr(cluster.nodes[int(number)], what)()
            case ["cut", number, seconds]:
                cluster.nodes[int(number)].cut(float(seconds))
            case _:
                raise ValueError
    except (ValueError, KeyError):
        raise InputError(f"{line.strip()!r} is none of: {COMMANDS}.") from None
    return True


def serve(config: LocalConfig) -> Mapping[str, Any]:
    """Keep a cluster and obey lines of the terminal, until told to stop."""
    with LocalCluster(config) as cluster:
        kind = (
            "with addresses of their own" if cluster.isolated else "on loopback, for want of root"
        )
        print(
            f"A head and {config.workers} worker nodes {kind}. Submit a study from anywhere here:\n"
        )
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
        print(f"  export {' '.join(f'{name}={cluster.environment[name]}' for name in names)}")
        print(
            f"  ray job submit --address {cluster.dashboard} --working-dir . -- \\\n"
            f"    python studies/pareto_search.py --output {Path('runs/cluster').absolute()}\n"
        )
        print(f"Here: {COMMANDS}. N is 0 for the head, 1 for the first worker node.", flush=True)
        for line in sys.stdin:
            try:
                if not obey(cluster, line):
                    return {}
            except InputError as bad:
                print(bad, file=sys.stderr)
        signal.pause()  # no terminal: until a signal
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when told to stop, 2 after bad input or where no cluster starts, 130 after a signal.
    """
    parser = Parser("local_cluster.py", "Start a Ray cluster on this machine.", LocalConfig)
    return exit_code(
        lambda: serve(parser.read(arguments).config(LocalConfig)), "The cluster was stopped."
    )


if __name__ == "__main__":
    sys.exit(main())
