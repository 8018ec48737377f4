"""Attention by trees against plain SDPA under the whole mask: values, gradients, whole models.

Shape legend: B rows, L tokens of a row, H query heads, G key-value heads, E head width.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.packed_samples import deviation, make_backbone, make_samples
from vgid.config import TrialConfig
from vgid.method.profile_prompts import synthetic_set
from vgid.models.adapters import attached
from vgid.models.encoding import encode
from vgid.models.packing import hidden_states, pack
from vgid.models.tree_attention import TREES, Tree, attend_by_trees, lay_out, tree_attention

WIDTH = 8
"""E."""


def forest(generator: torch.Generator, length: int) -> list[int]:
    """Depth of each token, those of a tree behind each other: branches and new roots at random."""
    depths = [0]
    while len(depths) < length:
        deeper = depths[-1] + 1
        branch = int(torch.randint(0, deeper + 1, (), generator=generator))
        depths.append(branch if torch.rand((), generator=generator) < 0.2 else deeper)
    return depths


def ends_of(depths: list[int]) -> list[int]:
    """Where the tree below each token ends."""
    length = len(depths)
    return [
        next((j for j in range(i + 1, length) if depths[j] <= depth), length)
        for i, depth in enumerate(depths)
    ]


def seen_by(depths: list[int]) -> Tensor:
    """The definition: a token sees itself and whatever stands on the path from its root."""
    seen_LL = torch.zeros(len(depths), len(depths), dtype=torch.bool)
    path: list[int] = []
    for i, depth in enumerate(depths):
        path = [*path[:depth], i]
        seen_LL[i, path] = True
    return seen_LL


def pairs(trees: list[Tree]) -> int:
    """Products of a query and a key that are computed."""
    return sum(block.mask_QK.numel() for tree in trees for block in tree.blocks)


def layer(groups: int) -> SimpleNamespace:
    """What an attention layer tells of itself."""
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True)


def attended(states: list[Tensor], **how: object) -> list[Tensor]:
    """Output and the gradients of queries, keys and values, for a loss that weighs all outputs."""
    query, key, value = (x.clone().requires_grad_() for x in states)
    groups = query.shape[1] // key.shape[1]
    mask = how.pop("mask", None)
    output, weights = tree_attention(layer(groups), query, key, value, mask, scaling=0.3, **how)
    assert weights is None
    assert output.is_contiguous()
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weight).sum().backward()
    return [output.detach(), *(x.grad for x in (query, key, value) if x.grad is not None)]


def states_of(seed: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    rows, heads, kv_heads, length = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, length, h, WIDTH, generator=generator, dtype=dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    block=st.sampled_from([1, 5, 16, 128]),
)
def test_values_and_gradients_equal_those_under_the_whole_mask(seed, rows, length, heads, block):
    generator = torch.Generator().manual_seed(seed)
    forests = [forest(generator, length) for _ in range(rows)]
    mask_B1LL = torch.stack([seen_by(depths) for depths in forests])[:, None]
    ends_BL = torch.tensor([ends_of(depths) for depths in forests])
    states = states_of(seed, (rows, *heads, length), torch.float64)
    trees = lay_out(ends_BL, torch.float64, block)
    assert sum(tree.tokens for tree in trees) == rows * length
    assert all(1 <= len(b.mask_QK) <= block for tree in trees for b in tree.blocks)
    expected = attended(states, mask=mask_B1LL)
    got = attended(states, trees=trees)
    assert len(got) == len(expected) == 4
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_model_dtypes(dtype, near):
    depths = forest(torch.Generator().manual_seed(3), 333)
    states = states_of(3, (1, 4, 2, 333), dtype)
    expected = attended([x.double() for x in states], mask=seen_by(depths)[None, None])
    trees = lay_out(torch.tensor([ends_of(depths)]), dtype)
    for one, other in zip(attended(states, trees=trees), expected, strict=True):
        assert one.dtype == dtype
        assert deviation(one.double(), other) <= near


def test_twice_the_same_bits():
    ends_BL = torch.tensor([ends_of(forest(torch.Generator().manual_seed(5), 301))])
    trees = lay_out(ends_BL, torch.float32)
    states = states_of(5, (1, 4, 2, 301), torch.float32)
    first, again = (attended(states, trees=trees) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_without_trees_it_is_plain_sdpa_bit_for_bit():
    states = states_of(7, (2, 4, 2, 40), torch.float32)
    for mask in (None, torch.ones(40, 40, dtype=torch.bool).tril()[None, None]):
        got, _ = tree_attention(layer(2), *states, mask, scaling=0.3)
        expected, _ = sdpa_attention_forward(layer(2), *states, mask, scaling=0.3)
        assert torch.equal(got, expected)


def test_masks_begin_rows_where_kernels_want_them():
    trees = lay_out(
        torch.tensor([ends_of(forest(torch.Generator().manual_seed(9), 300))]), torch.half
    )
    masks = [block.mask_QK for tree in trees for block in tree.blocks]
    assert any(mask.shape[1] % 8 for mask in masks)
    assert all(mask.stride(0) % 8 == 0 and mask.stride(1) == 1 for mask in masks)


def test_no_rows_have_no_trees():
    assert lay_out(torch.zeros(0, 0, dtype=torch.long), torch.float32) == []


@pytest.mark.parametrize("portraits", [1, 3])
def test_little_is_computed_that_the_mask_hides(random_backbone, portraits):
    """Questions do not meet each other's keys but in their own block, nor those of portraits."""
    data = synthetic_set(random_backbone, portraits, 14, seed=0)
    packed = pack(random_backbone, data.prompts, [t.response for t in data.targets[0]])
    seen = int(packed.mask_B1LL.sum())
    assert pairs(lay_out(packed.ends_BL, torch.float32, 16)) <= 1.3 * seen
    assert pairs(lay_out(packed.ends_BL, torch.float32)) < 0.6 * packed.ids_BL.shape[1] ** 2


