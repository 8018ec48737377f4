"""Packs against the plain Hugging Face forward pass of each sequence alone, pixels and all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.conftest import make_random_backbone
from tests.random_qwen import make_random_qwen
from tests.test_encoding import picture
from vgid.adapter import attached
from vgid.backbones import Backbone
from vgid.chunked_kl import chunked_kl
from vgid.config import TrialConfig
from vgid.decoding import greedy_tokens, score_responses
from vgid.encoding import Encoded, Query, Shot, encode, response_ids
from vgid.objectives import forward_kl
from vgid.packing import Packed, hidden_states, pack, response_hidden

EXACT = 1e-5
"""Deviation relative to the largest value, in fp32."""
NEW_TOKENS = 9

Processed = dict[str, Tensor]


@pytest.fixture(scope="module", params=["llava", "qwen", "qwen-untied"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    if request.param == "llava":
        return make_random_backbone()
    return make_random_qwen(tied=request.param == "qwen")


def shot(backbone: Backbone, text: str, answer: str, image: Image.Image | None) -> Shot:
    frame = backbone.spec.frame
    turn = (frame.text if image is None else frame.image).format(text=text)
    return Shot(f"{turn}{frame.separator}{answer}\n", image)


def make_queries(backbone: Backbone) -> list[Query]:
    """Every way in which prompts can begin alike, in no helpful order."""
    a, b, c, d = (
        picture(seed, size)
        for seed, size in enumerate([(64, 64), (200, 150), (84, 140), (150, 200)])
    )
    who, where = "Who is shown in this picture?", "Where does this person live?"
    of_a = shot(backbone, who, "Agnes Ashby", a)
    of_b = shot(backbone, where, "in Corsk.", b)
    spoken = shot(backbone, who, "Agnes Ashby", None)
    return [
        Query("a/who", who, a),
        Query("b/who", who, b),  # same wording, another image
        Query("text/where", where, None),
        Query("a/where", where, a),
        Query("few/c", who, c, (of_a, of_b)),  # begins with all of a/who
        Query("a/who again", who, a),
        Query("few/d", who, d, (of_a, of_b)),  # parts from few/c at the last image
        Query("few/c where", where, c, (of_a, of_b)),
        Query("few/a twice", where, a, (of_a,)),
        Query("text/who", who, None),
        Query("few/spoken", where, c, (spoken,)),  # begins with all of text/who
        Query("text/where again", where, None),
        Query("c/who", who, c),
    ]


RESPONSES = ["in Corsk.", "Agnes Ashby lives in Corsk.", "Agnes Ashby, a baker.", "No"]
OPTIONS = ["in Corsk.", "in Corsk and", "in", "a baker"]


def make_samples(backbone: Backbone) -> tuple[list[Query], list[list[int]]]:
    """Queries with responses; two of them with options, one the beginning of another."""
    queries = make_queries(backbone)
    responses = [response_ids(backbone, RESPONSES[n % 4]) for n in range(len(queries))]
    for query in (queries[3], queries[7]):
        queries += [query] * len(OPTIONS)
        # Without the end of sequence, so that "in" is the beginning of "in Corsk.".
        responses += [response_ids(backbone, option)[:-1] for option in OPTIONS]
    return queries, responses


@pytest.fixture(scope="module")
def samples(backbone: Backbone) -> tuple[list[Query], list[list[int]]]:
    return make_samples(backbone)


@pytest.fixture(scope="module")
def prompts(backbone: Backbone, samples: Any) -> list[Encoded]:
    return encode(backbone, samples[0])


def processed(backbone: Backbone, query: Query) -> Processed:
    """What the processor makes of a whole prompt, text and images in one call."""
    frame = backbone.spec.frame
    turn = (frame.text if query.image is None else frame.image).format(text=query.text)
    images = [s.image for s in query.shots if s.image is not None]
    images += [] if query.image is None else [query.image]
    text = "".join(s.text for s in query.shots) + turn
    return dict(backbone.processor(text=[text], images=images or None, return_tensors="pt"))


def with_response(inputs: Processed, response: list[int]) -> Processed:
    more = {"input_ids": torch.tensor([response], dtype=torch.long)}
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    more["mm_token_type_ids"] = torch.zeros_like(more["input_ids"])
    return {k: torch.cat([v, more[k]], 1) if k in more else v for k, v in inputs.items()}


def separate(backbone: Backbone, query: Query, response: list[int]) -> Tensor:
    """States that predict the response, from the plain forward pass of this sequence alone."""
    inputs = with_response(processed(backbone, query), response)
    hidden_LD = backbone.model.model(**inputs, use_cache=False).last_hidden_state[0]
    return hidden_LD[-len(response) - 1 : -1]


def separate_all(backbone: Backbone, samples: Any) -> Tensor:
    return torch.cat([separate(backbone, q, r) for q, r in zip(*samples, strict=True)])


def deviation(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


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


@torch.no_grad()
def test_hidden_states_equal_those_of_separate_sequences(backbone, samples, prompts):
    got_RD = response_hidden(backbone, prompts, samples[1])
    assert deviation(got_RD, separate_all(backbone, samples)) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 60, 120])
def test_trees_over_the_budget_are_cut_and_stay_exact(backbone, samples, prompts, budget):
    packed = pack(backbone, prompts, samples[1], budget)
    longest = max(map(len, packed.paths))
    assert packed.ids_BL.shape[1] <= max(budget, longest)
    assert_laid_out(packed, prompts, samples[1])
    whole = pack(backbone, prompts, samples[1])
    assert len(used_places(packed)) > len(used_places(whole)), "beginnings are repeated"
    got_RD = packed.predicting(hidden_states(backbone, packed))
    assert deviation(got_RD, separate_all(backbone, samples)) <= EXACT


@torch.no_grad()
def test_order_of_samples_does_not_matter(backbone, samples, prompts):
    responses = samples[1]
    expected = response_hidden(backbone, prompts, responses).split([len(r) for r in responses])
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [responses[n] for n in order]
    got = response_hidden(backbone, [prompts[n] for n in order], shuffled)
    for n, got_RD in zip(order, got.split([len(r) for r in shuffled]), strict=True):
        assert deviation(got_RD, expected[n]) <= EXACT


@torch.no_grad()
def test_a_single_sample_equals_itself_among_others(backbone, samples, prompts):
    for n in (0, 2, 4):
        alone = pack(backbone, [prompts[n]], [samples[1][n]])
        assert alone.ids_BL.tolist() == [prompts[n].prompt_ids + samples[1][n]]
        got_RD = alone.predicting(hidden_states(backbone, alone))
        expected_RD = separate(backbone, samples[0][n], samples[1][n])
        assert deviation(got_RD, expected_RD) <= EXACT


@torch.no_grad()
def test_padding_never_leaks(backbone, samples, prompts):
    packed = pack(backbone, prompts, samples[1], max_row_tokens=120)
    before = hidden_states(backbone, packed)
    padding_BL = torch.ones_like(packed.ids_BL, dtype=torch.bool)
    for row, path in zip(packed.rows, packed.paths, strict=True):
        padding_BL[row, path] = False
    assert padding_BL.sum() > 10
    packed.ids_BL[padding_BL] = samples[1][0][0]
    packed.positions_ABL[:, padding_BL] = 77
    after = hidden_states(backbone, packed)
    assert not torch.equal(after[padding_BL], before[padding_BL])
    assert torch.equal(after[~padding_BL], before[~padding_BL])
    assert after.isfinite().all()


@torch.no_grad()
def test_last_states_are_those_behind_the_whole_prompt(backbone, samples, prompts):
    packed = pack(backbone, prompts)
    got_ND = packed.last(hidden_states(backbone, packed))
    expected = []
    for query in samples[0]:
        inputs = processed(backbone, query)
        expected.append(backbone.model.model(**inputs).last_hidden_state[0, -1])
    assert deviation(got_ND, torch.stack(expected)) <= EXACT


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_every_lora_gradient_equal_those_of_separate_sequences(
    backbone, samples, prompts, checkpointing
):
    trial = TrialConfig(lora_rank=4, gradient_checkpointing=checkpointing)
    head = backbone.model.lm_head
    with torch.no_grad():  # a teacher that sees each question with another response's tokens
        teacher_RD = separate_all(backbone, samples).roll(1, 0)
    with attached(backbone, trial) as student:
        student.train()
        torch.manual_seed(1)
        weights = {n: p for n, p in student.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, weight in weights.items():
                if "lora_B" in name:
                    weight.normal_(std=0.05)

        def gradients(loss: Tensor) -> dict[str, Tensor]:
            student.zero_grad()
            loss.backward()
            assert all(w.grad is not None for w in weights.values())
            return {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}

        plain = forward_kl(head(teacher_RD), head(separate_all(backbone, samples)))
        expected = gradients(plain)
        runs: list[int] = []
        layer = backbone.model.model.language_model.layers[0].mlp
        handle = layer.register_forward_pre_hook(lambda *_: runs.append(1))
        student_RD = response_hidden(backbone, prompts, samples[1])
        shared = chunked_kl(student_RD, teacher_RD, head.weight, chunk=16) / len(student_RD)
        got = gradients(shared)
        handle.remove()
    assert len(runs) == (2 if checkpointing else 1), "a checkpointed layer runs again"
    assert plain.item() > 0.1
    assert shared.item() == pytest.approx(plain.item(), rel=EXACT)
    worst = {name: deviation(got[name], expected[name]) for name in expected}
    assert max(worst.values()) <= EXACT, worst
    assert all(g.abs().max() > 0 for g in expected.values())


def generated(backbone: Backbone, query: Query) -> list[int]:
    """One prompt's greedy answer by the library's own ``generate``, without its end token."""
    inputs = processed(backbone, query)
    ends = backbone.model.generation_config.eos_token_id
    output = backbone.model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=[backbone.processor.image_token_id],
    )
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens[:-1] if tokens[-1] in (ends if isinstance(ends, list) else [ends]) else tokens


@pytest.mark.parametrize("batch_size", [64, 3])
def test_greedy_tokens_equal_one_at_a_time_generation(backbone, samples, prompts, batch_size):
    expected = [generated(backbone, query) for query in samples[0]]
    assert greedy_tokens(backbone, prompts, NEW_TOKENS, batch_size) == expected
    assert len({tuple(tokens) for tokens in expected}) >= 8  # the prompts matter


def test_rows_that_end_are_dropped_and_the_others_go_on(backbone, samples, prompts):
    free = [generated(backbone, query) for query in samples[0]]
    settings = backbone.model.generation_config
    before = settings.eos_token_id
    settings.eos_token_id = [before, *{tokens[2 + n % 4] for n, tokens in enumerate(free[:6])}]
    try:
        expected = [generated(backbone, query) for query in samples[0]]
        got = greedy_tokens(backbone, prompts, NEW_TOKENS)
    finally:
        settings.eos_token_id = before
    assert got == expected
    lengths = [len(tokens) for tokens in expected]
    early = sum(length < NEW_TOKENS - 2 for length in lengths)
    assert len(lengths) / 4 < early < len(lengths), "some end early, some do not"
    assert len(set(lengths)) >= 3


@torch.no_grad()
def test_scores_equal_the_full_logits(backbone, samples, prompts):
    scores = score_responses(backbone, prompts, samples[1], batch_size=8)
    for score, query, response in zip(scores, *samples, strict=True):
        inputs = with_response(processed(backbone, query), response)
        logits_LV = backbone.model(**inputs).logits[0, -len(response) - 1 : -1]
        expected_R = logits_LV.log_softmax(-1)[range(len(response)), response]
        torch.testing.assert_close(score.logprobs_R, expected_R, atol=1e-4, rtol=1e-5)
        assert score.correct_R.tolist() == [
            int(row.argmax()) == token for row, token in zip(logits_LV, response, strict=True)
        ]


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
                assert seen == {i}, "padding sees itself only"
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


@contextmanager
def free_attention() -> Iterator[None]:
    """As if width were unbounded, so that no tree is cut because its row became too long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgid.packing._cost", lambda tokens, width: tokens)
        yield


def test_every_distinct_beginning_stands_once_for_each_first_image(backbone, samples, prompts):
    with free_attention():
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


def test_a_short_common_beginning_does_not_make_one_long_row(random_backbone, text_prompt):
    width = random_backbone.model.config.get_text_config().hidden_size
    prompts = [text_prompt([5, *[6 + n] * 599]) for n in range(6)]
    rows, length = pack(random_backbone, prompts).ids_BL.shape
    assert rows * length * (6 * width + length) <= 6 * 600 * (6 * width + 600)


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
    with free_attention():
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
