"""Attention to shared prompts against attention to each sample's own copy of its prompt."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.benchmarks import one_at_a_time
from tests.random_qwen import make_random_qwen
from vgid.data.fictitious import make_world, portrait
from vgid.models.backbones import Backbone
from vgid.models.decoding import greedy_tokens
from vgid.models.encoding import Query, encode
from vgid.models.packing import Packed, pack
from vgid.models.prefix_attention import (
    Segment,
    SharedPrompts,
    attending_to_shared_prompts,
    part_paths,
    shared_prompt_attention,
)

LAYERS, WIDTH, HEADS = 2, 8, 2
ALL, LONG, NONE = 1, 15, 1000
"""Shortest beginning that is shared: any, at several levels; a portrait's; none."""


def questions(portraits: int) -> list[Query]:
    """On each portrait a few of different length, and some without any."""
    people = make_world(0).people[:portraits]
    asked = ["Who is it?", "Who is it, and where does the person live?", "Where?", "Where and how?"]
    queries = [
        Query(f"{n}/{text}", text, portrait(0, person))
        for n, person in enumerate(people)
        for text in asked[: 4 - n]
    ]
    again = Query("again", queries[0].text, queries[0].image)
    return [*queries, again, *(Query(text, text, None) for text in asked)]


def random_states(packed: Packed) -> list[SimpleNamespace]:
    """Keys and values of each layer, as a cache holds them."""
    shape = (packed.ids_BL.shape[0], HEADS, packed.ids_BL.shape[1], WIDTH)
    return [
        SimpleNamespace(keys=torch.randn(shape), values=torch.randn(shape)) for _ in range(LAYERS)
    ]


@pytest.mark.parametrize("shortest", [ALL, LONG, NONE])
@pytest.mark.parametrize("group", [1, 3])
def test_equals_attention_to_each_samples_own_prompt(random_backbone, monkeypatch, shortest, group):
    """Two passes, several rows; samples end one after the other."""
    monkeypatch.setattr("vgid.models.prefix_attention.SHARED_TOKENS", shortest)
    torch.manual_seed(0)
    encoded = encode(random_backbone, questions(3))
    packs = [
        pack(random_backbone, encoded[:6], max_row_tokens=60),
        pack(random_backbone, encoded[6:]),
    ]
    states = [random_states(packed) for packed in packs]
    caches = [SimpleNamespace(layers=list(layers)) for layers in states]
    shared = SharedPrompts(list(zip(packs, caches, strict=True)), room=8)
    assert bool(shared.stacks) is (shortest != NONE)
    samples = [(number, n) for number, packed in enumerate(packs) for n in range(len(packed.rows))]
    generated = torch.zeros(2, LAYERS, len(samples), HEADS, 0, WIDTH)
    generated = check(shared, packs, states, samples, group, generated)
    generator = torch.Generator().manual_seed(1)
    while len(samples) > 1:
        going = sorted(torch.randperm(len(samples), generator=generator)[:-2].tolist()) or [0]
        kept = shared.keep(going)
        assert sorted(kept) == going
        going = kept
        samples = [samples[row] for row in going]
        generated = check(shared, packs, states, samples, group, generated[:, :, going])


def check(shared, packs, states, samples, group, generated):
    """One new token a sample; returns what has been generated, this token included."""
    rows, heads, scaling = len(samples), HEADS * group, 0.3
    new = torch.randn(2, LAYERS, rows, HEADS, 1, WIDTH)
    generated = torch.cat([generated, new], dim=4)
    for layer in range(LAYERS):
        query = torch.randn(rows, heads, 1, WIDTH)
        got, _ = shared_prompt_attention(
            SimpleNamespace(layer_idx=layer),
            query,
            *shared.cache.update(*new[:, layer], layer),
            None,
            prompts=shared,
            scaling=scaling,
        )
        assert got.shape == (rows, 1, heads, WIDTH)
        for row, (number, n) in enumerate(samples):
            packed, held = packs[number], states[number][layer]
            keys, values = (
                torch.cat([x[packed.rows[n], :, packed.paths[n]], own[layer, row]], dim=1)
                for x, own in zip((held.keys, held.values), generated, strict=True)
            )
            expected = scaled_dot_product_attention(
                query[row].double(),
                keys.repeat_interleave(group, dim=0).double(),
                values.repeat_interleave(group, dim=0).double(),
                scale=scaling,
            )
            torch.testing.assert_close(got[row, 0].double(), expected[:, 0], rtol=1e-5, atol=1e-6)
    return generated


def test_long_beginnings_are_held_once_by_level_and_short_ones_apart(random_backbone):
    packed = pack(random_backbone, encode(random_backbone, questions(1)))
    shots = list(range(600))
    portraits = [list(range(start, start + 300)) for start in (600, 2000)]
    asked = [[*shots, *portraits[n % 2], 3000 + 2 * n, 3001 + 2 * n] for n in range(4)]
    short = [[5000, 5001 + n] for n in range(3)]
    packed.rows, packed.paths = [0] * 7, asked + short
    levels, own = part_paths(packed)
    assert levels == [
        [Segment(0, shots, [0, 2, 1, 3])],
        [Segment(0, portraits[0], [0, 2]), Segment(0, portraits[1], [1, 3])],
    ]
    assert own == [path[-2:] for path in asked] + short


@pytest.fixture(scope="module")
def qwen() -> Backbone:
    return make_random_qwen()


@pytest.mark.parametrize("shortest", [ALL, LONG])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_answers_equal_those_of_one_at_a_time(
    request, random_backbone, monkeypatch, name, shortest
):
    """Multi-head attention, and grouped queries with M-RoPE."""
    monkeypatch.setattr("vgid.models.prefix_attention.SHARED_TOKENS", shortest)
    monkeypatch.setattr("vgid.models.decoding.PASS_TOKENS", 1)
    backbone = random_backbone if name == "llava" else request.getfixturevalue("qwen")
    queries = questions(2)
    expected = one_at_a_time.answers(backbone, queries, max_new_tokens=12)
    assert greedy_tokens(backbone, encode(backbone, queries), max_new_tokens=12) == expected
    assert len({tuple(answer) for answer in expected}) > 3


def test_the_models_own_attention_is_left_as_it_was(random_backbone):
    language_model = random_backbone.model.model.language_model
    before = language_model.config._attn_implementation
    with pytest.raises(KeyError), attending_to_shared_prompts(language_model):
        assert language_model.config._attn_implementation != before
        raise KeyError
    assert language_model.config._attn_implementation == before
