"""The benchmarks on models of a few thousand weights: what they report is well formed and counted
on the project's own code. How fast anything is, they do not assert."""

import json
from dataclasses import replace

import pytest
import torch

from tests.benchmarks import evaluate, flops, machine, memory, step, trial
from vgid.method.teacher import Intervention, intervene
from vgid.models.backbones import Backbone
from vgid.models.encoding import Query, encode, response_ids
from vgid.models.packing import hidden_states, pack

SMALL = {"image_tokens": 16, "vocabulary": 2000, "parameters": 1}
HEADLINE = {"ratio", "low", "high", "n", "target", "met"}


def assert_headline(found, rounds):
    assert found.keys() >= HEADLINE
    assert found["n"] == rounds
    assert found["low"] <= found["ratio"] <= found["high"]
    json.dumps(found, allow_nan=False)


@pytest.fixture
def small() -> step.Workload:
    return step.large_workload(questions_each=3, size=64, **SMALL)


# --- what they share ---


def test_calls_run_in_turns_after_a_warm_up():
    calls: list[str] = []
    seconds = machine.in_turns(*(lambda n=n: calls.append(n) for n in "abc"), rounds=2)
    assert calls == ["a", "b", "c"] * 3
    assert [len(rounds) for rounds in seconds] == [2, 2, 2]


def test_a_target_is_a_bound_from_below_or_above():
    assert machine.ratio_fields([7.0, 8.0, 9.0], 8.0)["met"]
    assert not machine.ratio_fields([7.0, 7.9, 9.0], 8.0)["met"]
    assert machine.ratio_fields([0.3, 0.4, 0.5], 0.4, at_most=True)["met"]
    assert not machine.ratio_fields([0.3, 0.41, 0.5], 0.4, at_most=True)["met"]


def test_the_last_model_gives_the_headline():
    each = {name: machine.ratio_fields([ratio], 2.0) for name, ratio in (("a", 1.0), ("b", 3.0))}
    found = machine.headline("step", each)
    assert (found["benchmark"], found["of"], found["ratio"], found["met"]) == ("step", "b", 3, True)
    assert found["a"]["ratio"] == 1.0


@pytest.mark.parametrize("wrong", [["--rounds", "4"], ["--rounds", "x"], ["--on", "7b"]])
def test_a_wrong_command_line_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        machine.arguments("what it measures").parse_args(wrong)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_json_is_the_last_line_and_names_the_machine(capsys):
    machine.report({"ratio": 2.0, "met": True}, as_json=True)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"ratio": 2.0, "met": True, "machine": machine.machine()}
    assert "torch threads" in lines[-2]
    machine.report({"ratio": 2.0}, as_json=False)
    assert "{" not in capsys.readouterr().out


# --- step ---


def test_step_times_both_ways_on_the_same_questions(small):
    found = step.measure(small, rounds=2)
    assert_headline(found, rounds=2)
    assert found["questions"] == 6
    # Whoever counts the teacher in gets a smaller ratio, and its own decoding costs more still.
    assert found["with_mixed_teacher"][0] < found["with_teacher"][0] < found["ratio"]
    assert 0 < found["fill_s"] < found["fill_mixed_s"]
    assert found["ours_questions_per_s"] > 0 < found["theirs_questions_per_s"]


def test_our_step_trains_towards_the_teacher_of_the_paper(small, tmp_path):
    """The first loss against plain forward passes, one question a sequence, logits everywhere."""
    backbone = small.backbone
    expected = []
    for samples, teacher in (
        (small.forget, Intervention("random", None, "strict")),
        (small.retain, Intervention()),
    ):
        total, count = 0.0, 0
        seen = intervene(backbone, [s.query for s in samples], teacher)
        for sample, query in zip(samples, seen, strict=True):
            rows = [logprobs(backbone, q, sample.answer) for q in (query, sample.query)]
            total += float((rows[0].exp() * (rows[0] - rows[1])).sum())
            count += len(rows[0])
        expected.append(total / count)
    sets = step.fill(small, tmp_path)
    with step.our_steps(small, sets, lora_dropout=0.0) as take:
        first, second = take(), take()
    losses = first.metrics["forget_loss"], first.metrics["retain_loss"]
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert second.metrics["forget_loss"] < losses[0]
    assert second.step == 2


@torch.no_grad()
def logprobs(backbone: Backbone, query: Query, answer: str) -> torch.Tensor:
    inputs = evaluate.one_at_a_time.processor_inputs(backbone, [query], [answer])
    size = len(response_ids(backbone, answer))
    return backbone.model(**inputs).logits[0, -size - 1 : -1].double().log_softmax(-1)


