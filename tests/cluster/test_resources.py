"""How many slots a cluster holds, by cores, GPUs and memory."""

import pickle

import pytest
import ray
from rich.filesize import decimal

from vgid.cluster.connection import slot_count
from vgid.cluster.resources import RAY_BYTES, WORKER_BYTES, SlotShape, worker_bytes
from vgid.config import StudyConfig, TrialConfig
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
        (LAPTOP, SlotShape(), 16, 60, False, (10, "memory")),
        (LAPTOP, SlotShape(), 16, 60, True, (16, "--max-concurrent")),  # nodes may join
        (LAPTOP, SlotShape(), None, 2, False, (2, "the number of trials")),
        ((32.0, 4.0, 256.0 * GB), SlotShape(1, 1.0, 30 * GB), None, 60, True, (4, "GPUs")),
        ((32.0, 4.0, 64.0 * GB), SlotShape(1, 1.0, 30 * GB), None, 60, True, (2, "memory")),
        ((32.0, 4.0, 256.0 * GB), SlotShape(2, 1.0, 30 * GB), None, 60, True, (2, "GPUs")),
    ],
)
def test_what_runs_short_first_decides(nodes, node, shape, wanted, trials, joined, expected):
    nodes(node)
    assert slot_count(shape, wanted, trials, joined) == expected


def test_each_node_counts_its_own_memory(nodes):
    nodes((8.0, 0.0, 2.0 * GB), (8.0, 0.0, 1.1 * GB), (2.0, 0.0, 64.0 * GB))
    assert slot_count(SlotShape(), None, 60, joined=True)[0] == 1 + 0 + 2


def test_a_slot_that_fits_nowhere_is_refused_by_what_is_missing(nodes):
    nodes((16.0, 0.0, 1.0 * GB))
    with pytest.raises(InputError, match=r"too little memory .* 1.2 GB memory each; free some"):
        slot_count(SlotShape(), None, 60, joined=False)
    nodes((16.0, 0.0, 64.0 * GB))
    with pytest.raises(InputError, match="too little GPUs"):
        slot_count(SlotShape(gpus_per_worker=1.0), None, 60, joined=False)


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
