"""Several workers of a session against one: what they deal out, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.small_benchmark import write_small
from tests.workers import run_workers
from vgid.config import RequestConfig, TrialConfig
from vgid.method import sharding
from vgid.method.workers import ALONE, Workers
from vgid.results import EpochReport
from vgid.trial import TrialSession

TRIAL = TrialConfig(epochs=1, response_source="teacher")


def _request(root: Path, store: str) -> RequestConfig:
    folders = {"data": root / "data", "store": root / store}
    return RequestConfig(**folders, retain_people=4, bootstrap_samples=100, log_responses=True)


def _work(workers: Workers, root: Path, store: str) -> dict[str, Any]:
    session = TrialSession(_request(root, store), workers.rank, workers.count)
    adapter = root / f"{store}-adapter"
    result = session.run(TRIAL, "0000", adapter)
    return {
        "base": session.base_scores("search"),
        "result": result,
        "misses": session.store.misses,
        "asked": len(next(iter(session.scorer._examinations.values())).items),
        "rescored": session.rescore(adapter, "held_out"),
    }


def _work_twice(workers: Workers, root: Path) -> dict[str, Any]:
    """With a whole base on each worker; and on a device that is too small for one."""
    found = _work(workers, root, "two")
    sharding.device_bytes = lambda device: 1
    session = TrialSession(_request(root, "dealt"), workers.rank, workers.count)
    layers = session.backbone.model.model.language_model.layers
    dealt = []

    def on_epoch(report: EpochReport) -> bool:
        dealt.append(_held(layers))
        return True

    endless = TRIAL.model_copy(update={"alpha": 1e308})
    found["failed"] = session.run(endless, "0000", root / "failed").status
    found["dealt"] = session.run(TRIAL, "0001", root / "dealt-adapter", on_epoch)
    found["dealt rescored"] = session.rescore(root / "dealt-adapter", "held_out")
    found["held"] = dealt, _held(layers)
    if workers.rank == 0:
        # By one worker alone, and in an empty store, the same adapter has the same scores.
        alone = TrialSession(_request(root, "alone"))
        found["alone"] = {
            "result": alone.scores_under("search", adapter_dir=root / "two-adapter"),
            "rescored": alone.rescore(root / "two-adapter", "held_out"),
        }
    return found


def _held(layers: torch.nn.Module) -> int:
    """Weights of the frozen base's layers that this worker has in memory."""
    weights = [p for name, p in layers.named_parameters() if "lora" not in name]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in weights)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    write_small(folder / "data", forget=4)
    return folder


@pytest.fixture(scope="module")
def one(root) -> dict[str, Any]:
    return _work(ALONE, root, "one")


@pytest.fixture(scope="module")
def two(root) -> list[dict[str, Any]]:
    return run_workers(_work_twice, 2, root / "workers", root)


def test_two_workers_give_the_scores_of_one_to_the_bit(one, two):
    first, second = two
    assert first["base"] == second["base"] == one["base"]
    assert first["rescored"] == second["rescored"] == first["alone"]["rescored"]
    assert first["result"].status == second["result"].status == "completed"
    assert first["result"].scores == first["alone"]["result"]
    assert list(first["result"].scores) == list(one["result"].scores)
    for name in ("forget_loss", "retain_loss"):
        expected = pytest.approx(one["result"].metrics[name], rel=1e-5, abs=1e-5)
        assert first["result"].metrics[name] == expected


def test_scores_and_responses_are_kept_as_by_one_worker(root, one, two):
    kept = [
        {p.name: p.read_bytes() for p in (root / s).glob("base-*.json")} for s in ("one", "two")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 2
    texts = [(root / f"{s}-adapter.responses.jsonl").read_text() for s in ("one", "two")]
    asked = [[line.split('"response"')[0] for line in text.splitlines()] for text in texts]
    assert asked[0] == asked[1]  # the questions, in one worker's order


def test_questions_and_teacher_are_dealt_out(one, two):
    """Half of each; a teacher's chunk is whole portraits, so it is less even."""
    shares = [worker["asked"] for worker in two]
    assert sum(shares) == one["asked"]
    assert max(shares) < 0.55 * one["asked"]
    misses = [worker["misses"] for worker in two]
    assert sum(misses) == one["misses"]
    assert max(misses) < 0.7 * one["misses"]


def test_a_base_too_large_for_a_worker_is_dealt_out_and_nothing_else_changes(root, two):
    """While it trains each has half of the layers' weights; adapter and scores are DDP's."""
    adapters = [(root / f"{s}-adapter" / "adapter_model.safetensors") for s in ("two", "dealt")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    for worker in two:
        during, after = worker["held"]
        assert worker["failed"] == "failed"  # and the session goes on
        assert worker["dealt rescored"] == worker["rescored"]
        assert worker["dealt"].scores == worker["result"].scores
        assert all(held == pytest.approx(after / 2, rel=0.02) for held in during)
    assert two[0]["held"][0] and not two[1]["held"][0]  # rank 0 is asked
