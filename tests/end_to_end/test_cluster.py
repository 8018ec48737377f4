"""The short form of ``make test-cluster``: a job on two nodes, one of which dies."""

from pathlib import Path

import pytest

from studies.local_cluster import LocalCluster, LocalConfig, Node, main, obey
from tests.end_to_end.cluster_study import IMPATIENT, ClusterStudy
from vgid.errors import InputError
from vgid.interrupts import Background
from vgid.study.mlflow_client import connect

TRIALS = 4


def test_a_study_on_two_nodes_goes_on_when_one_dies(tmp_path):
    two = LocalConfig(workers=1, memory_gb=3)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    flags = ("--max-concurrent", "2", "--tracking-uri", store)
    # MLflow's tables are made while the head starts; a study waits for them.
    made = Background("mlflow").submit(connect, store, tmp_path, "tiny-llava")
    with LocalCluster(two, **IMPATIENT) as cluster:
        made.result()
        with ClusterStudy(cluster, tmp_path, TRIALS, *flags) as study:
            node = cluster.nodes[1]
            held = study.wait_for(lambda: {e.trial for e in study.epochs_on(node)} - study.done())
            node.kill()
            assert study.finish() == 0, study.shown()
        processes = [process for node in cluster.nodes.values() for process in node.processes()]
    study.assert_consistent(store)
    study.assert_went_on(TRIALS, breaks=1)
    for trial in held:  # each goes on from its checkpoint on the other node
        assert {epoch.address for epoch in study.epochs() if epoch.trial == trial} > {node.address}
    assert processes
    assert not [process for process in processes if process.is_running()]
    assert not cluster.folder.exists()


@pytest.mark.parametrize("flags", [["--workers", "-1"], ["--cpus", "many"], ["--nodes", "2"]])
def test_bad_flags_are_refused_in_a_sentence(flags, capsys):
    assert main(flags) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert flags[0].strip("-") in sentence


@pytest.mark.parametrize("line", ["kill", "kill 7", "cut 0 soon", "cut 0 -1", "start x", "halt"])
def test_what_is_no_command_is_refused_with_what_is_one(line):
    cluster = LocalCluster(LocalConfig())
    cluster.net, cluster.folder = "127.0.7", Path("/nowhere")
    cluster.nodes[0] = Node(cluster, 0)
    with pytest.raises(InputError, match="is none of: add, kill N, start N, cut N SECONDS, stop"):
        obey(cluster, line)
    assert not obey(cluster, "stop")
    assert obey(cluster, "")
