"""What stands where in a pack, against brute force and the Hugging Face processor."""

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packed_samples import (
    ARCHITECTURES,
    Samples,
    make_backbone,
    make_samples,
    processed,
    with_response,
)
from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded, encode
from vgid.models.packing import Packed, pack
from vgid.models.vision import Picture


@pytest.fixture(scope="module", params=ARCHITECTURES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return make_backbone(request.param)


@pytest.fixture(scope="module")
def samples(backbone: Backbone) -> Samples:
    return make_samples(backbone)


@pytest.fixture(scope="module")
def prompts(backbone: Backbone, samples: Samples) -> list[Encoded]:
    return encode(backbone, samples[0])


def test_encoding_equals_the_processor_on_text_and_images(backbone, samples, prompts):
    for query, prompt in zip(samples[0], prompts, strict=True):
        expected = processed(backbone, query)
        assert prompt.prompt_ids == expected.pop("input_ids")[0].tolist()
        expected.pop("attention_mask")
        expected.pop("mm_token_type_ids", None)
        assert prompt.vision.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in prompt.vision.items())


def test_positions_are_those_of_each_sample_alone(backbone, samples, prompts):
    packed = pack(backbone, prompts, samples[1])
    core = backbone.model.model
    for n, (query, response) in enumerate(zip(*samples, strict=True)):
        inputs = with_response(processed(backbone, query), response)
        length = inputs["input_ids"].shape[1]
        expected_AL = torch.arange(length)[None]
        if hasattr(core, "get_rope_index"):
            expected_AL = expected_AL.expand(3, -1)
            if "image_grid_thw" in inputs:
                del inputs["pixel_values"]
                expected_AL = core.get_rope_index(**inputs)[0][:, 0]
        got_AL = packed.positions_ABL[:, packed.rows[n], packed.paths[n]]
        assert torch.equal(got_AL, expected_AL)


def test_the_samples_cover_what_can_be_shared(backbone, samples, prompts):
    """The fixture itself: else the tests below would prove less than they say."""
    keys = {q.id: p.identity for q, p in zip(samples[0], prompts, strict=True)}

    def begins(one: str, other: str) -> bool:
        return keys[other][: len(keys[one])] == keys[one] and one != other

    assert begins("a/who", "few/c") and begins("a/who", "few/a twice")
    assert begins("text/who", "few/spoken")
    assert keys["a/who"] == keys["a/who again"] != keys["b/who"]
    grids = {tuple(p.tensors["pixel_values"].shape) for e in prompts for p in e.pictures}
    assert len(grids) == (3 if "qwen" in backbone.spec.name else 1)
    packed = pack(backbone, prompts, samples[1])
    whole = sum(len(p.prompt_ids) + len(r) for p, r in zip(prompts, samples[1], strict=True))
    assert packed.ids_BL.numel() < 0.5 * whole


def assert_laid_out(
    packed: Packed, prompts: list[Encoded], responses: list[list[int]]
) -> list[set[tuple[int, ...]]]:
    """The definition, by brute force; returns the distinct beginnings in each row."""
    mask_BLL = packed.mask_B1LL[:, 0]
    beginnings: list[dict[int, tuple[int, ...]]] = [{} for _ in packed.ids_BL]
    for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row, path = packed.rows[n], packed.paths[n]
        key = tuple(prompt.identity + response)
        assert packed.ids_BL[row, path].tolist() == prompt.prompt_ids + response
        for k, place in enumerate(path):
            assert beginnings[row].setdefault(place, key[: k + 1]) == key[: k + 1]
    for row, at in enumerate(beginnings):
        places = range(packed.ids_BL.shape[1])
        for i in places:
            seen = set(mask_BLL[row, i].nonzero()[:, 0].tolist())
            if i not in at:
                assert i in seen and seen.isdisjoint(at), "padding sees padding only"
                continue
            mine = at[i]
            below = {j for j in at if at[j] == mine[: len(at[j])]}
            # Trees that begin alike can lie in one row: one copy of each ancestor is seen.
            assert seen <= below
            assert sorted(len(at[j]) for j in seen) == list(range(1, len(mine) + 1))
            assert max(seen) == i
    return [set(at.values()) for at in beginnings]


def used_places(packed: Packed) -> set[tuple[int, int]]:
    return {(r, i) for r, path in zip(packed.rows, packed.paths, strict=True) for i in path}


