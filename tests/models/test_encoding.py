import numpy as np
import pytest
import torch
from PIL import Image

from tests.padded import IGNORE, collate
from vgid.errors import InputError
from vgid.models.backbones import Backbone
from vgid.models.encoding import Query, at_model_resolution, encode, response_ids


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_prompt_is_framed_with_all_image_tokens(random_backbone: Backbone):
    query = Query("a", "Who is shown in this picture?", picture())
    (encoded,) = encode(random_backbone, [query])
    tokenizer = random_backbone.processor.tokenizer
    image_id = random_backbone.model.config.image_token_index
    assert encoded.prompt_ids.count(image_id) == 16
    assert encoded.prompt_ids[0] == tokenizer.bos_token_id
    text = tokenizer.decode([i for i in encoded.prompt_ids[1:] if i != image_id])
    assert text == "USER: \nWho is shown in this picture?\nASSISTANT:"
    assert encoded.vision["pixel_values"].shape == (1, 3, 64, 64)


def test_text_query_has_no_vision(random_backbone: Backbone):
    (encoded,) = encode(random_backbone, [Query("a", "Who is it?", None)])
    assert encoded.vision == {}
    text = random_backbone.processor.tokenizer.decode(encoded.prompt_ids[1:])
    assert text == "USER: Who is it?\nASSISTANT:"


def test_response_follows_the_frame_as_if_tokenised_together(random_backbone: Backbone):
    tokenizer = random_backbone.processor.tokenizer
    ids = response_ids(random_backbone, "She works as a baker.")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == " She works as a baker."
    (encoded,) = encode(random_backbone, [Query("a", "What?", None)])
    whole = tokenizer("USER: What?\nASSISTANT: She works as a baker.")["input_ids"]
    assert encoded.prompt_ids + ids[:-1] == whole


def test_collate_pads_and_labels_response_positions_only(random_backbone: Backbone):
    queries = [Query("a", "Who?", picture()), Query("b", "Who is shown in this picture?", None)]
    encoded = encode(random_backbone, queries)
    responses = [response_ids(random_backbone, "Nobody."), response_ids(random_backbone, "Me, I.")]
    batch = collate(random_backbone, encoded, responses)
    for row, (e, r) in enumerate(zip(encoded, responses, strict=True)):
        real = batch.inputs["attention_mask"][row].bool()
        assert batch.inputs["input_ids"][row][real].tolist() == e.prompt_ids + r
        assert batch.labels_BL[row][real].tolist() == [IGNORE] * len(e.prompt_ids) + r
        assert (batch.labels_BL[row][~real] == IGNORE).all()
        assert real[0]
    assert batch.response_ids_R.tolist() == responses[0] + responses[1]
    assert int(batch.predicts_BL.sum()) == len(responses[0]) + len(responses[1])
    assert batch.inputs["pixel_values"].shape[0] == 1


def test_a_sample_longer_than_the_context_is_named(random_backbone: Backbone):
    query = Query("forget_5/0007/generation/image/3", "why " * 600, picture())
    with pytest.raises(InputError, match=r"forget_5/0007/generation/image/3.*exceed"):
        encode(random_backbone, [query])


@pytest.mark.parametrize("size", [(64, 64), (200, 120), (50, 90)])
def test_pixels_at_model_resolution_pass_the_processor_unchanged(random_backbone, size):
    processor = random_backbone.processor
    pixels = at_model_resolution(processor, picture(size=size))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    again = at_model_resolution(processor, Image.fromarray(pixels))
    assert (again == pixels).all()
    (encoded,) = encode(random_backbone, [Query("a", "Who?", Image.fromarray(pixels))])
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255.0 - 0.5) / 0.25
    torch.testing.assert_close(encoded.vision["pixel_values"][0], expected, atol=1e-5, rtol=0)


def test_an_image_token_in_the_data_is_named(random_backbone: Backbone):
    query = Query("forget_5/0007/generation/image/3", "Who is <image>?", picture())
    with pytest.raises(InputError, match=r"forget_5/0007/generation/image/3.*<image>"):
        encode(random_backbone, [query])
    with pytest.raises(InputError, match="<image>"):
        response_ids(random_backbone, "She is <image>.")
