"""The folders that every node of a study must see: its output, and the data and weights it reads.

Adapters, checkpoints and the teacher store pass from node to node through the output folder. A node
that lacks the mount would write into a folder of its own, and the study would miss it at its end.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray

from vgid.cluster.resources import SlotShape
from vgid.config import RequestConfig
from vgid.errors import InputError
from vgid.files import write_atomically

DRIVER = "driver"  # the file with the token; beside it each node leaves one under its id
ANSWER_S = 60.0  # for a node to start a process and look


@dataclass(frozen=True)
class Shared:
    """What the driver's node sees; ``token`` tells its folder from another of that path."""

    place: Path  # for files of Ray in the output folder
    token: str
    reads: tuple[Path, ...]

    @classmethod
    def by(cls, place: Path, request: RequestConfig) -> Self:
        """Leave the token in ``place``; ``DiskError`` if that cannot be written."""
        base = request.model_path and Path(request.model_path)  # or an id on the hub
        folders = [each for each in (request.data, base, request.deployed_adapter) if each]
        outside = [each for each in folders if not each.is_relative_to(place.parent)]
        reads = tuple(each for each in outside if each.is_dir())
        shared = cls(place, secrets.token_hex(16), reads)
        write_atomically(place / DRIVER, shared.token.encode())
        return shared

    def fault(self) -> str | None:
        """Why this node cannot serve the study, in one sentence; None if it can."""
        node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        try:
            if (self.place / DRIVER).read_text() != self.token:
                return self._unseen(node, address, "another folder is there")
            (self.place / node).touch()
        except OSError as error:
            return self._unseen(node, address, str(error.strerror))
        for folder in self.reads:
            if not folder.is_dir():
                return f"{_named(node, address)} does not see {folder}; put it where all nodes do."
        return None

    def check(self, shape: SlotShape) -> None:
        """Have every other node that holds a worker look; ``InputError`` for the first that fails.

        A node that joins later looks when its first worker starts.
        """
        own = ray.get_runtime_context().get_node_id()
        asked: dict[Any, dict[str, Any]] = {}
        for node in ray.nodes():
            if node["Alive"] and shape.fits(node["Resources"]) and node["NodeID"] != own:
                there = {"ray.io/node-id": node["NodeID"]}
                look = ray.remote(num_cpus=0, max_retries=0, label_selector=there)(Shared.fault)
                asked[look.remote(self)] = node
        if asked:
            ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        for answer, node in asked.items():
            named = node["NodeID"], node["NodeManagerAddress"]
            try:
                fault = ray.get(answer, timeout=0)
            except ray.exceptions.RayError as error:
                if node["NodeID"] not in {each["NodeID"] for each in ray.nodes() if each["Alive"]}:
                    continue  # it died, and Ray has only now noticed
                what = f"cannot look ({type(error).__name__})"
                fault = f"{_named(*named)} {what}; mend it, or take it out of the cluster."
            if fault is None and not (self.place / node["NodeID"]).exists():
                fault = self._unseen(*named, "what it writes there does not arrive")
            if fault is not None:
                raise InputError(fault)

    def _unseen(self, node: str, address: str, why: str) -> str:
        return (
            f"{_named(node, address)} does not see {self.place.parent} as the driver's node does "
            f"({why}); mount the same storage on all nodes, or name a folder on it with --output."
        )


def _named(node: str, address: str) -> str:
    return f"ray: node {address} ({node[:8]})"
