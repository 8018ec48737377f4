"""The parts of ``tiny-qwen2.5-vl``: window attention, dynamic resolution, M-RoPE, Qwen's frame.

Untrained, saved and loaded as a backbone is.
"""

import json

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from tests.padded import collate
from vgid.bases import tiny_qwen as embedded_qwen
from vgid.bases.pretraining import PackEncoder, _pack_loss
from vgid.bases.recipe import Pack, Recipe
from vgid.bases.tiny_llava import save, untrained
from vgid.data.fictitious import make_world, portrait
from vgid.models import backbones
from vgid.models.encoding import Query, encode, response_ids
from vgid.prompts import with_instruction


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny-qwen")
    tokenizer = embedded_qwen.build_tokenizer(embedded_qwen.corpus())
    model = untrained("tiny-qwen2.5-vl", tokenizer, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "visual" not in name:
                parameter.mul_(5.0)  # large enough for attention to depend on positions
    save("tiny-qwen2.5-vl", model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def backbone(folder):
    return backbones.load("qwen2.5-vl-3b", str(folder), device="cpu")


@pytest.fixture(scope="module")
def encoder(backbone):
    return PackEncoder(embedded_qwen, backbone)


def faces(count):
    return [portrait(0, person) for person in make_world(0).people[:count]]


def test_loads_as_a_real_qwen(backbone):
    model, tokenizer = backbone.model, backbone.processor.tokenizer
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert isinstance(backbone.processor, Qwen2_5_VLProcessor)
    assert model.dtype == torch.float32
    text, vision = model.config.text_config, model.config.vision_config
    assert len(tokenizer) == text.vocab_size
    assert text.max_position_embeddings >= 512
    assert text.num_key_value_heads < text.num_attention_heads
    sections = text.rope_parameters["mrope_section"]
    assert len(sections) == 3
    assert sum(sections) == text.hidden_size // text.num_attention_heads // 2
    windowed = set(range(vision.depth)) - set(vision.fullatt_block_indexes)
    assert windowed and vision.fullatt_block_indexes
    assert vision.window_size < 64, "a portrait has several windows"


def test_special_tokens_are_qwens_and_nothing_comes_in_front(backbone):
    tokenizer = backbone.processor.tokenizer
    frame = backbone.spec.frame.image.format(text="Who?")
    ids = tokenizer(frame).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    specials = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|image_pad|>"]
    specials += ["<|vision_end|>", "<|im_end|>", "<|im_start|>"]
    assert [piece for piece in pieces if piece.startswith("<|")] == specials
    assert tokenizer.decode(ids) == frame
    assert tokenizer("").input_ids == []
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in backbone.model.generation_config.eos_token_id
    assert tokenizer.pad_token == "<|endoftext|>"


def test_files_are_small_and_name_the_stock_processor_with_all_that_it_asks_for(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    for name in ("processor_config.json", "tokenizer_config.json"):
        assert json.loads((folder / name).read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    config = json.loads((folder / "processor_config.json").read_text())
    video, image = config["video_processor"], config["image_processor"]
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        assert video[name] == image[name]


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"),
    [(64, 64, 4, 4), (96, 48, 3, 6), (48, 96, 6, 3), (16, 16, 2, 2), (400, 400, 8, 8)],
)
def test_resolution_is_dynamic(backbone, width, height, rows, columns):
    image = Image.new("RGB", (width, height), (200, 40, 10))
    (encoded,) = encode(backbone, [Query("q", "Who is this?", image)])
    image_L = torch.tensor(encoded.prompt_ids) == backbone.model.config.image_token_id
    assert image_L.sum() == rows * columns
    time, row, column = encoded.positions_AL[:, image_L] - encoded.positions_AL[:, image_L][:, :1]
    assert time.tolist() == [0] * (rows * columns)
    assert row.tolist() == [r for r in range(rows) for _ in range(columns)]
    assert column.tolist() == list(range(columns)) * rows
    features = backbone.vision.features(encoded.pictures[0])
    assert features.shape == (rows * columns, backbone.model.config.text_config.hidden_size)


def test_the_trainers_features_are_what_the_model_makes_of_an_image(backbone):
    pictures = faces(3)
    with torch.no_grad():
        pixels = embedded_qwen.pixel_values(backbone.processor, pictures)
        features = embedded_qwen.tower_features(backbone.model, pixels)
        merged_NTD = backbone.model.get_submodule(embedded_qwen.PROJECTOR)(features).view(3, 16, -1)
    for picture, merged_TD in zip(pictures, merged_NTD, strict=True):
        expected_TD = backbone.vision.features(backbone.vision.picture(picture))
        assert torch.allclose(merged_TD, expected_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("picture", [0, None])
def test_positions_in_a_pack_are_those_of_the_whole_prompts(backbone, encoder, picture):
    texts = ("Who is this?\nAnswer:", "Which hobby does this person have?\nAnswer:")
    pack = Pack(picture, "polite", tuple((text, "It is so.") for text in texts))
    batch = encoder.collate([pack])
    for text, path, response in zip(texts, batch.paths, batch.responses, strict=True):
        image = None if picture is None else faces(1)[0]
        (encoded,) = encode(backbone, [Query("q", with_instruction(text, "polite"), image)])
        prompt, answer = path[: -len(response)], path[-len(response) :]
        assert batch.ids_BL[0, prompt].tolist() == encoded.prompt_ids
        assert torch.equal(batch.positions_ABL[:, 0, prompt], encoded.positions_AL)
        behind = batch.positions_ABL[:, 0, answer]
        assert torch.equal(behind[0] - encoded.positions_AL.max() - 1, torch.arange(len(response)))
        assert torch.equal(behind[0], behind[1]) and torch.equal(behind[0], behind[2])


def test_packing_is_exact(backbone, encoder):
    """The trainer's loss is that of one whole prompt a sequence, by the model's own forward."""
    recipe = Recipe(make_world(0), 0)
    packs = [recipe.draw(kind, 4, 3) for kind in ("plain", "instructed", "degraded")]
    shown = sorted({p.picture for drawn in packs for p in drawn if p.picture is not None})
    images = [Image.fromarray(recipe.pictures.pixels_NHWC[row]) for row in shown]
    with torch.no_grad():
        pixels = embedded_qwen.pixel_values(backbone.processor, images)
        features = embedded_qwen.tower_features(backbone.model, pixels)
        for drawn in packs:
            renumbered, queries, responses = [], [], []
            for pack in drawn:
                row = None if pack.picture is None else shown.index(pack.picture)
                renumbered.append(Pack(row, pack.style, pack.turns))
                for text, response in pack.turns:
                    image = None if row is None else images[row]
                    queries.append(Query("q", with_instruction(text, pack.style), image))
                    responses.append(response_ids(backbone, response))
            batch = collate(backbone, encode(backbone, queries), responses)
            logits = backbone.model(**batch.inputs).logits[:, :-1][batch.predicts_BL]
            separate = torch.nn.functional.cross_entropy(logits, batch.response_ids_R)
            packed = _pack_loss(encoder, renumbered, features)
            assert packed.item() == pytest.approx(separate.item(), rel=1e-5)
