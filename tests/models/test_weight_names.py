"""Weights are shipped and merged under the names that the hub's files have, which servers know."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.benchmarks.architectures import random_backbone
from tests.hub_index import INDEX
from vgid.bases.tiny_llava import save, untrained
from vgid.deployment.export import INDEX as INDEX_FILE
from vgid.deployment.export import merge
from vgid.errors import InputError
from vgid.models.adapter_files import LoraWeights
from vgid.models.backbones import EMBEDDED as EMBEDDED_FOLDER
from vgid.models.backbones import load
from vgid.models.weight_names import WeightNames

REAL = ("llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-3b")
COUNTS = {"llava-1.5-7b": 686, "llava-1.5-13b": 758, "qwen2.5-vl-3b": 824}
EMBEDDED = ("tiny-llava", "tiny-qwen2.5-vl")


def other_releases(name: str) -> dict[str, str]:
    """Of a name in the hub's files, what other releases of transformers call the same weight."""
    later = name.replace("vision_tower.vision_model.", "vision_tower.")
    inner = later.replace("language_model.lm_head", "lm_head")
    inner = inner.replace("language_model.model.", "language_model.")
    if inner.startswith(("vision_tower", "multi_modal", "language_model", "visual")):
        inner = f"model.{inner}"
    elif inner.startswith("model."):
        inner = inner.replace("model.", "model.language_model.", 1)
    return {"5, by itself": later, "4.52 to 4.57": inner}


@pytest.mark.parametrize("name", REAL)
def test_names_of_a_real_backbone_are_those_of_the_hubs_index(name: str) -> None:
    model = random_backbone(name, device="meta").model
    names, hub = WeightNames(model), INDEX[name]
    assert len(hub) == COUNTS[name]
    tied = {"lm_head.weight"} if name.startswith("qwen") else set()
    assert {names.on_hub(inner) for inner in model.state_dict()} == hub | tied
    for written in hub:
        assert names.on_hub(written) == written
        for release, other in other_releases(written).items():
            assert names.on_hub(other) == written, release
            assert names.in_model(other) == names.in_model(written), release
    assert names.on_hub("of.no.weight") == "of.no.weight"


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_shipped_weights_have_the_hubs_names(name: str) -> None:
    assert load_file(EMBEDDED_FOLDER / name / "model.safetensors").keys() == INDEX[name]


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_backbone_is_saved_under_the_hubs_names(name: str, tmp_path: Path) -> None:
    backbone = load(name, device="cpu")
    before = {key: weight.clone() for key, weight in backbone.model.state_dict().items()}
    save(name, backbone.model, backbone.processor.tokenizer, tmp_path / "read")
    fresh = untrained(name, backbone.processor.tokenizer, seed=0)
    save(name, fresh, backbone.processor.tokenizer, tmp_path / "new")
    for folder in (tmp_path / "read", tmp_path / "new"):
        assert load_file(folder / "model.safetensors").keys() == INDEX[name]
    again = load(name, str(tmp_path / "read"), "cpu").model.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)


def an_adapter(folder: Path, model: Any, module: str) -> LoraWeights:
    """Adds 64 to every number of one module."""
    outputs, inputs = model.get_submodule(module).weight.shape
    tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.ones(1, inputs),
        f"base_model.model.{module}.lora_B.weight": torch.full((outputs, 1), 64.0),
    }
    return LoraWeights(folder, {"r": 1, "lora_alpha": 1, "target_modules": ["x"]}, tensors)


def shard(folder: Path, names: dict[str, str]) -> None:
    """Divide the weights over two files with an index, as ``names`` has it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    index = {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        part = {names[key]: tensors[key] for key in keys[number::2]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("name", EMBEDDED)
def test_merged_weights_have_the_hubs_names_whichever_the_base_has(name, tmp_path: Path) -> None:
    backbone = load(name, device="cpu")
    saved = tmp_path / "saved"
    save(name, backbone.model, backbone.processor.tokenizer, saved)
    changed = "model.language_model.layers.1.mlp.down_proj"
    adapter = an_adapter(tmp_path, backbone.model, changed)
    merged = []
    for release in (None, *other_releases("x")):
        base, output = tmp_path / f"base {release}", tmp_path / f"merged {release}"
        shutil.copytree(saved, base)
        shard(base, {key: ({None: key} | other_releases(key))[release] for key in INDEX[name]})
        merge(base, adapter, output)
        index = json.loads((output / INDEX_FILE).read_text())["weight_map"]
        tensors: dict[str, Any] = {}
        for file in sorted(set(index.values())):
            found = load_file(output / file)
            assert {index[key] for key in found} == {file}
            tensors |= found
        assert index.keys() == tensors.keys() == INDEX[name], release
        merged.append(tensors)
    assert all(torch.equal(other[key], merged[0][key]) for other in merged for key in other)
    hub = tmp_path / "base None"
    before = load(name, str(hub), "cpu").model.state_dict()
    after = load(name, str(tmp_path / "merged None"), "cpu").model.state_dict()
    different = [key for key in before if not torch.equal(before[key], after[key])]
    assert different == [f"{changed}.weight"]
    torch.testing.assert_close(after[different[0]], before[different[0]] + 64)
    adapter = LoraWeights(
        tmp_path,
        adapter.config,
        {key.replace("layers.1.", "layers.99."): t for key, t in adapter.tensors.items()},
    )
    with pytest.raises(InputError, match=r"layers\.99\.mlp\.down_proj of the adapter is not in"):
        merge(hub, adapter, tmp_path / "refused")
