import copy
import json
import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.benchmarks import machine as machine_module
from tests.benchmarks.machine import (
    Paired,
    Seconds,
    emit,
    machine,
    machine_line,
    median_interval,
    paired,
    peak_resident,
)
from tests.benchmarks.one_at_a_time import answers, option_logprobs, processor_inputs
from tests.benchmarks.random_llava import parameter_counts, portrait_questions, random_llava
from tests.benchmarks.released_step import ReleasedStep, all_positions_kl
from vgid.errors import InputError
from vgid.models.backbones import Backbone
from vgid.models.decoding import greedy_tokens, score_responses
from vgid.models.encoding import encode, response_ids

NEW_TOKENS = 7
MIB = 2**20


@pytest.fixture(scope="module")
def small_llava() -> Backbone:
    """The benchmark's LLaVA with 16 image tokens and a single decoder layer."""
    return random_llava(image_tokens=16, vocabulary=2000, parameters=1)


@pytest.fixture
def samples():
    return portrait_questions(portraits=2, questions_each=3, size=64)


def released(backbone: Backbone, **settings) -> ReleasedStep:
    return ReleasedStep(replace(backbone, model=copy.deepcopy(backbone.model)), **settings)


def adapter_of(trainer: ReleasedStep) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.student.parameters() if p.requires_grad]


# --- machine ---


def test_the_machine_is_named_in_one_line():
    described = machine()
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert "\n" not in machine_line(described)
    assert all(str(value) in machine_line(described) for value in described.values())
    json.dumps(described)


def test_median_interval_of_five_is_their_range():
    found = median_interval([3.0, 1.0, 2.0, 9.0, 4.0])
    assert (found.median, found.low, found.high) == (3.0, 1.0, 9.0)
    assert found.coverage == pytest.approx(1 - 2 / 32)


def test_median_interval_of_fifteen_is_the_fourth_from_either_end():
    # Tabulated (Conover, Practical Nonparametric Statistics): n = 15 gives ranks 4 and 12.
    found = median_interval([float(i) for i in range(15, 0, -1)])
    assert (found.median, found.low, found.high) == (8.0, 4.0, 12.0)
    assert found.coverage == pytest.approx(0.9648, abs=1e-4)


def test_median_interval_covers_the_median_as_often_as_it_says():
    generator = np.random.default_rng(0)
    found = [median_interval(generator.exponential(size=9)) for _ in range(4000)]
    covered = np.mean([f.low <= np.log(2) <= f.high for f in found])
    assert covered == pytest.approx(found[0].coverage, abs=0.01)
    assert found[0].coverage >= 0.95


def test_ratios_are_paired_round_by_round():
    a = tuple(Seconds(wall, cpu) for wall, cpu in [(8, 4), (80, 6), (10, 8), (12, 10), (14, 6)])
    b = tuple(Seconds(wall, cpu) for wall, cpu in [(1, 2), (10, 2), (1, 2), (1, 2), (2, 2)])
    result = Paired(a, b)
    assert result.wall_ratio.median == 8.0
    assert (result.wall_ratio.low, result.wall_ratio.high) == (7.0, 12.0)
    assert result.cpu_ratio.median == 3.0


def test_callables_run_in_turns_after_one_warm_up():
    calls: list[str] = []
    result = paired(lambda: calls.append("a"), lambda: calls.append("b"), rounds=6)
    assert calls == ["a", "b"] * 7
    assert len(result.a) == len(result.b) == 6


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="at least 5"):
        paired(lambda: None, lambda: None, rounds=4)


def prepare_allocation():
    """64 MiB are there before the call, which takes 200 MiB more and gives them back."""
    kept = np.ones(64 * MIB, dtype=np.uint8)

    def call() -> int:
        return int(np.ones(200 * MIB, dtype=np.uint8)[-1] + kept[0])

    return call


