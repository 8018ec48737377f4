"""Verification finds every changed byte, and measures again what was recorded."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.deployment.test_signing import make_keys
from tests.tiny_benchmark import write_tiny
from vgid.deployment.export import export
from vgid.deployment.record import Deployment, hash_files, read_deployment, write_deployment
from vgid.deployment.registry import load_deployed
from vgid.deployment.signing import sign
from vgid.deployment.verify import ScoreCheck, Verification, verify
from vgid.errors import InputError
from vgid.results import Score
from vgid.trial import DIFFERENCES

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def file(deployment_file: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    copy = tmp_path / "deployments"
    shutil.copytree(deployment_file.parent, copy)
    return copy / deployment_file.name


def adapter(file: Path) -> Path:
    return file.parent / "tiny-llava" / "adapter"


def reseal(file: Path, change: Callable[[Deployment], dict[str, Any]]) -> None:
    """Write the record anew with other values, as someone would who wants to deceive."""
    deployment, _ = read_deployment(file)
    write_deployment(file, deployment.model_copy(update=change(deployment)))


def failed(found: Verification) -> list[str]:
    return [check.name for check in found.checks if check.passed is False]


@pytest.fixture
def hashes(benchmark_folder: Path) -> Callable[..., Verification]:
    def check(target: Path, **options: Any) -> Verification:
        return verify(target, **{"data": benchmark_folder, "hashes_only": True, **options})

    return check


def test_an_export_of_a_next_deployment_is_verified_in_a_fresh_process(
    next_deployment_file, benchmark_folder, tmp_path
):
    """Base and adapter bit for bit, merged weights as well as they can be."""
    private, public = make_keys(tmp_path, "key")
    exported = export(next_deployment_file, tmp_path / "out").output
    sign(exported, private)
    options = ["--json", "--data", benchmark_folder, "--public-key", public]
    done = subprocess.run(
        [sys.executable, "-m", "vgid.cli", "verify", exported, *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verified"]
    assert {score["of"] for score in found["scores"]} >= {"base", "deployed", "deployed, merged"}
    assert all(s["stated"] == s["found"] for s in found["scores"] if not s["merged"])
    stated = [[(s["of"], s["name"]) for s in found["scores"] if s["merged"] is m] for m in (0, 1)]
    alone = [(of, name) for of, name in stated[0] if of != "base" and name not in DIFFERENCES]
    assert stated[1] == [(f"{of}, merged", name) for of, name in alone]
    names = ["signature", "exported files", "seal", "adapter files", "prompt frame", "adapter"]
    passed = {check["name"]: check["passed"] for check in found["checks"]}
    assert passed == dict.fromkeys([*names, "base", "data", "precision"], True)


def test_a_score_of_merged_weights_may_differ_by_one_answer():
    """Which an interval without a width would not allow."""
    stated = Score(value=0.0, n=20, low=0.0, high=0.0)

    def check(value: float, merged: bool) -> bool:
        found = stated.model_copy(update={"value": value})
        return ScoreCheck(of="x", name="x", stated=stated, found=found, merged=merged).within

    assert check(0.05, True) and not check(0.051, True) and not check(0.001, False)


def test_a_score_that_does_not_come_out_again_is_named(file, benchmark_folder):
    def better(deployment: Deployment) -> dict[str, Any]:
        scores = deployment.scores
        honest = scores.deployed["retain_rougeL"]
        claimed = honest.model_copy(update={"value": 1.5, "low": 1.4, "high": 1.6})
        deployed = scores.deployed | {"retain_rougeL": claimed}
        return {"scores": scores.model_copy(update={"deployed": deployed})}

    reseal(file, better)
    found = verify(file, benchmark_folder)
    assert not found.verified and found.bit_equal is False
    assert [(s.of, s.name) for s in found.scores if not s.within] == [("deployed", "retain_rougeL")]
    assert sum(not score.equal for score in found.scores) == 1
    assert "retain_rougeL (deployed)" in found.conclusion


def test_any_changed_byte_of_the_adapter_is_found(file, hashes):
    assert hashes(file).verified
    draw = random.Random(0)
    for path in sorted(adapter(file).iterdir()):
        content = path.read_bytes()
        for place in [0, len(content) - 1, *draw.sample(range(len(content)), 12)]:
            other = bytes([content[place] ^ draw.randrange(1, 256)])
            path.write_bytes(content[:place] + other + content[place + 1 :])
            found = hashes(file)
            assert failed(found) == ["adapter files"] and path.name in found.checks[1].detail
        path.write_bytes(content)
    assert hashes(file).verified


def test_added_missing_and_changed_files_are_named(file, hashes):
    folder = adapter(file)
    (folder / "adapter_model.bin").write_bytes(b"")
    assert "added: adapter_model.bin" in hashes(file).conclusion + hashes(file).checks[1].detail
    (folder / "adapter_model.bin").unlink()
    (folder / "below").mkdir()
    assert hashes(file).checks[1].detail == "added: below"
    (folder / "below").rmdir()
    (folder / WEIGHTS).unlink()
    assert hashes(file).checks[1].detail == f"missing: {WEIGHTS}"


def test_a_record_that_does_not_fit_its_adapter_is_found(file, hashes):
    reseal(file, lambda d: {"adapter": d.adapter.model_copy(update={"rank": 4})})
    assert failed(hashes(file)) == ["adapter"]


def test_a_vision_weight_in_the_adapter_is_found(file, hashes):
    path = adapter(file) / WEIGHTS
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tower = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_"
    tensors |= {f"{tower}A.weight": tensors[name].clone()}
    tensors |= {f"{tower}B.weight": tensors[name.replace("lora_A", "lora_B")].clone()}
    save_file(tensors, path)
    files = hash_files(adapter(file))
    reseal(file, lambda d: {"adapter": d.adapter.model_copy(update={"files": files})})
    found = hashes(file)
    assert failed(found) == ["adapter"]
    assert "outside the language model" in next(c.detail for c in found.checks if not c.passed)


def test_an_adapter_that_is_not_whole_is_found_and_neither_exported_nor_served(
    file, hashes, tmp_path
):
    path = adapter(file) / WEIGHTS
    tensors = load_file(path)
    save_file({n: x for n, x in tensors.items() if ".layers.0." not in n}, path)
    files = hash_files(adapter(file))
    reseal(file, lambda d: {"adapter": d.adapter.model_copy(update={"files": files})})
    found = hashes(file)
    assert failed(found) == ["adapter"]
    assert "has no weights (so 7 of 28)" in next(c.detail for c in found.checks if not c.passed)
    for take in (load_deployed, lambda file: export(file, tmp_path / "out")):
        with pytest.raises(InputError, match="has no weights"):
            take(file)
    assert not (tmp_path / "out").exists()


def test_another_base_or_benchmark_is_found(file, hashes, tmp_path):
    from vgid.models.backbones import EMBEDDED

    other = tmp_path / "base"
    shutil.copytree(EMBEDDED / "tiny-llava", other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert failed(hashes(file, model_path=str(other))) == ["base"]
    found = verify(file, write_tiny(tmp_path / "tiny"))  # nothing is measured on other data
    assert failed(found) == ["data"] and found.scores == () and not found.verified


def test_a_signature_is_checked_with_the_rest(file, hashes, tmp_path):
    private, public = make_keys(tmp_path, "ours")
    sign(file, private)
    assert hashes(file, public_key=public).verified
    reseal(file, lambda d: {"requests": ("R-9",)})
    assert failed(hashes(file, public_key=public)) == ["signature"]


def test_exit_codes_and_bad_input(file, benchmark_folder, tmp_path):
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vgid.cli", "verify", *arguments, "--hashes-only"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    (adapter(file) / "notes.txt").write_text("")
    done = run(file, "--data", benchmark_folder)
    assert done.returncode == 1 and "NOT verified; it differs in adapter files." in done.stdout
    file.write_bytes(file.read_bytes().replace(b"R-1", b"R-2"))
    done = run(file, "--data", benchmark_folder)
    assert done.returncode == 2 and "was changed since it was written" in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(InputError, match="cannot be read"):
        verify(tmp_path / "nothing.yaml", benchmark_folder)