@pytest.mark.parametrize("shared", [0, 1, 300])
def test_sharing_a_beginning_never_costs_more_than_repeating_it(shared):
    """Six long samples in one tree: however short what they share, the others are not met."""
    apart = [*range(600)] * 6
    together = [*range(600), *[*range(shared, 600)] * 5]
    computed = [
        pairs(lay_out(torch.tensor([ends_of(depths)]), torch.float32, 100))
        for depths in (together, apart)
    ]
    assert computed[0] <= computed[1] if shared % 100 == 0 else computed[0] <= 1.01 * computed[1]


@pytest.fixture(scope="module", params=["llava", "qwen"])
def packed_model(request):
    backbone = make_backbone(request.param)
    queries, responses = make_samples(backbone)
    return backbone, pack(backbone, encode(backbone, queries), responses)


def test_the_tower_keeps_its_attention_and_files_do_not_name_ours(packed_model):
    config = packed_model[0].model.config
    assert config.text_config._attn_implementation == TREES
    assert config.vision_config._attn_implementation == config._attn_implementation == "sdpa"
    assert TREES not in config.to_json_string(use_diff=False)


@torch.no_grad()
def test_states_and_cache_equal_those_under_the_whole_mask(packed_model):
    backbone, packed = packed_model
    found = {}
    for name in ("sdpa", TREES):
        backbone.model.set_attn_implementation({"text_config": name})
        cache = DynamicCache(config=backbone.model.config.get_text_config())
        states_BLD = hidden_states(backbone, packed, cache)
        found[name] = [states_BLD, *(x for held in cache.layers for x in (held.keys, held.values))]
    attend_by_trees(backbone.model)
    assert len(found[TREES]) > 5
    for got, expected in zip(found[TREES], found["sdpa"], strict=True):
        assert deviation(got, expected) <= 1e-5


def test_adapter_gradients_equal_those_under_the_whole_mask(packed_model):
    backbone, packed = packed_model
    gradients = {}
    for name, checkpointing in (("sdpa", False), (TREES, False), (TREES, True)):
        backbone.model.set_attn_implementation({"text_config": name})
        trial = TrialConfig(lora_rank=4, gradient_checkpointing=checkpointing)
        with attached(backbone, trial) as student:
            student.train()
            torch.manual_seed(1)
            weights = [p for p in student.parameters() if p.requires_grad]
            with torch.no_grad():
                for weight in weights:
                    weight.normal_(std=0.05)
            states_RD = packed.predicting(hidden_states(backbone, packed))
            (
                states_RD * torch.linspace(-1, 1, states_RD.numel()).view_as(states_RD)
            ).sum().backward()
            gradients[name, checkpointing] = [w.grad for w in weights]
    attend_by_trees(backbone.model)
    plain, by_trees, again = gradients.values()
    for expected, got, recomputed in zip(plain, by_trees, again, strict=True):
        assert deviation(got, expected) <= 1e-5
        assert torch.equal(got, recomputed)