def test_peak_is_what_the_call_takes_beyond_what_was_there():
    peak = peak_resident(prepare_allocation)
    assert peak.above == pytest.approx(200 * MIB, abs=10 * MIB)
    assert peak.before > 64 * MIB


def test_sampling_sees_memory_that_is_held_for_a_while():
    with machine_module._sampled_resident() as values:
        # Straight from the system: an array may get freed memory that was resident all along.
        held = mmap.mmap(-1, 100 * MIB)
        np.frombuffer(held, dtype=np.uint8)[:] = 1
        before = len(values)
        while len(values) < before + 3:
            pass
        held.close()
    assert max(values) - values[0] > 90 * MIB


def failing_preparation():
    raise InputError("no weights here.")


def test_an_error_in_the_fresh_process_is_raised_here():
    with pytest.raises(InputError, match="no weights here"):
        peak_resident(failing_preparation)


def test_json_is_the_last_line_and_the_table_has_every_value(capsys):
    result = {"ratio": 8.4, "rounds": [1.0, 2.0], "machine": {"cores": 2, "cpu": "a model"}}
    emit(result, as_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    emit(result, as_json=False)
    table = capsys.readouterr().out
    assert all(text in table for text in ("8.4", "1, 2", "machine.cores", "a model"))


def test_json_refuses_what_is_no_number():
    with pytest.raises(ValueError, match="JSON"):
        emit({"ratio": float("nan")}, as_json=True)


# --- random_llava ---


def test_the_default_sizes_are_those_of_the_benchmark():
    backbone = random_llava()
    counts = parameter_counts(backbone.model)
    assert counts["total"] == sum(p.numel() for p in backbone.model.parameters())
    assert counts["total"] == pytest.approx(100e6, rel=0.03)
    assert backbone.model.config.text_config.vocab_size == 32_064
    assert counts["embedding"] == counts["lm_head"] == 32_064 * 768
    (sample,) = portrait_questions(1, 1)
    ids = processor_inputs(backbone, [sample.query])["input_ids"]
    assert int((ids == backbone.processor.image_token_id).sum()) == 576


def test_parameters_choose_the_number_of_layers(small_llava):
    assert small_llava.model.config.text_config.num_hidden_layers == 1
    larger = random_llava(image_tokens=16, vocabulary=2000, parameters=31_000_000)
    assert parameter_counts(larger.model)["total"] == pytest.approx(31e6, rel=0.1)


def test_weights_depend_on_the_seed_only(small_llava):
    torch.rand(3)
    again = random_llava(image_tokens=16, vocabulary=2000, parameters=1).model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in small_llava.model.state_dict().items())
    other = random_llava(image_tokens=16, vocabulary=2000, parameters=1, seed=1)
    assert not torch.equal(other.model.lm_head.weight, small_llava.model.lm_head.weight)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"image_tokens": 500}, "image_tokens"), ({"vocabulary": 10}, "vocabulary")],
)
def test_impossible_sizes_are_one_sentence(settings, field):
    with pytest.raises(InputError, match=field):
        random_llava(**settings)


def test_questions_share_their_portrait_and_are_as_long_as_the_benchmarks(small_llava):
    found = portrait_questions(portraits=2, seed=3)
    assert len(found) == 14
    assert len({sample.query.id for sample in found}) == 14
    assert all(s.query.image is found[0].query.image for s in found[:7])
    assert found[7].query.image.tobytes() != found[0].query.image.tobytes()
    assert found[0].query.image.size == (336, 336)
    tokenizer = small_llava.processor.tokenizer
    asked = [len(tokenizer(s.query.text)["input_ids"]) for s in found]
    answered = [len(response_ids(small_llava, s.answer)) for s in found]
    assert all(20 <= n <= 35 for n in asked)
    assert all(15 <= n <= 25 for n in answered)
    again = portrait_questions(portraits=2, seed=3)
    assert [(s.query.text, s.answer) for s in again] == [(s.query.text, s.answer) for s in found]
    assert again[7].query.image.tobytes() == found[7].query.image.tobytes()