@pytest.mark.parametrize("budget", [1, 60, 120])
def test_trees_over_the_budget_are_cut(backbone, samples, prompts, budget):
    packed = pack(backbone, prompts, samples[1], budget)
    longest = max(map(len, packed.paths))
    assert packed.ids_BL.shape[1] <= max(budget, longest)
    assert_laid_out(packed, prompts, samples[1])
    whole = pack(backbone, prompts, samples[1])
    assert len(used_places(packed)) > len(used_places(whole)), "beginnings are repeated"


def test_every_distinct_beginning_stands_once_for_each_first_image(backbone, samples, prompts):
    packed = pack(backbone, prompts, samples[1])
    assert_laid_out(packed, prompts, samples[1])
    distinct = {
        (p.pictures[0].key if p.pictures else "", tuple((p.identity + r)[:k]))
        for p, r in zip(prompts, samples[1], strict=True)
        for k in range(1, len(p.identity + r) + 1)
    }
    assert len(used_places(packed)) == len(distinct)
    image_tokens = (packed.ids_BL == backbone.processor.image_token_id).sum()
    assert image_tokens == sum(picture.tokens for picture in packed.pictures)


def test_a_single_sample_over_the_budget_is_kept_whole(backbone, samples, prompts):
    packed = pack(backbone, prompts, samples[1], max_row_tokens=1)
    lengths = [len(p.prompt_ids) + len(r) for p, r in zip(prompts, samples[1], strict=True)]
    assert packed.ids_BL.shape[1] == max(lengths)
    for path, length in zip(packed.paths, lengths, strict=True):
        assert path == list(range(path[0], path[0] + length))
    assert len(used_places(packed)) == sum(lengths), "nothing is shared"


def test_no_samples_make_no_rows(backbone):
    packed = pack(backbone, [], [])
    assert packed.ids_BL.shape == (0, 0)
    assert packed.response_ids_R.numel() == 0


@pytest.fixture(scope="module")
def text_prompt() -> Callable[[list[int]], Encoded]:
    return lambda ids: Encoded("", ids, ids, torch.arange(len(ids))[None])


tokens = st.lists(st.integers(5, 7), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(tokens.filter(len), tokens), min_size=1, max_size=8),
    budget=st.integers(1, 40),
)
def test_any_small_set_of_samples_is_laid_out_right(random_backbone, text_prompt, pairs, budget):
    prompts = [text_prompt(ids) for ids, _ in pairs]
    responses = [response for _, response in pairs]
    wide = pack(random_backbone, prompts, responses)
    distinct = {tuple((p + r)[:k]) for p, r in pairs for k in range(1, len(p + r) + 1)}
    assert assert_laid_out(wide, prompts, responses) == [distinct]
    assert wide.ids_BL.numel() == len(distinct)
    assert wide.response_ids_R.tolist() == list(chain.from_iterable(responses))

    packed = pack(random_backbone, prompts, responses, budget)
    assert_laid_out(packed, prompts, responses)
    assert packed.ids_BL.shape[1] <= max(budget, *(len(p + r) for p, r in pairs))
    assert len(distinct) <= len(used_places(packed)) <= sum(len(p + r) for p, r in pairs)
    # A state that is its own place in the batch: what stands there is all before the token.
    places_BL1 = torch.arange(packed.ids_BL.numel()).reshape(*packed.ids_BL.shape, 1)
    places = iter(packed.predicting(places_BL1)[:, 0].tolist())
    for n, (prompt, response) in enumerate(pairs):
        for k in range(len(response)):
            row, place = divmod(next(places), packed.ids_BL.shape[1])
            seen = packed.mask_B1LL[row, 0, place]
            assert row == packed.rows[n]
            assert packed.ids_BL[row, seen].tolist() == prompt + response[:k]
    assert next(places, None) is None


def one_image(n: int, size: int) -> Encoded:
    """``size`` tokens, the first of them the n-th image."""
    shown = Picture(f"{n:015x}", 1, {}, lambda: torch.zeros(0))
    ids = [5] * size
    return Encoded("", ids, [shown.token_key, *ids[1:]], torch.arange(size)[None], (shown,))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), budget=st.integers(1, 100))
def test_rows_are_few_and_evenly_filled(random_backbone, sizes, budget):
    prompts = [one_image(n, size) for n, size in enumerate(sizes)]
    packed = pack(random_backbone, prompts, max_row_tokens=budget)
    rows, length = packed.ids_BL.shape
    assert length <= max(budget, *sizes)
    if sum(sizes) <= max(budget, *sizes):
        assert (rows, length) == (1, sum(sizes)), "no padding"
    filled = [0] * rows
    for row, path in zip(packed.rows, packed.paths, strict=True):
        filled[row] += len(path)
    assert max(filled) == length
    assert length - min(filled) <= max(sizes)
