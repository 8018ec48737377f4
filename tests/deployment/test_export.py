"""An export answers as the platform does, for programs that have never heard of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.deployment.test_signing import make_keys
from tests.hub_index import INDEX
from vgid.cli import app
from vgid.data.benchmark import Benchmark, decode_image
from vgid.deployment.export import (
    COMPARISON_ONLY,
    export,
    max_lora_rank,
    merge,
    serve_adapter,
)
from vgid.deployment.record import read_deployment, write_deployment
from vgid.deployment.signing import MANIFEST, manifest_fault, sign, write_manifest
from vgid.deployment.verify import verify
from vgid.errors import InputError
from vgid.models import adapters as adapter
from vgid.models.adapter_files import concatenate, copy_adapter, read_adapter
from vgid.models.backbones import EMBEDDED, load, skeleton
from vgid.models.decoding import greedy_decode
from vgid.models.encoding import Query
from vgid.models.weight_names import WeightNames
from vgid.prompts import generation_text, question_text

BASE = EMBEDDED / "tiny-llava"


@pytest.fixture(scope="module")
def exported(next_deployment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(next_deployment_file, tmp_path_factory.mktemp("export") / "out").output


@pytest.fixture(scope="module")
def questions(
    benchmark_folder: Path, next_deployment_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, str]]:
    """User texts and image files, of a person of each request and of a retained one."""
    benchmark, folder = Benchmark.open(benchmark_folder), tmp_path_factory.mktemp("images")
    deployment, _ = read_deployment(next_deployment_file)
    assert deployment.parent is not None
    suppressed = (deployment.subjects[0], deployment.parent.subjects[0])
    found = []
    forgotten = [person for person in benchmark.forget(5) if person.id in suppressed]
    for person in (*forgotten, benchmark.retain(5)[0]):
        path = folder / f"{person.id}.png"
        path.write_bytes(person.images[0])
        asked = [q for q in person.questions if q.form == "image" and q.task != "classification"]
        for q in (asked[0], asked[-1]):
            found.append((question_text(q.task, q.form, q.text, q.options), str(path)))
    return found


def platform_answers(questions: list[tuple[str, str]], folder: Path | None) -> list[str]:
    backbone = load("tiny-llava", device="cpu")
    queries = [
        Query(str(i), text, decode_image(Path(path).read_bytes()))
        for i, (text, path) in enumerate(questions)
    ]
    if folder is None:
        return greedy_decode(backbone, queries)
    with adapter.loaded(backbone, folder):
        return greedy_decode(backbone, queries)


def test_plain_transformers_and_peft_give_the_same_answers(
    exported, next_deployment_file, questions, tmp_path
):
    script = shutil.copy(Path(__file__).with_name("plain_answers.py"), tmp_path)
    order = {
        "questions": questions,
        "template": str(exported / "chat_template.jinja"),
        "models": [[str(BASE), str(exported / "adapter")], [str(exported / "merged"), None]],
    }
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    deployed = next_deployment_file.parent / "tiny-llava" / "adapter"
    ours = platform_answers(questions, deployed)
    assert ours != platform_answers(questions, None)
    with_adapter, merged = json.loads(done.stdout)
    assert with_adapter == ours
    assert merged == ours


def test_what_an_export_holds(exported, next_deployment_file):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "adapter",
        "chat_template.jinja",
        "deployment.yaml",
        "merged",
    ]
    assert (exported / "deployment.yaml").read_bytes() == next_deployment_file.read_bytes()
    deployed = next_deployment_file.parent / "tiny-llava" / "adapter"
    for path in deployed.iterdir():
        assert (exported / "adapter" / path.name).read_bytes() == path.read_bytes()
    merged, base = (load_file(f / "model.safetensors") for f in (exported / "merged", BASE))
    names = WeightNames(skeleton(BASE))
    changed = {name for name in base if not torch.equal(base[name], merged[names.on_hub(name)])}
    assert merged.keys() == INDEX["tiny-llava"] and len(changed) == 28
    assert all("language_model" in name and "_proj" in name for name in changed)
    for path in exported.rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o644
        assert path.suffix not in (".bin", ".pt", ".pkl", ".py")


def test_the_card_says_what_was_measured_and_never_that_it_is_gone(exported, next_deployment_file):
    card = (exported / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    meta = yaml.safe_load(front)
    assert meta["base_model"] == "tiny-llava" and meta["library_name"] == "peft"
    assert {"lora", "machine-unlearning"} <= set(meta["tags"]) and "rouge" in meta["metrics"]
    deployment, _ = read_deployment(next_deployment_file)
    stated = {
        metric["name"]: metric["value"]
        for result in meta["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    for name in ("forget_rougeL", "earlier_rougeL", "retain_rougeL"):
        score = deployment.scores.deployed[name]
        assert stated[name] == pytest.approx(score.value, abs=1e-4)
        row = f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
        assert any(name in line and row in line for line in body.splitlines())
    assert deployment.scores.verdict("forget", "test") in body
    assert deployment.scores.verdict("earlier") in body
    assert "erased" not in card.lower() and "deleted" not in card.lower()
    for attack in (*(a.name for a in deployment.scores.attacks), *deployment.scores.not_run):
        assert attack in body
    for subject in (*deployment.subjects, *deployment.parent.subjects):
        assert subject not in body


def test_vllm_commands(exported, next_deployment_file):
    card = (exported / "README.md").read_text()
    merged, adapter = card.index("vllm serve ./merged"), card.index("vllm serve BASE")
    assert merged < card.index(COMPARISON_ONLY) < adapter
    for flags in (
        "--chat-template-content-format openai",
        "--generation-config vllm",
        """--override-generation-config '{"temperature": 0, "max_new_tokens": 50}'""",
        """--limit-mm-per-prompt '{"image": 1}'""",
        "--host 127.0.0.1",
    ):
        assert card.count(f"  {flags}") == 2
    assert generation_text("QUESTION", "image") in card
    assert "--enable-lora \\\n  --lora-modules tiny-llava-0000=./adapter" in card
    assert "--max-lora-rank 16" in card  # 8 and 8 concatenated
    known = {1: 1, 8: 8, 9: 16, 16: 16, 24: 32, 128: 128, 257: 320, 321: 512, 512: 512, 513: None}
    assert {rank: max_lora_rank(rank) for rank in known} == known
    deployment, _ = read_deployment(next_deployment_file)
    hub = deployment.base.model_copy(update={"hub_id": "org/model", "revision": "a" * 40})
    adapter = deployment.adapter.model_copy(update={"rank": 24})
    command = serve_adapter(deployment.model_copy(update={"base": hub, "adapter": adapter}))
    assert command is not None
    assert f"vllm serve org/model \\\n  --dtype float32 \\\n  --revision {'a' * 40}" in command
    assert "--max-lora-rank 32" in command
    adapter = adapter.model_copy(update={"rank": 1000})
    assert serve_adapter(deployment.model_copy(update={"adapter": adapter})) is None


def test_the_command_prints_what_to_deploy_first(next_deployment_file, tmp_path):
    shown = CliRunner().invoke(app, ["export", str(next_deployment_file), str(tmp_path / "a")])
    assert shown.exit_code == 0
    merged, adapter = (shown.output.index(f"vllm serve {m}") for m in ("./merged", "BASE"))
    assert merged < shown.output.index(COMPARISON_ONLY) < adapter
    plain = CliRunner().invoke(
        app, ["export", str(next_deployment_file), str(tmp_path / "b"), "--json"]
    )
    told = json.loads(plain.output)
    assert "serve ./merged" in told["serve"] and "--enable-lora" in told["compare"]
    deployment, _ = read_deployment(tmp_path / "b" / "deployment.yaml")
    assert deployment.served_as == "merged"
    assert "served_as: merged" in (tmp_path / "b" / "deployment.yaml").read_text()


def test_a_signed_export_is_verified_as_a_folder(exported, benchmark_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    private, public = make_keys(tmp_path, "ours")
    sign(folder, private)
    options: dict[str, Any] = {"data": benchmark_folder, "public_key": public, "hashes_only": True}
    assert verify(folder, **options).verified
    with (folder / "merged" / "model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\1")
    found = verify(folder, **options)
    assert [c.name for c in found.checks if not c.passed] == ["signature", "exported files"]
    assert "merged/model.safetensors" in found.checks[0].detail
    assert found.checks[1].detail == "changed: merged/model.safetensors"


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """An export to be damaged."""
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    return folder


def test_every_file_of_an_export_is_in_its_manifest(copy, tmp_path):
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", MANIFEST],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    lines = (copy / MANIFEST).read_text().splitlines()
    assert {line[66:] for line in lines} == files - {MANIFEST}
    assert manifest_fault(copy) is None
    for path in sorted(copy.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert manifest_fault(copy) == f"changed: {path.relative_to(copy).as_posix()}"
            path.write_bytes(content)
    (copy / "merged" / "modeling.py").write_text("")
    (copy / "merged" / "model.sig").write_text("")  # a signature's name, but not its place
    (copy / ".hidden").write_text("")
    (copy / "link").symlink_to(tmp_path)
    (copy / "README.md").rename(copy / "OTHER.md")
    (copy / "chat_template.jinja").rename(tmp_path / "same.jinja")
    (copy / "chat_template.jinja").symlink_to(tmp_path / "same.jinja")
    assert manifest_fault(copy) == (
        "missing: README.md; "
        "added: .hidden, OTHER.md, link, merged/model.sig, merged/modeling.py; "
        "changed: chat_template.jinja"
    )
    for content in ("", "x\n", f"{'0' * 64} README.md\n"):
        (copy / MANIFEST).write_text(content)
        assert manifest_fault(copy) == "SHA256SUMS is damaged; export again"
    (copy / MANIFEST).unlink()
    assert manifest_fault(copy) == "SHA256SUMS is missing or cannot be read; export again"


def test_merged_weights_that_were_tampered_with_are_not_verified(copy, benchmark_folder):
    """Zeroed bytes and a foreign program; then the un-forgotten base with a manifest that fits."""
    weights = copy / "merged" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
    (copy / "merged" / "modeling_x.py").write_text("")
    found = verify(copy, benchmark_folder)
    assert found.conclusion.endswith("NOT verified; it differs in exported files.")
    assert found.scores == (), "nothing of it is loaded"
    by_its_file = verify(copy / "deployment.yaml", benchmark_folder, hashes_only=True)
    assert by_its_file.conclusion.endswith("NOT verified; it differs in exported files.")
    (copy / "merged" / "modeling_x.py").unlink()
    shutil.copy(BASE / "model.safetensors", weights)
    (copy / MANIFEST).unlink()
    write_manifest(copy)
    found = verify(copy, benchmark_folder)
    assert not found.verified and all(check.passed for check in found.checks)
    wrong = {(score.of, score.name) for score in found.scores if not score.within}
    assert ("deployed, merged", "forget_rougeL") in wrong
    assert {of for of, _ in wrong if not of.endswith(", merged")} == set()


def test_bad_input_leaves_nothing_behind(next_deployment_file, exported, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        export(next_deployment_file, exported)
    shutil.copytree(next_deployment_file.parent, tmp_path / "deployments")
    file = tmp_path / "deployments" / next_deployment_file.name
    weights = tmp_path / "deployments" / "tiny-llava" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="is not the adapter of"):
        export(file, tmp_path / "out")
    weights.write_bytes(content)
    deployment, _ = read_deployment(file)
    other = deployment.base.model_copy(update={"revision": "0" * 64})
    write_deployment(file, deployment.model_copy(update={"base": other}))
    with pytest.raises(InputError, match="name that base with --model-path"):
        export(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deployments"]


def adapter_of(folder: Path, rank: int, seed: int) -> Path:
    """A random adapter of the embedded base, made by peft alone."""
    from peft import LoraConfig, get_peft_model

    backbone = load("tiny-llava", device="cpu")
    targets = backbone.spec.lora_targets
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets)
    model = get_peft_model(backbone.model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "saved")
    (folder / "saved" / "README.md").unlink()
    copy_adapter(folder / "saved", folder / "adapter", None, "r")
    return folder / "adapter"


def test_merged_and_concatenated_weights_are_those_of_peft(tmp_path):
    from peft import PeftModel

    first = adapter_of(tmp_path / "a", 4, 1)
    second = adapter_of(tmp_path / "b", 2, 2)
    concatenate(first, second, tmp_path / "both")
    both = read_adapter(tmp_path / "both")
    assert both.rank == 6 and both.scale == 1.0
    model = load("tiny-llava", device="cpu").model
    for folder in (first, second):
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    expected = {n: p for n, p in model.named_parameters() if "_proj.weight" in n}
    # Shards and the names of older releases, as on the hub.
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, members in shards.items():
        save_file({n: tensors[n].contiguous() for n in members}, base / shard, {"format": "pt"})
    places = {n: shard for shard, members in shards.items() for n in members}
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, base / "consolidated.safetensors")
    merge(base, both, tmp_path / "merged")
    assert not (tmp_path / "merged" / "consolidated.safetensors").exists()
    from transformers import AutoModelForImageTextToText

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    found = dict(merged.named_parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].data, weight.data, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_not_plain_lora_is_refused(next_deployment_file, tmp_path):
    source = next_deployment_file.parent / "tiny-llava" / "adapter"

    def damaged(**values: Any) -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | values
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    for key, value in (("use_dora", True), ("bias", "all"), ("peft_type", "IA3")):
        with pytest.raises(InputError, match=f"{key} is set; only plain LoRA"):
            read_adapter(damaged(**{key: value}))
    with pytest.raises(InputError, match="no A and B of rank 3"):
        _ = read_adapter(damaged(r=3)).modules
    folder = damaged()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_model\.bin is no part of an adapter"):
        read_adapter(folder)
    with pytest.raises(InputError, match="cannot be read"):
        read_adapter(tmp_path / "nothing")