# --- released_step ---


def test_kl_is_summed_over_all_positions_and_divided_by_the_batch_only():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 7, generator=generator)
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 3
    assert all_positions_kl(teacher, student).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_pair_of_batches_takes_two_optimizer_steps(small_llava, samples, monkeypatch):
    trainer = released(small_llava, batch_size=2)
    steps: list[int] = []
    step = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda: steps.append(1) or step())
    losses = trainer.step(samples[:4], samples[2:])
    assert len(losses) == 2  # 4 questions in batches of 2
    assert len(steps) == 4


def test_unequal_numbers_of_batches_are_refused(small_llava, samples):
    with pytest.raises(ValueError, match="argument 2"):
        released(small_llava, batch_size=2).step(samples[:4], samples[:2])


def test_the_teacher_is_a_second_model_that_never_changes(small_llava, samples):
    trainer = released(small_llava)
    before = copy.deepcopy(trainer.teacher.state_dict())
    base = [p for p in trainer.student.parameters() if not p.requires_grad]
    storages = {p.data_ptr() for p in trainer.teacher.parameters()}
    assert storages.isdisjoint(p.data_ptr() for p in base)
    adapter = adapter_of(trainer)
    trainer.step(samples[:3], samples[3:])
    assert all(torch.equal(v, before[k]) for k, v in trainer.teacher.state_dict().items())
    changed = [not torch.equal(a, b) for a, b in zip(adapter, adapter_of(trainer), strict=True)]
    assert all(changed)


def test_only_the_language_model_is_trained(small_llava):
    trainer = released(small_llava)
    trained = [name for name, p in trainer.student.named_parameters() if p.requires_grad]
    assert len(trained) == 7 * 2
    assert all("language_model" in name and "lora_" in name for name in trained)
    assert {p.shape[0] for name, p in trainer.student.named_parameters() if "lora_A" in name} == {
        16
    }


def test_each_question_is_a_sequence_with_its_own_image_and_full_logits(small_llava, samples):
    trainer = released(small_llava)
    seen: dict[str, list] = {"teacher": [], "student": []}
    for name, model in (("teacher", trainer.teacher), ("student", trainer.backbone.model)):
        model.register_forward_hook(
            lambda _, args, kwargs, output, name=name: seen[name].append(
                (kwargs["pixel_values"], kwargs["input_ids"].shape, output.logits.shape)
            ),
            with_kwargs=True,
        )
    trainer.step(samples[:3], samples[3:])
    (_, length), vocabulary = seen["student"][0][1], 2000
    for name in ("teacher", "student"):
        assert len(seen[name]) == 2
        for pixels, shape, logits in seen[name]:
            assert pixels.shape[0] == shape[0] == 3
            assert logits == (*shape, vocabulary)
    assert length > 16 + 20
    noise, image = seen["teacher"][0][0], seen["student"][0][0]
    assert noise.min() >= 0 and noise.max() < 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.02)
    assert image.min() < 0
    assert torch.equal(seen["teacher"][1][0], seen["student"][1][0])  # retain: the image itself


def test_noise_is_redrawn_for_each_batch(small_llava, samples):
    trainer = released(small_llava, batch_size=3)
    noises = []
    trainer.teacher.register_forward_pre_hook(
        lambda _, args, kwargs: noises.append(kwargs["pixel_values"]), with_kwargs=True
    )
    trainer.step(samples[:3], samples[3:])
    trainer.step(samples[:3], samples[3:])
    assert not torch.equal(noises[0], noises[2])
    assert torch.equal(noises[1], noises[3])


def test_losses_are_reproducible_whatever_runs_in_between(small_llava, samples):
    found = []
    for seed in (0, 0, 1):
        trainer = released(small_llava, seed=seed)
        first = trainer.step(samples[:3], samples[3:])
        torch.rand(len(found) + 1)
        found.append(first + trainer.step(samples[:3], samples[3:]))
    assert found[0] == found[1] != found[2]
    assert all(pair.forget > 0 for pair in found[0])