def test_a_filled_store_is_not_filled_again(small, tmp_path):
    first, _ = step.fill(small, tmp_path)
    files = {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")}
    again, _ = step.fill(small.copy(), tmp_path)
    assert files == {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")}
    for a, b in zip(first.targets[0], again.targets[0], strict=True):
        assert a.response == b.response
        assert torch.equal(a.hidden_RD, b.hidden_RD)


# --- evaluate ---


@pytest.fixture(scope="module")
def asked() -> evaluate.Questions:
    found = evaluate.large_questions(portraits=1, size=64, end_spacing=20, **SMALL)
    assert len(found.spoken) == 33
    assert sum(query.image is not None for query in found.spoken) == 21
    spoken, ranked = found.spoken[:4], found.spoken[4:7]
    return replace(found, spoken=spoken, ranked=ranked, options=[["Corsk", "a nurse"]] * 3)


def test_evaluate_gives_the_same_answers_both_ways(asked):
    found = evaluate.measure(asked, rounds=2)
    assert_headline(found, rounds=2)
    assert found["questions"] == 7
    assert found["differing"] == 0
    assert found["tokens"] > 10
    prompts = [prompt.identity for prompt in encode(asked.backbone, asked.spoken)]
    distinct = {tuple(ids[: n + 1]) for ids in prompts for n in range(len(ids))}
    assert found["prompt_tokens"] == [sum(map(len, prompts)), len(distinct)]


def test_an_answer_that_differs_is_an_error_unless_nearly_tied(asked, monkeypatch):
    right = evaluate.ours(asked)
    changed = [list(answer) for answer in right.answers]
    changed[3][1] += 1
    wrong = replace(right, answers=changed)
    with pytest.raises(ValueError, match=rf"{asked.spoken[3].id}.*no near tie"):
        evaluate.differing(asked, wrong, right)
    monkeypatch.setattr(evaluate, "NEAR_TIE", float("inf"))
    assert evaluate.differing(asked, wrong, right) == 1
    assert evaluate.differing(asked, right, right) == 0


def test_another_choice_of_option_is_an_error_unless_nearly_tied(asked):
    right = evaluate.ours(asked)
    far = replace(right, logprobs=[row[::-1] for row in right.logprobs])
    with pytest.raises(ValueError, match="no near tie"):
        evaluate.differing(asked, far, right)
    tied = [replace(right, logprobs=[[-1.0, -1.0 + x]] * 3) for x in (1e-5, -1e-5)]
    assert evaluate.differing(asked, *tied) == 3


def test_the_gap_of_two_answers_is_that_of_the_first_token_that_differs(asked):
    backbone, query = asked.backbone, asked.spoken[0]
    answer = evaluate.ours(asked).answers[0]
    (prompt,) = encode(backbone, [query])
    packed = pack(backbone, [prompt], [answer[:3]])
    with torch.no_grad():
        logits = backbone.model.lm_head(hidden_states(backbone, packed)[packed.last_places])[0]
    other = [*answer[:3], 17, *answer[4:]]
    expected = abs(float(logits[answer[3]] - logits[17]))
    assert evaluate.answer_gap(backbone, query, answer, other) == pytest.approx(expected, abs=1e-4)
    ends = backbone.model.generation_config.eos_token_id
    expected = abs(float(logits[answer[3]] - logits[ends].max()))
    found = evaluate.answer_gap(backbone, query, answer, answer[:3])
    assert found == pytest.approx(expected, abs=1e-4)


# --- memory, trial, flops ---


def test_memory_counts_the_second_model_as_theirs():
    found = memory.measure(1, (), questions_each=2, size=64, **SMALL)
    assert_headline(found, rounds=1)
    weights = step.large_workload(questions_each=2, size=64, **SMALL).backbone.model
    size = sum(p.numel() * p.element_size() for p in weights.parameters())
    assert found["second_model_mib"] == pytest.approx(size / 2**20)
    assert found["theirs_mib"] >= found["second_model_mib"]
    assert found["ratio"] == pytest.approx(found["ours_mib"] / found["theirs_mib"])


def test_trial_times_every_phase_of_two_trials_in_a_fresh_process():
    found = trial.measure(
        1, request={"retain_people": 2}, trial={"epochs": 1, "train_tasks": ["cloze"]}
    )
    assert_headline(found, rounds=1)
    for number in ("first", "second"):
        seconds = {phase: values[0] for phase, values in found[number].items()}
        assert seconds.keys() == {*trial.PHASES, "total"}
        assert seconds["total"] == pytest.approx(sum(seconds[phase] for phase in trial.PHASES))
        assert all(seconds[phase] > 0 for phase in ("teacher", "train", "evaluate", "save", "log"))
    assert found["first"]["start-up"][0] > 0 == found["second"]["start-up"][0]
    assert found["ratio"] == pytest.approx(found["first"]["total"][0] / found["second"]["total"][0])


def test_flops_of_products_and_of_attention_are_counted():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert sum(flops.counted(lambda: a @ b).values()) == 2 * 3 * 5 * 7
    query, key, value = torch.ones(3, 1, 2, 11, 8, requires_grad=True)
    seen = torch.ones(11, 11, dtype=torch.bool).tril()

    def attend() -> None:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)
        attended.sum().backward()

    product = 2 * 2 * 11 * 11 * 8  # heads, pairs, width
    found = flops.counted(attend)
    assert flops.attention(found) == sum(found.values()) == (2 + 5) * product


def test_a_step_counts_at_least_the_minimum(small):
    found = flops.measure(small)
    assert_headline(found, rounds=1)
    parts = ("linear", "attention", "head", "lora")
    assert found["minimum_gflop"] == pytest.approx(
        sum(found[f"minimum_{part}_gflop"] for part in parts)
    )
    assert found["counted_attention_gflop"] > 0
    assert all(n <= row for n, row in zip(found["tokens"], found["row_tokens"], strict=True))
