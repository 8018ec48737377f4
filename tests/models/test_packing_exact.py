"""Packs against the plain Hugging Face forward pass of each sequence alone, pixels and all."""

import pytest
import torch
from torch import Tensor

from tests.packed_samples import (
    ARCHITECTURES,
    EXACT,
    Samples,
    deviation,
    make_backbone,
    make_samples,
    processed,
    separate,
    separate_all,
    with_response,
)
from vgid.config import TrialConfig
from vgid.method.chunked_kl import chunked_kl
from vgid.models.adapters import attached
from vgid.models.backbones import Backbone
from vgid.models.decoding import greedy_tokens, score_responses
from vgid.models.encoding import Encoded, Query, encode
from vgid.models.packing import hidden_states, pack, response_hidden
from vgid.objectives import forward_kl

NEW_TOKENS = 9


@pytest.fixture(scope="module", params=ARCHITECTURES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return make_backbone(request.param)


@pytest.fixture(scope="module")
def samples(backbone: Backbone) -> Samples:
    return make_samples(backbone)


@pytest.fixture(scope="module")
def prompts(backbone: Backbone, samples: Samples) -> list[Encoded]:
    return encode(backbone, samples[0])


@torch.no_grad()
def test_hidden_states_equal_those_of_separate_sequences(backbone, samples, prompts):
    got_RD = response_hidden(backbone, prompts, samples[1])
    assert deviation(got_RD, separate_all(backbone, samples)) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 60, 120])
def test_trees_cut_at_the_budget_stay_exact(backbone, samples, prompts, budget):
    packed = pack(backbone, prompts, samples[1], budget)
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
    got_ND = hidden_states(backbone, packed)[packed.last_places]
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
    settings.eos_token_id = [before, *{tokens[2 + n % 4] for n, tokens in enumerate(free[:4])}]
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