def test_the_retain_loss_starts_at_dropouts_level_only_after_the_forget_step(small_llava, samples):
    idle = released(small_llava, learning_rate=0.0)  # B of LoRA is zero: student = teacher
    (pair,) = idle.step(samples[:3], samples[3:])
    assert abs(pair.retain) < 1e-3 < pair.forget
    (pair,) = released(small_llava).step(samples[:3], samples[3:])
    assert pair.retain > 1e-3  # the forget step came first


# --- one_at_a_time ---


def test_answers_equal_the_platforms_greedy_decoding(random_backbone):
    queries = [s.query for s in portrait_questions(2, 3, size=64)]
    queries.append(replace(queries[0], image=None))
    found = answers(random_backbone, queries, NEW_TOKENS)
    assert found == greedy_tokens(random_backbone, encode(random_backbone, queries), NEW_TOKENS)
    assert len(set(map(tuple, found))) > 3


def test_answers_of_the_benchmarks_llava_equal_greedy_decoding_without_a_cache(
    small_llava, samples
):
    model, processor = small_llava.model, small_llava.processor
    ends = model.generation_config.eos_token_id
    expected = []
    for sample in samples:
        inputs = processor_inputs(small_llava, [sample.query])
        tokens: list[int] = []
        for _ in range(NEW_TOKENS):
            ids = torch.cat([inputs["input_ids"], torch.tensor([tokens]).long()], dim=1)
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=inputs["pixel_values"],
                    use_cache=False,
                ).logits[0, -1]
            logits[processor.image_token_id] = -float("inf")
            token = int(logits.argmax())
            if token in ends:
                break
            tokens.append(token)
        expected.append(tokens)
    found = answers(small_llava, [s.query for s in samples], NEW_TOKENS)
    assert found == expected
    assert len(set(map(tuple, found))) > 3


def test_an_answer_ends_before_any_end_token(random_backbone):
    queries = [s.query for s in portrait_questions(2, 3, size=64)]
    whole = answers(random_backbone, queries, NEW_TOKENS)
    end = next(row[2] for row in whole if row[2] not in row[:2])
    settings = random_backbone.model.generation_config
    before = settings.eos_token_id
    settings.eos_token_id = [before, end]
    try:
        stopped = answers(random_backbone, queries, NEW_TOKENS)
    finally:
        settings.eos_token_id = before
    assert stopped == [row[: row.index(end)] if end in row else row for row in whole]


def test_processor_inputs_are_the_platforms_prompts(random_backbone):
    samples = portrait_questions(1, 3, size=64)
    inputs = processor_inputs(
        random_backbone, [s.query for s in samples], [s.answer for s in samples]
    )
    encoded = encode(random_backbone, [s.query for s in samples])
    for row, sample in enumerate(samples):
        length = int(inputs["attention_mask"][row].sum())
        expected = encoded[row].prompt_ids + response_ids(random_backbone, sample.answer)
        assert inputs["input_ids"][row, :length].tolist() == expected
        assert not inputs["attention_mask"][row, length:].any()


def test_option_logprobs_equal_the_platforms_scores(random_backbone):
    queries = [s.query for s in portrait_questions(2, 1, size=64)]
    options = [["Corsk", "the city of Velmar", "Ostrin"], ["a nurse", "a teacher"]]
    found = option_logprobs(random_backbone, queries, options)
    assert [len(row) for row in found] == [3, 2]
    for query, its_options, row in zip(queries, options, found, strict=True):
        encoded = encode(random_backbone, [query]) * len(its_options)
        responses = [response_ids(random_backbone, option) for option in its_options]
        scores = score_responses(random_backbone, encoded, responses)
        expected = [float(score.logprobs_R.double().sum()) for score in scores]
        assert row == pytest.approx(expected, abs=1e-3)
