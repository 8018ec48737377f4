"""A request on top of a deployment: who is asked, what is trained, what is shipped."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vgid.config import RequestConfig
from vgid.data.benchmark import Benchmark
from vgid.data.splits import choose_people
from vgid.data.synthetic import write_benchmark
from vgid.deployment.record import Shipped, read_deployment
from vgid.deployment.unlearn import UnlearnConfig, unlearn
from vgid.errors import InputError
from vgid.models import adapters as adapter
from vgid.models.adapter_files import read_adapter
from vgid.models.backbones import load
from vgid.results import Score


def request_for(data: Path, **values) -> RequestConfig:
    return RequestConfig(data=data, store=data, retain_people=4, **values)


def test_earlier_people_are_neither_forgotten_again_nor_retained(tmp_path):
    write_benchmark(tmp_path / "data")  # whole: the larger forget sets hold more people
    benchmark = Benchmark.open(tmp_path / "data")
    earlier = benchmark.person_ids("forget_5")
    ten = benchmark.person_ids("forget_10")
    # The ratio is smaller than what was forgotten before, so its retain config holds them.
    request = request_for(benchmark.root, forget_ratio=5, earlier_ids=ten[:1] + ten[5:])
    people = choose_people(benchmark, request)
    retained = {p.id for p in (*people.retain, *people.retain_pool, *people.few_shot)}
    assert {p.id for p in people.earlier} == {ten[0], *ten[5:]}
    assert {p.id for p in people.forget} == set(earlier) - set(request.earlier_ids)
    assert {p.id for p in people.test} == {p.id for p in people.forget}
    assert not retained & (set(request.earlier_ids) | {p.id for p in people.forget})
    chosen = choose_people(benchmark, request_for(benchmark.root, forget_ids=earlier[1:3]))
    assert [p.id for p in chosen.forget] == list(earlier[1:3]) and chosen.earlier == ()
    assert not {p.id for p in chosen.retain_pool} & set(earlier)


def test_bad_ids_are_one_sentence(benchmark_folder):
    benchmark = Benchmark.open(benchmark_folder)
    five = benchmark.person_ids("forget_5")
    with pytest.raises(InputError, match="forget_5: an earlier request suppressed everyone in it"):
        choose_people(benchmark, request_for(benchmark_folder, earlier_ids=five))
    retained = benchmark.person_ids("retain_85")[0]
    with pytest.raises(InputError, match=f"forget_5: holds no person {retained}"):
        choose_people(benchmark, request_for(benchmark_folder, forget_ids=(retained,)))
    with pytest.raises(InputError, match="Full_Set: holds no person 9999"):
        choose_people(benchmark, request_for(benchmark_folder, earlier_ids=("9999",)))


def test_a_request_without_a_parent_is_a_plain_deployment(deployment_file, benchmark_folder):
    deployment, _ = read_deployment(deployment_file)
    assert deployment.parent is None and deployment.requests == ("R-1",)
    five = Benchmark.open(benchmark_folder).person_ids("forget_5")
    assert deployment.subjects == tuple(sorted(five[:2]))
    scores = deployment.scores
    assert scores.part == "held_out" and not any("earlier" in name for name in scores.deployed)
    assert scores.deployed["forget_rougeL"].value < scores.base["forget_rougeL"].value


def test_the_next_deployment_holds_both_requests(
    next_deployment_file, deployment_file, benchmark_folder
):
    parent, parent_sha256 = read_deployment(deployment_file)
    deployment, _ = read_deployment(next_deployment_file)
    assert deployment.parent is not None
    assert deployment.parent.sha256 == parent_sha256
    assert deployment.parent.subjects == parent.subjects
    assert deployment.parent.requests == ("R-1",) and deployment.requests == ("R-2",)
    assert len(deployment.subjects) == 1 and not set(deployment.subjects) & set(parent.subjects)
    assert deployment.base == parent.base  # the original one
    assert deployment.hyperparameters == parent.hyperparameters
    scores, before = deployment.scores, parent.scores
    # What the base knew of the earlier people, and what is left: their suppression is kept.
    for name in ("rougeL", "cloze", "memorisation"):
        assert scores.base[f"earlier_{name}"].value == before.base[f"forget_{name}"].value
        assert scores.base[f"earlier_{name}"].n == before.base[f"forget_{name}"].n
    limit = before.deployed["forget_rougeL"].high
    assert scores.deployed["earlier_rougeL"].value <= limit
    assert scores.deployed["forget_rougeL"].value < scores.base["forget_rougeL"].value


def test_the_parent_is_the_frozen_base_of_the_next(
    next_deployment_file, deployment_file, benchmark_folder
):
    parent = deployment_file.parent / "tiny-llava" / "adapter"
    shipped = read_adapter(next_deployment_file.parent / "tiny-llava" / "adapter")
    before = read_adapter(parent)
    assert shipped.rank == 2 * before.rank == 16
    merged, plain = load("tiny-llava", device="cpu"), load("tiny-llava", device="cpu")
    weights = {name: p.clone() for name, p in merged.model.named_parameters()}
    adapter.merge(merged, parent)
    assert merged.revision != plain.revision and len(merged.revision) == 64
    assert not any(p.requires_grad for p in merged.model.parameters())
    for module, (a_rI, b_Or) in before.modules.items():
        expected = weights[f"{module}.weight"] + before.scale * b_Or @ a_rI
        found = merged.model.get_submodule(module).weight
        torch.testing.assert_close(found.data, expected, atol=1e-6, rtol=1e-5)
        # The parent's part of what is shipped is the parent's, to the bit.
        a_sI, b_Os = shipped.modules[module]
        assert torch.equal(a_sI[:8], a_rI) and torch.equal(b_Os[:, :8], before.scale * b_Or)
    with adapter.attached(merged, read_deployment(deployment_file)[0].hyperparameters):
        pass
    again = dict(merged.model.named_parameters())
    assert again.keys() == weights.keys()


def test_bad_requests_leave_nothing_behind(deployment_file, benchmark_folder, tmp_path):
    def request(**values) -> UnlearnConfig:
        given = {"data": benchmark_folder, "output": tmp_path / "out", "retain_people": 4}
        return UnlearnConfig(**given | {"from_deployment": deployment_file} | values)

    with pytest.raises(InputError, match="everyone in it"):
        unlearn(request(forget_ids=read_deployment(deployment_file)[0].subjects))
    with pytest.raises(InputError, match="would be replaced"):
        unlearn(request(output=deployment_file.parent.parent))
    with pytest.raises(InputError, match=r"--min-forget: the trial has share forgotten -?0\.\d{3}"):
        nothing = ("method=ga", "epochs=1", "learning_rate=1e-9")
        ids = read_deployment(deployment_file)[0].subjects
        unlearn(request(from_deployment=None, forget_ids=ids, seeds=1, setting=nothing))
    with pytest.raises(InputError, match=r"is no NAME=VALUE"):
        unlearn(request(setting=("epochs",)))
    with pytest.raises(InputError, match="--setting: epochs: input should be"):
        unlearn(request(setting=("epochs=0",)))
    with pytest.raises(InputError, match="--backbone: the deployment is of tiny-llava"):
        unlearn(request(backbone="llava-1.5-7b"))
    copy = tmp_path / "copy"
    shutil.copytree(deployment_file.parent, copy)
    weights = copy / "tiny-llava" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InputError, match="is not the adapter of"):
        unlearn(request(from_deployment=copy / deployment_file.name))
    assert not (tmp_path / "out" / "deployments").exists()


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"rougeL": 0.12, "cloze": 0.28}, None),
        ({"rougeL": 0.14, "cloze": 0.70}, "before: rougeL 0.10 to 0.14, cloze 0.26 to 0.70."),
        ({"cloze": 0.1}, None),
    ],
)
def test_what_came_back_of_earlier_suppression_is_told(deployment_file, now, told):
    """The parent scores 10 questions of its own people and 30 of those before it."""
    deployment, _ = read_deployment(deployment_file)

    def scored(values: dict[str, tuple[float, int]]) -> dict[str, Score]:
        return {k: Score(value=v, n=n, low=0.0, high=1.0) for k, (v, n) in values.items()}

    before = scored(
        {
            "forget_rougeL": (0.1, 10),
            "earlier_rougeL": (0.1, 30),
            "forget_cloze": (0.5, 10),
            "earlier_cloze": (0.18, 30),
        }
    )
    scores = deployment.scores.model_copy(update={"deployed": before})
    parent = Shipped(deployment.model_copy(update={"scores": scores}), "0" * 64, Path())
    warning = parent.warning(scored({f"earlier_{name}": (v, 40) for name, v in now.items()}))
    assert (warning is None) if told is None else str(warning).endswith(told)


def test_the_command_takes_bad_input_as_one_sentence(benchmark_folder, tmp_path):
    command = [sys.executable, "-m", "vgid.cli", "unlearn", "--data", str(benchmark_folder)]
    command += ["--output", str(tmp_path / "out"), "--request-id", "../R", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "request_id" in done.stderr and done.stderr.count("\n") == 1
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
