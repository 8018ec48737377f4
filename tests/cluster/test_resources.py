"""How many slots a cluster holds, by cores, GPUs and memory."""

import pickle

import pytest
import ray
from rich.filesize import decimal

from vgid.cluster.connection import lacking, slot_count
from vgid.cluster.resources import RAY_BYTES, WORKER_BYTES, SlotShape, worker_bytes
from vgid.config import StudyConfig, TrialConfig, parse
from vgid.errors import InputError
from vgid.models.backbones import EMBEDDED
from vgid.study.plan import make_plan

GB = 10**9
TINY = EMBEDDED / "tiny-llava"


@pytest.fixture
def nodes(monkeypatch):
    """Makes Ray see the given nodes: (cores, GPUs, bytes of memory) each."""

    def make(*sizes):
        there = [
            {"Alive": True, "Resources": {"CPU": cpu, "GPU": gpu, "memory": memory}}
            for cpu, gpu, memory in sizes
        ]
        gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0, "memory": 512.0 * GB}}
        monkeypatch.setattr(ray, "nodes", lambda: [*there, gone])

    return make


LAPTOP = (16.0, 0.0, 12.0 * GB)
"""16 GB, of which Ray found 12 free."""


def test_a_laptop_of_16_cores_and_16_gb_is_limited_by_its_memory(nodes):
    nodes(LAPTOP)
    count, decider = slot_count(SlotShape(), None, 100, joined=False)
    assert decider == "memory"
    assert count * (RAY_BYTES + WORKER_BYTES) <= 12 * GB < (count + 1) * (RAY_BYTES + WORKER_BYTES)


@pytest.mark.parametrize(
    ("node", "shape", "wanted", "trials", "joined", "expected"),
    [
        ((2.0, 0.0, 18.0 * GB), SlotShape(), None, 60, False, (2, "cores")),
        (LAPTOP, SlotShape(), 3, 60, False, (3, "--max-concurrent")),
        (LAPTOP, SlotShape(), 16, 60, False, (11, "memory")),
        (LAPTOP, SlotShape(), 16, 60, True, (16, "--max-concurrent")),  # nodes may join
        (LAPTOP, SlotShape(), None, 2, False, (2, "the number of trials")),
        ((32.0, 4.0, 256.0 * GB), SlotShape(1, 1.0, 30 * GB), None, 60, True, (4, "GPUs")),
        ((32.0, 4.0, 64.0 * GB), SlotShape(1, 1.0, 30 * GB), None, 60, True, (2, "memory")),
        ((32.0, 4.0, 256.0 * GB), SlotShape(2, 1.0, 30 * GB), None, 60, True, (2, "GPUs")),
        ((32.0, 2.0, 256.0 * GB), SlotShape(1, 0.25), None, 60, True, (8, "GPUs")),
        ((32.0, 2.0, 256.0 * GB), SlotShape(1, 0.1), None, 60, True, (20, "GPUs")),
        # A share is one of a single GPU: of each two fifths are left over.
        ((32.0, 4.0, 256.0 * GB), SlotShape(1, 0.6), None, 60, True, (4, "GPUs")),
        ((32.0, 8.0, 256.0 * GB), SlotShape(1, 3.0), None, 60, True, (2, "GPUs")),
    ],
)
def test_what_runs_short_first_decides(nodes, node, shape, wanted, trials, joined, expected):
    nodes(node)
    assert slot_count(shape, wanted, trials, joined) == expected


def test_each_node_counts_its_own_memory(nodes):
    nodes((8.0, 0.0, 2.0 * GB), (8.0, 0.0, 1.0 * GB), (2.0, 0.0, 64.0 * GB))
    assert slot_count(SlotShape(), None, 60, joined=True)[0] == 1 + 0 + 2


def test_a_slot_that_fits_nowhere_is_refused_by_what_is_missing_and_what_is_there(nodes):
    nodes((16.0, 0.0, 1.0 * GB), (2.0, 0.0, 0.5 * GB))
    assert slot_count(SlotShape(), None, 60, joined=False)[0] == 0
    assert slot_count(SlotShape(), 4, 60, joined=False)[0] == 0
    assert slot_count(SlotShape(), None, 60, joined=True)[0] == 0
    assert slot_count(SlotShape(), 4, 60, joined=True) == (4, "--max-concurrent")
    need = SlotShape().need
    assert lacking(SlotShape(), None).startswith(
        f"ray: the cluster has too little memory for a trial of 1 worker(s) with {need} each: the "
        "largest of its 2 node(s) has 16 CPU and 1.0 GB memory; free some memory, or lower"
    )
    nodes((64.0, 1.0, 64.0 * GB), (16.0, 4.0, 64.0 * GB))
    shape = SlotShape(gpus_per_worker=8.0)
    for wanted, follows in ((None, "; lower"), (4, ", and no other is to come; lower")):
        said = lacking(shape, wanted)
        assert "too few GPUs" in said
        assert f"has 16 CPU and 4 GPU and 64.0 GB memory{follows}" in said
        assert ("--max-concurrent" in said) == (wanted is None)


def test_what_is_no_share_of_a_gpu_and_no_whole_number_is_refused(tmp_path):
    def config(**flags):
        return parse(StudyConfig, {"output": tmp_path / "out", **flags}, "command line")

    for gpus in (0.25, 1, 2.0):
        assert config(gpus_per_worker=gpus).gpus_per_worker == gpus
    for gpus in (1.5, 2.25):
        with pytest.raises(InputError, match=f"gpus_per_worker: {gpus} is no share of one GPU"):
            config(gpus_per_worker=gpus)
    with pytest.raises(InputError, match="--gpus-per-worker: the workers of one trial cannot"):
        make_plan(config(gpus_per_worker=0.5, workers_per_trial=2))
    assert not (tmp_path / "out").exists()


def test_the_plan_says_what_a_worker_needs(tmp_path):
    plan = make_plan(StudyConfig(output=tmp_path / "out", trials=1))
    weights = sum(file.stat().st_size for file in TINY.glob("*.safetensors"))
    assert plan.shape.worker_bytes == pytest.approx(WORKER_BYTES + weights, rel=1e-3)  # fp32
    need = f"each 1 worker(s) with 1 CPU and {decimal(int(plan.shape.per_worker['memory']))} memory"
    assert any(need in line for line in plan.lines())


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, pickle.dumps({"w": [1.0]}) * 9])
def test_what_is_no_safetensors_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model.safetensors: is no safetensors file"):
        worker_bytes("tiny-llava", None, tmp_path, TrialConfig(), on_gpu=False)
