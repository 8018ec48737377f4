"""Loading a Qwen2.5-VL in the layout that the hub has it in, without torchvision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLProcessor

from tests.models.test_encoding import picture
from tests.random_qwen import IMAGE_TOKEN_PIXELS, make_random_qwen
from vgid.models.backbones import Backbone, load
from vgid.models.decoding import greedy_tokens
from vgid.models.encoding import Query, encode
from vgid.models.qwen_processor import ImageOnlyQwenProcessor, processor_class


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_random_qwen()


@pytest.fixture(scope="module")
def folder(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat ``config.json`` and ``preprocessor_config.json`` that names the stock class."""
    folder = tmp_path_factory.mktemp("hub")
    backbone.model.save_pretrained(folder)
    backbone.processor.tokenizer.save_pretrained(folder)
    ours: dict[str, Any] = json.loads((folder / "config.json").read_text())
    text = ours.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = ours["vision_config"] | {"model_type": "qwen2_5_vl"}
    vision.pop("rope_parameters", None)
    text.pop("layer_types", None)
    flat = text | ours | {"vision_config": vision}
    flat |= {"rope_scaling": scaling, "rope_theta": rope["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(flat))
    image = {"min_pixels": 4 * IMAGE_TOKEN_PIXELS, "max_pixels": 64 * IMAGE_TOKEN_PIXELS}
    image |= {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    image |= {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
    image |= {"image_std": [0.26862954, 0.26130258, 0.27577711]}
    image |= {"image_processor_type": "Qwen2VLImageProcessor"}
    image |= {"processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    assert not (folder / "processor_config.json").exists()
    return folder


def test_a_folder_in_the_hubs_layout_answers_as_the_model_that_was_saved(backbone, folder):
    loaded = load("qwen2.5-vl-3b", str(folder), device="cpu")
    assert isinstance(loaded.processor, Qwen2_5_VLProcessor)
    queries = [Query("image", "Who is it?", picture(0, (200, 150))), Query("text", "Who?", None)]
    expected, got = encode(backbone, queries), encode(loaded, queries)
    for a, b in zip(expected, got, strict=True):
        assert a.prompt_ids == b.prompt_ids and torch.equal(a.positions_AL, b.positions_AL)
        assert a.vision.keys() == b.vision.keys()
        assert all(torch.equal(value, b.vision[name]) for name, value in a.vision.items())
    assert greedy_tokens(loaded, got, 9) == greedy_tokens(backbone, expected, 9)


def test_a_saved_processor_is_loaded_as_it_was(backbone, tmp_path):
    backbone.processor.save_pretrained(tmp_path)
    again = processor_class("qwen2_5_vl").from_pretrained(tmp_path)
    text = backbone.spec.frame.image.format(text="Who is it?")
    inputs = [p(text=[text], images=[picture()]) for p in (backbone.processor, again)]
    assert inputs[0].keys() == inputs[1].keys()
    assert inputs[0]["input_ids"] == inputs[1]["input_ids"]


def test_the_stock_class_is_used_where_torchvision_is(monkeypatch):
    monkeypatch.setattr("vgid.models.qwen_processor.is_torchvision_available", lambda: True)
    assert processor_class("qwen2_5_vl") is AutoProcessor
    monkeypatch.setattr("vgid.models.qwen_processor.is_torchvision_available", lambda: False)
    assert processor_class("qwen2_5_vl") is ImageOnlyQwenProcessor
    assert processor_class("llava") is AutoProcessor
