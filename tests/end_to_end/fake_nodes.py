"""A cluster whose autoscaler starts and ends nodes, each some processes on this machine.

Ray's own ``AutoscalingCluster`` begins and ends with ``ray stop --force``, which would end every
other cluster of the machine; and its nodes have no memory to ask for.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.cluster_utils import Cluster

from tests.end_to_end.conftest import free_port

ROOT = Path(__file__).parents[2]
HEAD = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"
EMPTY = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "rsync_exclude",
    "rsync_filter",
)
"""What a configuration must have, and a launcher would use."""


class Nodes(FakeMultiNodeProvider):  # type: ignore[misc]
    """Ray's fake provider, whose nodes have the memory of their type."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, Any], labels: Any
    ) -> None:
        counted = {name: value for name, value in resources.items() if name != "memory"}
        params = partial(ray._private.parameter.RayParams, memory=resources["memory"])
        with mock.patch.object(ray._private.parameter, "RayParams", params):
            super()._create_node_with_resources_and_labels(
                node_config, tags, count, counted, labels
            )


@contextmanager
def autoscaled(folder: Path, node: dict[str, Any], most: int) -> Iterator[Cluster]:
    """A head without cores, and nodes of some resources that come on demand and go when idle."""
    address = f"{ray._private.services.get_node_ip_address()}:{free_port()}"
    provider = {
        "type": "external",
        "module": f"{__name__}.{Nodes.__name__}",
        "gcs_address": address,
        "head_node_id": HEAD,
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    types: dict[str, Any] = {
        HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    config = {
        "cluster_name": "fake",
        "max_workers": most,
        "idle_timeout_minutes": 0.05,
        "provider": provider,
        "head_node_type": HEAD_TYPE,
        "available_node_types": types,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in EMPTY},
    }
    path = folder / "cluster.json"
    path.write_text(json.dumps(config))
    head = {
        "num_cpus": 0,
        "gcs_server_port": int(address.rpartition(":")[2]),
        "autoscaling_config": str(path),
        "env_vars": {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD},
    }
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_FAKE_CLUSTER", "1")
        patch.setenv("RAY_enable_autoscaler_v2", "1")  # as `ray start` does
        patch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield cluster
        finally:
            started = set(psutil.Process().children(recursive=True)) - before
            ray.shutdown()
            cluster.shutdown()
            for process in started:  # those of nodes are the autoscaler's children, not Ray's here
                with suppress(psutil.Error):
                    process.kill()


def workers() -> int:
    """How many nodes there are beside the head."""
    return sum(node["Alive"] and node["NodeID"] != HEAD for node in ray.nodes())
