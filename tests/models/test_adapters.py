"""A saved adapter is taken whole or not at all, and a base is left as it was found."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.conftest import make_random_backbone
from vgid.bases.finetune import FinetuneConfig, trainable
from vgid.bases.tiny_llava import save
from vgid.config import TrialConfig
from vgid.errors import InputError
from vgid.models import adapters as adapter
from vgid.models.adapter_files import CONFIG, WEIGHTS, read_adapter, rescaled
from vgid.models.backbones import Backbone, load, skeleton
from vgid.models.decoding import score_responses
from vgid.models.encoding import Query, encode

LAYER = "base_model.model.model.language_model.layers."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, random_backbone) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "whole"
    with adapter.attached(random_backbone, TrialConfig(lora_rank=2)) as student:
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        adapter.save(student, folder)
    return folder


def without_layer_0(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if not name.startswith(f"{LAYER}0.")}


def layer_0_called_9(tensors: Tensors) -> Tensors:
    return {name.replace(f"{LAYER}0.", f"{LAYER}9."): x for name, x in tensors.items()}


def one_more_layer(tensors: Tensors) -> Tensors:
    return {**tensors, **{n: x.clone() for n, x in layer_0_called_9(tensors).items()}}


def without_one_map(tensors: Tensors) -> Tensors:
    return {n: x for n, x in tensors.items() if not n.startswith(f"{LAYER}2.mlp.up_proj.")}


def another_width(tensors: Tensors) -> Tensors:
    name = f"{LAYER}1.self_attn.q_proj.lora_A.weight"
    return {**tensors, name: torch.cat([tensors[name]] * 2, dim=1)}


FAULTS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (without_layer_0, r"layers\.0\.\S+ has no weights \(so 7 of 28\)"),
    (layer_0_called_9, r"layers\.0\.\S+ has no weights \(so 7 of 28\)"),
    (one_more_layer, r"layers\.9\.\S+ is no target module of the base \(so 7 of 28\)"),
    (without_one_map, r"layers\.2\.mlp\.up_proj has no weights \(so 1 of 28\)"),
    (another_width, r"layers\.1\.self_attn\.q_proj has another shape than in the base"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS)
def test_an_adapter_that_is_not_whole_is_refused_and_the_base_is_as_before(
    random_backbone, whole, tmp_path, damage, message
):
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    save_file(damage(load_file(whole / WEIGHTS)), folder / WEIGHTS)
    modules = [name for name, _ in random_backbone.model.named_modules()]
    revision = random_backbone.revision
    for take in (adapter.merge, adapter.load_saved):
        with pytest.raises(InputError, match=message):
            take(random_backbone, folder)
    with pytest.raises(InputError, match=message), adapter.loaded(random_backbone, folder):
        pass
    assert [name for name, _ in random_backbone.model.named_modules()] == modules
    assert random_backbone.revision == revision


def test_settings_that_leave_modules_out_or_change_the_base_are_refused(whole, tmp_path):
    others = {
        "layers_to_transform": [1],
        "exclude_modules": ["q_proj"],
        "layer_replication": [[0, 2], [1, 3]],
        "lora_bias": True,
        "init_lora_weights": "pissa",
        "target_parameters": ["weight"],
        "a_setting_of_a_later_release": {"x": 1},
    }
    for key, value in others.items():
        folder = tmp_path / key
        shutil.copytree(whole, folder)
        config = json.loads((folder / CONFIG).read_text()) | {key: value}
        (folder / CONFIG).write_text(json.dumps(config))
        with pytest.raises(InputError, match=f"{key} is set; only plain LoRA"):
            read_adapter(folder)
    for key, value in (("r", "8"), ("r", 0), ("target_modules", None), ("target_modules", [1])):
        config = json.loads((whole / CONFIG).read_text()) | {key: value}
        (folder / CONFIG).write_text(json.dumps(config))
        with pytest.raises(InputError, match="is no LoRA configuration"):
            read_adapter(folder)


def test_what_is_whole_is_taken_and_its_own_pattern_is_what_counts(
    random_backbone, whole, tmp_path
):
    """An adapter of fewer maps than ours is whole, if it has all that it says it has."""
    read_adapter(whole).check(random_backbone.model, random_backbone.spec.lora_targets)
    folder = tmp_path / "narrow"
    shutil.copytree(whole, folder)
    tensors = load_file(whole / WEIGHTS)
    save_file({n: x for n, x in tensors.items() if ".q_proj." in n}, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(
        json.dumps(config | {"target_modules": r".*language_model.*\.q_proj"})
    )
    with adapter.loaded(random_backbone, folder) as student:
        found = {n for n, _ in student.named_parameters() if "lora_" in n}
    assert found == {n.replace(".weight", ".default.weight") for n in tensors if ".q_proj." in n}
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": "*("}))
    with pytest.raises(InputError, match="target_modules is no regular expression"):
        adapter.load_saved(random_backbone, folder)


def test_a_base_whose_weights_are_not_all_there_is_refused(tmp_path):
    backbone = make_random_backbone()
    folder = tmp_path / "base"
    save(backbone.spec.name, backbone.model, backbone.processor.tokenizer, folder)
    shapes = {n: m.weight.shape for n, m in backbone.model.named_modules() if n.endswith("_proj")}
    model = skeleton(folder)
    assert {n: m.weight.shape for n, m in model.named_modules() if n.endswith("_proj")} == shapes
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.0.self_attn.q_proj" in name)
    for damaged in (
        {n: x for n, x in tensors.items() if n != name},
        {**tensors, name: torch.zeros(3, 3)},
    ):
        save_file(damaged, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"1 weights of the model are missing .*q_proj"):
            load("tiny-llava", str(folder))
    torn = (folder / "model.safetensors").read_bytes()[:-100]
    (folder / "model.safetensors").write_bytes(torn)
    with pytest.raises(InputError, match="file is damaged; restore it"):
        load("tiny-llava", str(folder))


def hooks(backbone: Backbone) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in backbone.model.modules()
    )


def test_gradient_checkpointing_leaves_no_hook_on_the_base():
    """Of trials, and of ``vgid finetune`` with and without an adapter."""
    backbone = make_random_backbone()
    before = hooks(backbone)
    trial = TrialConfig(lora_rank=2, gradient_checkpointing=True)
    own = [
        FinetuneConfig(
            backbone="x",
            data=Path("x"),
            output=Path("x"),
            gradient_checkpointing=True,
            full=full,
        )
        for full in (False, True)
    ]
    runs = [adapter.attached(backbone, trial), *(trainable(backbone, config) for config in own)]
    for run in [*runs, adapter.attached(backbone, trial)]:
        with run:
            assert hooks(backbone) > before
            embeddings = backbone.model.get_input_embeddings()
            assert embeddings(torch.tensor([[1]])).requires_grad, "LoRA would not be trained"
        assert hooks(backbone) == before
        assert not backbone.model.is_gradient_checkpointing


@pytest.fixture
def prompts(random_backbone) -> list[Any]:
    return encode(random_backbone, [Query(str(n), f"Where does {n} live?", None) for n in range(3)])


def rated(backbone: Backbone, prompts: list[Any]) -> torch.Tensor:
    scores = score_responses(backbone, prompts, [[5, 6, 7]] * len(prompts))
    return torch.stack([score.logprobs_R for score in scores])


@pytest.mark.parametrize("scale", [0.7, 1.3])
def test_a_scaled_adapter_is_the_base_plus_so_much_of_its_product_however_it_is_made(
    random_backbone, whole, prompts, tmp_path, scale
):
    weights = read_adapter(whole)
    base = {n: p.detach().clone() for n, p in random_backbone.model.named_parameters()}
    # By hand: W + scale * s * B A, in place of what peft does.
    with torch.no_grad():
        for module, (a_rI, b_Or) in weights.modules.items():
            own = random_backbone.model.get_submodule(module).weight
            own += (scale * weights.scale * b_Or @ a_rI).to(own.dtype)
        by_hand = rated(random_backbone, prompts)
        for name, parameter in random_backbone.model.named_parameters():
            parameter.copy_(base[name])
    with adapter.loaded(random_backbone, whole) as student:
        as_trained = rated(random_backbone, prompts)
        with adapter.scaled(student, scale):
            inside = rated(random_backbone, prompts)
            adapter.save(student, tmp_path / "saved")
        assert torch.equal(rated(random_backbone, prompts), as_trained)
    rescaled(whole, tmp_path / "rescaled", scale)
    torch.testing.assert_close(inside, by_hand, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(as_trained, by_hand, atol=1e-3)
    for made in ("saved", "rescaled"):
        # Plain peft, which knows nothing of scales, gives the same bits.
        student = PeftModel.from_pretrained(random_backbone.model, tmp_path / made).eval()
        assert torch.equal(rated(random_backbone, prompts), inside)
        student.unload()
        vars(random_backbone.model).pop("peft_config", None)
    assert (tmp_path / "rescaled" / WEIGHTS).samefile(whole / WEIGHTS)  # takes no room


def test_at_its_own_scale_an_adapter_is_saved_as_ever(random_backbone, whole, tmp_path):
    with adapter.loaded(random_backbone, whole) as student, adapter.scaled(student, 1.0):
        adapter.save(student, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert settings["lora_alpha"] == 4 and isinstance(settings["lora_alpha"], int)


def test_an_adapter_is_rescaled_without_torch(whole, tmp_path):
    """A study's driver does it, which torch would keep from starting for two seconds."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vgid.models.adapter_files import rescaled\n"
        f"rescaled(Path({str(whole)!r}), Path({str(tmp_path / 'scaled')!r}), 0.5)\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert read_adapter(tmp_path / "scaled").scale == read_adapter(whole).scale / 2
