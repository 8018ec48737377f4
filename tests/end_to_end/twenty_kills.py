"""Twenty kills at random moments of one study end in a complete and consistent study.

``make test-kill`` runs it, ``make test`` does not: it takes minutes. ``KILL_SEED`` draws other
moments and another order.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.browser.servers import mlflow_process
from tests.end_to_end.conftest import free_port
from tests.end_to_end.light import LightStudy

SERVER = "MLflow server"
KILLS = {
    "driver": 2,
    "worker": 5,
    "slot host": 4,
    "mailbox": 3,
    "trainable": 3,
    "raylet": 1,
    SERVER: 2,
}
END_THE_DRIVER = ("driver", "raylet")
PAUSE_S = (0.2, 5.0)
TRIALS = 200
MAX_RESUMES = 8
"""Beside the driver's own deaths a slot that lost its workers too often may end a run."""

pytestmark = pytest.mark.timeout(3600)


class Server:
    """A real MLflow server that can be killed, and comes back over the same store."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        folder.mkdir()
        self.store = f"sqlite:///{folder / 'mlflow.db'}"
        self._folder = folder
        self._stack = stack
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._start()

    def _start(self) -> None:
        running = mlflow_process(self.store, self._folder, self._port)
        self._process = self._stack.enter_context(running)

    def kill(self, away_s: float) -> None:
        """SIGKILL the server with its children, and start it again after some seconds."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        time.sleep(away_s)
        self._start()


@contextmanager
def killed_study(folder: Path) -> Iterator[tuple[LightStudy, Server]]:
    """A study of trials of seconds, in two slots, recorded on a server of its own."""
    with ExitStack() as stack:
        server = Server(folder / "server", stack)
        flags = ("--max-concurrent", "2", "--tracking-uri", server.uri)
        yield stack.enter_context(LightStudy(folder, TRIALS, *flags, LIGHT_EPOCH_S="0.3")), server


def test_twenty_kills_lose_nothing(tmp_path):
    draw = random.Random(int(os.environ.get("KILL_SEED", "0")))
    kinds = [kind for kind, times in KILLS.items() for _ in range(times)]
    draw.shuffle(kinds)
    assert len(kinds) == 20
    began, resumes = time.monotonic(), 0
    with killed_study(tmp_path) as (study, server):
        study.wait_for(study.ended)
        for kind in kinds:
            time.sleep(draw.uniform(*PAUSE_S))
            if study.over():
                assert resumes < MAX_RESUMES, study.shown()
                resumes += 1
                study.start("--resume")
            ended = {name: study.record(name) for name in study.ended()}
            print(f"{time.monotonic() - began:6.1f} s, {len(ended):3d} ended: {kind} killed")
            if kind == SERVER:
                server.kill(away_s=draw.uniform(*PAUSE_S))
            else:
                there = study.wait_for(lambda kind=kind: study.processes(kind))
                study.kill(kind, draw.randrange(len(there)))
            if kind in END_THE_DRIVER:
                assert study.finish() != 0
                resumes += 1
                study.start("--resume")
            assert {name: study.record(name) for name in ended} == ended
        while study.finish(timeout_s=1200) != 0:
            assert resumes < MAX_RESUMES, study.shown()
            resumes += 1
            study.start("--resume")
        print(f"{time.monotonic() - began:6.1f} s: complete after {resumes} resumes")
        study.assert_consistent(server.store)
