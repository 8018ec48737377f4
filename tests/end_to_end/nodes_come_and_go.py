"""Slots follow the cluster: nodes that come are used, and given back when there is nothing to do.

Not part of ``make test``: ``make test-nodes`` takes two minutes. Studies of light sessions
(``tests.end_to_end.light``) on clusters whose nodes are processes here.
"""

import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.end_to_end import fake_nodes, light
from tests.end_to_end.light import LightStudy

GB = 10**9
ROOM = {"CPU": 1, "memory": 2 * GB, "object_store_memory": 100 * 2**20}
"""A node for one slot."""
TIMEOUT_S = 120


class SomeAreLong(light.LightSession):
    """Its trials 0002 and 0005 go on until somebody lets them end."""

    def epoch(self, trial_id, number):
        super().epoch(trial_id, number)
        end = Path(self.request.store).parent / "end"
        while trial_id in ("0002", "0005") and not end.exists():
            time.sleep(0.1)


def wait_for(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def study(folder, cluster, trials, *flags, **environment):
    environment |= {"RAY_ADDRESS": cluster.address, "LIGHT_IDLE_S": "5"}
    environment[light.SESSION] = f"{__name__}:{SomeAreLong.__name__}"
    return LightStudy(folder, trials, *flags, **environment)


@pytest.fixture(scope="module")
def autoscaled(tmp_path_factory):
    with fake_nodes.autoscaled(tmp_path_factory.mktemp("cluster"), ROOM, most=2) as cluster:
        yield cluster


def test_an_autoscaler_brings_nodes_and_takes_each_when_its_slot_has_nothing_to_do(
    autoscaled, tmp_path
):
    assert fake_nodes.workers() == 0
    with study(tmp_path, autoscaled, 3, "--max-concurrent", "2") as running:
        running.wait_for(lambda: fake_nodes.workers() == 2, 60)
        running.wait_for(lambda: len(running.ended()) == 2)
        # The last trial runs, and the other slot has nothing to do.
        running.wait_for(lambda: fake_nodes.workers() == 1)
        assert running.in_flight() == ["0002"]
        (running.output / "end").touch()
        assert running.finish() == 0
        running.assert_consistent()
    wait_for(lambda: fake_nodes.workers() == 0)


def test_what_no_node_could_ever_hold_is_refused_by_what_there_is(autoscaled, tmp_path):
    flags = ("--gpus-per-worker", "1")
    with study(tmp_path, autoscaled, 2, "--max-concurrent", "2", *flags) as asking:
        assert asking.finish() == 2
    (tmp_path / "auto").mkdir()
    with study(tmp_path / "auto", autoscaled, 2, *flags) as auto:
        assert auto.finish() == 2
    for refused, why in ((asking, ", and no other is to come; "), (auto, "with --max-concurrent.")):
        last = refused.shown().strip().splitlines()[-1]
        assert last.startswith("ray: the cluster has too few GPUs for a trial of 1 worker(s) with")
        assert "the largest of its 1 node(s) has 0 CPU and 0 GPU and" in last
        assert why in last
    assert fake_nodes.workers() == 0


def test_auto_follows_nodes_that_join_and_go(tmp_path):
    node = {"num_cpus": 1, "memory": 2 * GB}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        with study(tmp_path, cluster, 8) as running:
            running.wait_for(lambda: running.in_flight() == ["0002"])
            joined = cluster.add_node(**node)
            # The new slot goes on with the trials after it, up to the next that is long.
            running.wait_for(lambda: running.in_flight() == ["0002", "0005"])
            cluster.remove_node(joined, allow_graceful=False)
            (running.output / "end").touch()
            assert running.finish() == 0
            running.assert_consistent()
    finally:
        cluster.shutdown()
