import re

import pytest
import torch

from tests.conftest import make_random_backbone
from vgid.bases.tiny_llava import save
from vgid.errors import InputError
from vgid.models.backbones import BACKBONES, load, locate, revision_of, spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    backbone = make_random_backbone()
    save(backbone.spec.name, backbone.model, backbone.processor.tokenizer, folder)
    return folder


def skeleton(name: str):
    """The backbone's architecture without weights, two layers deep."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    with torch.device("meta"):
        if "qwen" in name:
            text = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
            text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 200}
            config = Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 2})
            return Qwen2_5_VLForConditionalGeneration(config)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(num_hidden_layers=2),
            text_config=LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2),
        )
        return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("name", BACKBONES)
def test_lora_targets_are_all_linears_of_the_language_model_and_nothing_else(name):
    model = skeleton(name)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hit = {n for n in linears if re.fullmatch(spec(name).lora_targets, n)}
    assert len(hit) == 2 * 7
    assert all(".language_model.layers." in n for n in hit)
    assert not any("vision" in n or "visual" in n or "projector" in n for n in hit)
    assert any("q_proj" in n or "qkv" in n for n in linears - hit), "the vision tower has some too"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="tiny-llava"):
        spec("gpt-9")


@pytest.mark.parametrize("name", [n for n in BACKBONES if not BACKBONES[n].embedded])
def test_unreachable_weights_are_one_sentence_with_the_option(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as caught:
        locate(spec(name), None)
    assert "--model-path" in str(caught.value)
    assert str(BACKBONES[name].hub_id) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_revisions_are_pinned_commits():
    for row in BACKBONES.values():
        assert row.embedded or re.fullmatch("[0-9a-f]{40}", str(row.revision))


def test_pickled_weights_are_never_read(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "processor_config.json").write_bytes(
        (folder / "processor_config.json").read_bytes()
    )
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load("tiny-llava", str(tmp_path))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load("tiny-llava", str(tmp_path))


def test_loaded_base_is_frozen_and_fp32_on_the_cpu(folder):
    backbone = load("tiny-llava", str(folder), device="cpu")
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert backbone.processor.tokenizer.eos_token == "</s>"


def test_revision_follows_every_byte(folder):
    before = revision_of(folder)
    assert before == revision_of(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert revision_of(folder) != before
