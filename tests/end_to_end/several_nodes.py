"""Studies on several nodes, which break: nothing is lost, and nothing is doubled.

``make test-cluster`` runs it, ``make test`` does not: Ray by its own settings takes up to a minute
to believe that a node is gone.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from studies.local_cluster import LocalCluster, LocalConfig, can_isolate
from tests.end_to_end.cluster_study import IMPATIENT, ClusterStudy
from tests.end_to_end.light import ROOT

CUT_S = 30.0
TWO = LocalConfig(workers=2, memory_gb=3)  # a slot takes 1.2

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(TWO) as running:
        yield running


def wait_for_epoch(study, node, since=0):
    study.wait_for(lambda: study.epochs_on(node, since))


def cut_while_it_works(study, node):
    """Cut a node off in mid-trial; how many epochs there were then."""
    wait_for_epoch(study, node, len(study.epochs()))
    node.cut(CUT_S)
    return len(study.epochs())


def test_trials_run_on_all_nodes_and_one_may_span_two(cluster, tmp_path):
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        with ClusterStudy(cluster, folder, 6, "--workers-per-trial", str(ranks)) as study:
            assert study.finish() == 0, study.shown()
        study.assert_consistent()
        study.assert_went_on(6, ranks)
        # Each node runs the code that was sent with the job, from its own copy.
        copies = {epoch.address: epoch.code for epoch in study.epochs()}
        assert len(set(copies.values())) == len(copies)
        assert all(code.startswith(str(cluster.folder)) for code in copies.values())
        if ranks == 1:
            assert set(copies) == {node.address for node in cluster.nodes.values()}
        else:
            assert len({(epoch.trial, epoch.address) for epoch in study.epochs()}) == 2 * 6
        print(f"{ranks} worker(s) a trial: 6 trials completed, on {len(copies)} nodes")


def test_a_trial_on_two_nodes_goes_on_when_one_of_them_dies(cluster, tmp_path):
    with ClusterStudy(cluster, tmp_path, 4, "--workers-per-trial", "2", epoch_s=1.5) as study:
        study.wait_for(lambda: study.ended() and study.epochs()[-1].number == 1)
        held = {epoch.address for epoch in study.epochs()[-2:]} - {cluster.nodes[0].address}
        node = next(node for node in cluster.nodes.values() if node.address in held)
        before = {name: study.record(name) for name in study.ended()}
        node.kill()
        assert study.finish() == 0, study.shown()
    node.start()
    study.assert_consistent()
    study.assert_went_on(4, ranks=2, breaks=1)
    assert {name: study.record(name) for name in before} == before
    print(f"node {node.number} killed under a trial of 2 workers: 4 trials completed")


def test_a_study_may_start_while_ray_still_counts_a_node_that_is_gone(cluster, tmp_path):
    cluster.nodes[2].kill()
    with ClusterStudy(cluster, tmp_path, 4) as study:
        assert study.finish() == 0, study.shown()
    cluster.nodes[2].start()
    study.assert_consistent()
    study.assert_went_on(4)
    print("a study was started beside a dead node: 4 trials completed")


class Told:
    """Prints what became of a study, and that what had ended before is as it was."""

    def __init__(self, study: ClusterStudy) -> None:
        self._study = study
        self._began = time.monotonic()
        self._before: dict[str, bytes] = {}

    def __call__(self, what: str) -> None:
        study = self._study
        assert {name: study.record(name) for name in self._before} == self._before
        self._before = {name: study.record(name) for name in study.ended()}
        counts = f"{len(self._before):3d} ended, {study.repeated()} epochs done again"
        print(f"{time.monotonic() - self._began:6.1f} s, {counts}: {what}")


def test_nodes_that_die_come_and_go_cost_a_study_nothing(cluster, tmp_path):
    trials = 120
    with ClusterStudy(cluster, tmp_path, trials, "--max-concurrent", "4", epoch_s=1.0) as study:
        told, nodes = Told(study), cluster.nodes
        for number in (0, 1, 2):
            wait_for_epoch(study, nodes[number])
        told("trials on all three nodes")

        held = {epoch.trial for epoch in study.epochs_on(nodes[2])} - study.done()
        nodes[2].kill()
        lines = len(study.epochs())
        told(f"node 2 killed under {sorted(held)}")
        study.wait_for(lambda: held <= set(study.ended()))
        told("which ended on other nodes")

        added = cluster.add()
        wait_for_epoch(study, added)
        assert not study.epochs_on(nodes[2], lines)
        told("node 3 added, and used")

        lines = len(study.epochs())
        assert cut_while_it_works(study, nodes[1]) > lines
        told(f"node 1 was cut off for {CUT_S:g} s, others went on")
        wait_for_epoch(study, nodes[1], len(study.epochs()))
        told("node 1 is used again")

        nodes[0].kill()
        assert study.finish() != 0
        told("the head killed, and the study with it")
        nodes[0].start()
        cluster.wait_for_head()
        lines = len(study.epochs())
        study.start("--resume")
        for node in (nodes[0], nodes[1], added):
            wait_for_epoch(study, node, lines)
        told("a new head: resumed, on all nodes")
        assert study.finish(timeout_s=900) == 0, study.shown()
        told("complete")
    study.assert_consistent()
    study.assert_went_on(trials, breaks=3)


@pytest.mark.parametrize("isolated", [True, False])
def test_a_node_that_was_taken_for_dead_comes_back(tmp_path, monkeypatch, isolated):
    """Its workers go on with trials that others do by then; the two write in the same folders."""
    trials = 40
    if not isolated:
        monkeypatch.setattr("studies.local_cluster.can_isolate", lambda: False)
    with LocalCluster(TWO, **IMPATIENT) as cluster:
        if cluster.isolated is not isolated:
            pytest.skip("only root may give nodes a network each; `sudo make test-cluster` does it")
        with ClusterStudy(cluster, tmp_path, trials, "--max-concurrent", "3", epoch_s=2.0) as study:
            told, node = Told(study), cluster.nodes[1]
            wait_for_epoch(study, node)
            lines = cut_while_it_works(study, node)
            told(f"node 1 was cut off for {CUT_S:g} s")
            wait_for_epoch(study, node, lines + 1)
            told("node 1 is used again")
            assert study.finish() == 0, study.shown()
            told("complete")
    study.assert_consistent()
    study.assert_went_on(trials, breaks=1)
    assert "has been marked dead" in (study.output / "study.log").read_text()


@pytest.mark.parametrize("how", ["stop", "SIGTERM", "SIGKILL"])
def test_the_script_takes_jobs_and_leaves_nothing(how):
    if how == "SIGKILL" and not can_isolate():
        pytest.skip(
            "only a namespace ends its nodes with a killed script; `sudo make test-cluster`"
        )
    script = subprocess.Popen(
        [sys.executable, "studies/local_cluster.py", "--workers", "1", "--memory-gb", "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    shown = ""
    while "Here: add, kill N" not in shown:
        line = script.stdout.readline()
        assert line, script.stderr.read()
        shown += line
    settings = dict(re.findall(r"(RAY_AUTH\w+)=(\S+)", shown))
    (submit,) = re.findall(r"  (ray job submit .*) --working-dir", shown)
    programs = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for more in (settings, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 43}):
        done = subprocess.run(
            f"{submit} -- python -c 'print(6 * 7)'",
            shell=True,
            env=os.environ | programs | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ("\n42\n" in done.stdout) is (more is settings), done.stdout + done.stderr
    link = f"vgid{submit.split('.')[2]}"
    assert not can_isolate() or link in psutil.net_if_addrs()
    family = psutil.Process(script.pid).children(recursive=True)
    folder = Path(settings["RAY_AUTH_TOKEN_PATH"]).parents[1]
    assert folder.stat().st_mode & 0o077 == 0
    if how == "stop":
        lines = "kill 7\ncut 1 x\nadd\nkill 2\ncut 2 1\nstart 2\nstop\n"
        said = script.communicate(lines, timeout=60)
        assert said[1].count("is none of: add") == 2
    else:
        script.send_signal(getattr(signal, how))
        script.communicate(timeout=60)
    assert script.returncode == {"stop": 0, "SIGTERM": 130, "SIGKILL": -9}[how]
    assert psutil.wait_procs(family, timeout=20)[1] == []
    time.sleep(2)  # the kernel's own time, for what nobody holds any more
    assert not can_isolate() or link not in psutil.net_if_addrs()
    assert folder.exists() is (how == "SIGKILL")
    shutil.rmtree(folder, ignore_errors=True)
