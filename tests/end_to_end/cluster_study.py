"""A study of light sessions as a job on a cluster of several nodes, and what it did where."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from studies.local_cluster import LocalCluster, Node
from tests.end_to_end.light import ROOT, SESSION, LightSession, LightStudy

PLACES = "LIGHT_PLACES"
"""Environment variable: the file that each worker adds a line to when it has done an epoch."""

SLOTS = 4  # of a study here, at most

IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Environment of a cluster that believes within seconds, not a minute, that a node is gone."""


class Epoch(NamedTuple):
    """One epoch that one worker has done."""

    trial: str
    number: int
    rank: int
    address: str  # of its node
    code: str  # the file that it runs


class Placed(LightSession):
    """Tells where it does its epochs; several workers meet in torch's process group too."""

    def epoch(self, trial_id: str, number: int) -> None:
        """An epoch, and a line in one write, so that lines of several workers do not mix."""
        import ray

        import vgid

        super().epoch(trial_id, number)
        if self.world_size > 1:
            import torch

            met = torch.ones(1)
            torch.distributed.all_reduce(met)
            assert met.item() == self.world_size
        done = Epoch(
            trial_id, number, self.rank, ray.util.get_node_ip_address(), str(vgid.__file__)
        )
        file = os.open(os.environ[PLACES], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, json.dumps(done).encode() + b"\n")
        os.close(file)


class ClusterStudy(LightStudy):
    """A study that is submitted as ``ray job submit`` does; see ``LightStudy``."""

    def __init__(
        self,
        cluster: LocalCluster,
        folder: Path,
        trials: int,
        *flags: str,
        epochs: int = 3,
        epoch_s: float = 0.5,
    ) -> None:
        super().__init__(folder, trials, *flags, epochs=epochs)
        self._cluster = cluster
        self._epochs = epochs
        self._places = folder / "places.jsonl"
        self._workers = {
            SESSION: f"{Placed.__module__}:{Placed.__name__}",
            PLACES: str(self._places),
            "LIGHT_EPOCH_S": str(epoch_s),
        }

    def start(self, *more: str) -> None:
        """Submit the study, for a resume with ``--resume``."""
        submit = ["--address", self._cluster.dashboard, "--working-dir", "."]
        submit += ["--runtime-env-json", json.dumps({"env_vars": self._workers})]
        ray = str(Path(sys.executable).with_name("ray"))
        program = ["python", "-m", "tests.end_to_end.light", *self._flags, *more]
        with self._shown.open("ab") as shown:
            self._driver = subprocess.Popen(
                [ray, "job", "submit", *submit, "--", *program],
                cwd=ROOT,
                env=self._cluster.environment,
                stdout=shown,
                stderr=shown,
            )

    def epochs(self) -> list[Epoch]:
        """All epochs that workers have done, in this order."""
        if not self._places.exists():
            return []
        return [Epoch(*json.loads(line)) for line in self._places.read_text().splitlines()]

    def epochs_on(self, node: Node, since: int = 0) -> list[Epoch]:
        """Those of a node, without the first ``since`` of all."""
        return [epoch for epoch in self.epochs()[since:] if epoch.address == node.address]

    def done(self) -> set[str]:
        """The trials whose last epoch some worker has done."""
        return {epoch.trial for epoch in self.epochs() if epoch.number == self._epochs}

    def repeated(self) -> int:
        """How many epochs were done once more than needed."""
        done = Counter((epoch.trial, epoch.number, epoch.rank) for epoch in self.epochs())
        return sum(done.values()) - len(done)

    def assert_went_on(self, trials: int, ranks: int = 1, breaks: int = 0) -> None:
        """Each rank did each epoch, and after a break went on from the checkpoint.

        An epoch is done again where a worker could not tell of it, one a slot and break at most.
        """
        done = defaultdict(list)
        for epoch in self.epochs():
            done[epoch.trial, epoch.rank].append(epoch.number)
        names = [f"{number:04d}" for number in range(trials)]
        assert sorted(done) == [(name, rank) for name in names for rank in range(ranks)]
        for numbers in done.values():
            assert numbers == sorted(numbers)
            assert set(numbers) == set(range(1, self._epochs + 1))
        assert self.repeated() <= breaks * ranks * SLOTS
