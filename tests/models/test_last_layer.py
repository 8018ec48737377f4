import pytest
import torch
from transformers import DynamicCache

from tests.random_qwen import make_random_qwen
from vgid.data.fictitious import make_world, portrait
from vgid.models.backbones import Backbone
from vgid.models.decoding import reading_at
from vgid.models.encoding import Query, encode
from vgid.models.packing import Packed, hidden_states, pack


@pytest.fixture(scope="module")
def qwen() -> Backbone:
    return make_random_qwen()


def packed_questions(backbone: Backbone) -> Packed:
    image = portrait(0, make_world(0).people[0])
    queries = [Query(text, text, image) for text in ("Who is it?", "Where does it live?")]
    queries.append(Query("text", "Who is it?", None))
    responses = [[95, 96, 97], [98], [99, 95]]
    return pack(backbone, encode(backbone, queries), responses, max_row_tokens=40)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_states_and_cache_are_those_of_the_whole_layer(request, random_backbone, name):
    backbone = random_backbone if name == "llava" else request.getfixturevalue("qwen")
    packed = packed_questions(backbone)
    assert packed.ids_BL.shape[0] > 1
    language_model = backbone.model.model.language_model
    for places in (packed.predicting_places, packed.last_places):
        whole, part = DynamicCache(), DynamicCache()
        expected = hidden_states(backbone, packed, whole)[places]
        with reading_at(language_model, *places):
            (got,) = hidden_states(backbone, packed, part)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(part.layers, whole.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


@torch.no_grad()
def test_the_last_feed_forward_part_sees_only_what_is_read(random_backbone):
    packed = packed_questions(random_backbone)
    language_model = random_backbone.model.model.language_model
    tokens = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, x: tokens.append(x[0][..., 0].numel()))
        for layer in language_model.layers
    ]
    try:
        with reading_at(language_model, *packed.predicting_places):
            hidden_states(random_backbone, packed)
    finally:
        for handle in handles:
            handle.remove()
    assert tokens == [packed.ids_BL.numel()] * (len(tokens) - 1) + [6]


def test_the_layer_is_whole_again_after_an_error(random_backbone):
    language_model = random_backbone.model.model.language_model
    layers = list(language_model.layers)
    with pytest.raises(KeyError), reading_at(language_model, [0], [0]):
        raise KeyError
    assert list(language_model.layers) == layers
