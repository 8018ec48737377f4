"""Nodes that do not see a study's folder as its driver does, found before they do harm."""

import json
import re

import pytest

from tests.cluster.nodes import WITHOUT_ROOT, can_be_alone, run_alone
from vgid.config import StudyConfig
from vgid.study.ledger import Ledger

pytestmark = pytest.mark.skipif(not can_be_alone(), reason=WITHOUT_ROOT)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """What nodes said, the folder that they were asked about, and what a study said of them."""
    folder = tmp_path_factory.mktemp("views") / "shared"
    done = run_alone("tests.cluster.views", str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def test_a_node_says_what_it_does_not_see(views):
    found, folder = views
    said, ids = found["said"], found["ids"]
    assert said["127.0.0.1"] is None
    assert said["127.0.0.2"] == (
        f"ray: node 127.0.0.2 ({ids['127.0.0.2'][:8]}) does not see {folder}/study as the driver's "
        "node does (No such file or directory); mount the same storage on all nodes, or name a "
        "folder on it with --output."
    )
    # It reads the output folder, and cannot know where its files go.
    assert said["127.0.0.3"] == (
        f"ray: node 127.0.0.3 ({ids['127.0.0.3'][:8]}) does not see {folder}/data/benchmark; put "
        "it where all nodes do."
    )


def test_a_check_asks_the_nodes_that_hold_a_worker_both_ways(views):
    found, _ = views
    assert "node 127.0.0.3 " in found["copy"] and "does not arrive" in found["copy"]
    assert found["data"] == found["said"]["127.0.0.3"]
    assert found["all"] is None
    others = [found["ids"][address] for address in ("127.0.0.2", "127.0.0.3")]
    assert found["answered"] == sorted(["driver", *others])


def test_a_study_is_refused_before_its_first_trial(views):
    found, folder = views
    code, said = found["study"]
    output = folder / "run"
    assert code == 2
    assert re.fullmatch(
        rf"ray: node 127\.0\.0\.[23] \(\w{{8}}\) does not see {output} as [^\n]*\n", said
    )
    assert not (output / "adapters").exists() and not list(output.glob("trials/0*"))
    # The same command works when the mount is there.
    with Ledger(output) as ledger:
        ledger.open(StudyConfig(output=output), "0" * 64, resume=False)
