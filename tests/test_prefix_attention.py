"""Attention to shared prompts against attention to each sample's own copy of its prompt."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.benchmarks import one_at_a_time
from tests.random_qwen import make_random_qwen
from vgid.backbones import Backbone
from vgid.decoding import greedy_tokens
from vgid.encoding import Query, encode
from vgid.fictitious import make_world, portrait
from vgid.packing import Packed, pack
from vgid.prefix_attention import (
    SharedPrompts,
    attending_to_shared_prompts,
    share_out,
    shared_prompt_attention,
)

LAYERS, WIDTH, HEADS = 2, 8, 2
TOGETHER, APART, BOTH = 1000, -1, 4
"""How dear reading is: all of a tree in one block, each sample in its own, some of each."""


def questions(portraits: int) -> list[Query]:
    """On each portrait a few of different length, and some without any."""
    people = make_world(0).people[:portraits]
    asked = ["Who is it?", "Who is it, and where does the person live?", "Where?", "Where and how?"]
    queries = [
        Query(f"{n}/{text}", text, portrait(0, person))
        for n, person in enumerate(people)
        for text in asked[: 4 - n]
    ]
    return [*queries, *(Query(text, text, None) for text in asked)]


def random_states(packed: Packed) -> list[SimpleNamespace]:
    """Keys and values of each layer, as a cache holds them."""
    shape = (packed.ids_BL.shape[0], HEADS, packed.ids_BL.shape[1], WIDTH)
    return [
        SimpleNamespace(keys=torch.randn(shape), values=torch.randn(shape)) for _ in range(LAYERS)
    ]


@pytest.mark.parametrize("reading", [TOGETHER, APART, BOTH])
@pytest.mark.parametrize("group", [1, 3])
def test_equals_attention_to_each_samples_own_prompt(random_backbone, monkeypatch, reading, group):
    """Two passes, several rows; samples end one after the other."""
    monkeypatch.setattr("vgid.prefix_attention.READING", reading)
    torch.manual_seed(0)
    encoded = encode(random_backbone, questions(3))
    packs = [
        pack(random_backbone, encoded[:6], max_row_tokens=60),
        pack(random_backbone, encoded[6:]),
    ]
    states = [random_states(packed) for packed in packs]
    caches = [SimpleNamespace(layers=list(layers)) for layers in states]
    shared = SharedPrompts(list(zip(packs, caches, strict=True)))
    own = [(number, n) for number, packed in enumerate(packs) for n in range(len(packed.rows))]
    samples = [own[n] for n in shared.order]
    assert sorted(samples) == own
    for layer, generated in itertools.product(range(LAYERS), (1, 4)):
        check(shared, packs, states, samples, layer, group, generated)
    generator = torch.Generator().manual_seed(1)
    while len(samples) > 1:
        going = sorted(torch.randperm(len(samples), generator=generator)[:-2].tolist()) or [0]
        shared.keep(going)
        samples = [samples[row] for row in going]
        for layer in range(LAYERS):
            check(shared, packs, states, samples, layer, group, generated=3)


def check(shared, packs, states, samples, layer, group, generated):
    rows, heads, scaling = len(samples), HEADS * group, 0.3
    query = torch.randn(rows, heads, 1, WIDTH)
    key, value = torch.randn(2, rows, HEADS, generated, WIDTH)
    got, _ = shared_prompt_attention(
        SimpleNamespace(layer_idx=layer), query, key, value, None, prompts=shared, scaling=scaling
    )
    assert got.shape == (rows, 1, heads, WIDTH)
    for row, (number, n) in enumerate(samples):
        packed, held = packs[number], states[number][layer]
        keys, values = (
            torch.cat([x[packed.rows[n], :, packed.paths[n]], new[row]], dim=1)
            for x, new in ((held.keys, key), (held.values, value))
        )
        expected = scaled_dot_product_attention(
            query[row].double(),
            keys.repeat_interleave(group, dim=0).double(),
            values.repeat_interleave(group, dim=0).double(),
            scale=scaling,
        )
        torch.testing.assert_close(got[row, 0].double(), expected[:, 0], rtol=1e-5, atol=1e-6)


def test_a_long_beginning_is_held_once_and_short_ones_apart(random_backbone):
    encoded = encode(random_backbone, questions(1))
    packed = pack(random_backbone, encoded)
    long = [list(range(600)) + [600 + 10 * n + t for t in range(10)] for n in range(4)]
    short = [[1000, *range(1001 + 10 * n, 1011 + 10 * n)] for n in range(4)]
    packed.rows, packed.paths = [0] * 8, long + short
    blocks = share_out(packed)
    assert [block.samples for block in blocks] == [[0, 1, 2, 3], [4], [5], [6], [7]]
    assert sorted(blocks[0].tokens) == list(range(640))
    assert [block.tokens for block in blocks[1:]] == short


@pytest.fixture(scope="module")
def qwen() -> Backbone:
    return make_random_qwen()


@pytest.mark.parametrize("reading", [TOGETHER, APART])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_answers_equal_those_of_one_at_a_time(request, random_backbone, monkeypatch, name, reading):
    """Multi-head attention, and grouped queries with M-RoPE."""
    monkeypatch.setattr("vgid.prefix_attention.READING", reading)
    monkeypatch.setattr("vgid.decoding.PASS_TOKENS", 1)
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
