import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from tests.examined_people import (
    REQUEST,
    benchmark_backbone,
    few_people,
)
from vgid.data.benchmark import Person, split_questions
from vgid.data.fictitious import (
    make_world,
)
from vgid.data.splits import People
from vgid.evaluation.evaluate import Evaluation, Scorer, evaluate
from vgid.evaluation.questions import Examination, prepare
from vgid.models.backbones import Backbone
from vgid.models.decoding import greedy_tokens


@pytest.fixture(scope="module")
def people() -> People:
    return few_people()


@pytest.fixture(scope="module")
def examination(random_backbone: Backbone, people: People) -> Examination:
    return prepare(random_backbone, people, REQUEST, "search", seed=0)


@pytest.fixture(scope="module")
def evaluation(random_backbone: Backbone, examination: Examination) -> Evaluation:
    return evaluate(random_backbone, examination, REQUEST)


def test_names_and_counts_of_the_scores(people, evaluation):
    metrics = ["bleu", "cloze", "classification", "refusal", "gibberish"]
    metrics += [f"rouge{k}{end}" for k in "12L" for end in ("", "_recall")]
    splits = ["forget", "test", "retain", "retain_seen", "retain_unseen"]
    names = {
        f"{split}_{metric}{end}" for split in splits for metric in metrics for end in ("", "_text")
    }
    asked_open = [m for m in metrics if not m.startswith("cl")]
    names |= {f"{split}_{metric}_raw" for split in splits for metric in asked_open}
    names |= {"forget_memorisation", "forget_memorisation_text"}
    assert set(evaluation.scores) == names

    def count(members: tuple[Person, ...], task: str, form: str) -> int:
        return sum(
            (q.task, q.form) == (task, form)
            for p in members
            for q in split_questions(p, "search", REQUEST.seed)
        )

    scores = evaluation.scores
    assert scores["forget_rougeL"].n == count(people.forget, "generation", "image")
    assert scores["retain_refusal_raw"].n == count(people.retain, "generation", "image")
    assert scores["forget_memorisation_text"].n == count(people.forget, "generation", "text")
    assert scores["test_cloze"].n == count(people.test, "cloze", "image")
    assert scores["retain_seen_bleu"].n == count(people.retain_seen, "generation", "image")
    assert scores["retain_classification_text"].n == count(people.retain, "classification", "text")
    assert evaluation.option_scoring == "likelihood"
    assert evaluation.few_shot == {}


def test_rouge_and_cloze_follow_from_the_responses(evaluation):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    by_task: dict[str, list[float]] = {"generation": [], "cloze": [], "raw": []}
    for row in evaluation.responses:
        _, _, task, form, _ = row.question_id.split("/")
        if row.split != "test" or form != "image":
            continue
        if task == "generation":
            score = scorer.score(row.answer, row.response)["rougeL"].fmeasure
            by_task["raw" if row.wording == "raw" else task].append(score)
        elif task == "cloze":
            by_task[task].append(row.answer.lower() in row.response.lower())
    assert evaluation.scores["test_rougeL"].value == pytest.approx(np.mean(by_task["generation"]))
    assert evaluation.scores["test_cloze"].value == pytest.approx(np.mean(by_task["cloze"]))
    assert evaluation.scores["test_rougeL_raw"].value == pytest.approx(np.mean(by_task["raw"]))
    assert by_task["raw"] != by_task["generation"]


def test_retain_is_seen_and_unseen_together(evaluation):
    for metric in ("rougeL", "cloze", "classification", "bleu_text"):
        whole, seen, unseen = (
            evaluation.scores[f"{split}_{metric}"]
            for split in ("retain", "retain_seen", "retain_unseen")
        )
        assert whole.n == seen.n + unseen.n
        assert whole.value == pytest.approx(
            (seen.value * seen.n + unseen.value * unseen.n) / whole.n
        )


@torch.no_grad()
def full_logits(backbone: Backbone, prompt: list[int], vision: dict, response: list[int]):
    ids = torch.tensor([prompt + response])
    logits = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), **vision).logits[0]
    return logits[len(prompt) - 1 : -1]


def tokens_of(backbone: Backbone, text: str) -> list[int]:
    """Tokens of `` text`` behind the frame, told without the function under test."""
    tokenizer = backbone.processor.tokenizer
    return tokenizer(f" {text}", add_special_tokens=False)["input_ids"]


def test_options_are_ranked_as_a_loop_over_full_logits_ranks_them(
    random_backbone, examination, evaluation
):
    responses = {row.question_id: row.response for row in evaluation.responses}
    end = random_backbone.processor.tokenizer.eos_token_id
    asked = [i for i in examination.items if i.question.task == "classification"][::3]
    letters = []
    for item in asked:
        likelihood = {}
        for letter, option in item.question.options.items():
            response = [*tokens_of(random_backbone, option), end]
            logits = full_logits(
                random_backbone, item.encoded.prompt_ids, item.encoded.vision, response
            )
            chosen = logits.log_softmax(-1)[range(len(response)), response]
            likelihood[letter] = chosen.double().sum().item()
        letters.append(max(likelihood, key=likelihood.__getitem__))
    assert letters == [responses[item.question.id] for item in asked]
    assert len(set(letters)) > 1


def test_memorisation_is_asked_of_the_forget_peoples_answers(random_backbone, examination):
    for item in examination.items:
        if (item.split, item.question.task, item.wording) == ("forget", "generation", "wrapped"):
            assert item.answer is not None
            assert item.answer[0].prompt_ids == item.encoded.prompt_ids  # one turn for both here
            assert item.answer[1] == tokens_of(random_backbone, item.question.answer)
        else:
            assert item.answer is None


def test_memorisation_is_the_share_of_answer_tokens_that_full_logits_put_first(
    random_backbone, examination
):
    # Random weights know no true answer; their own answers with some tokens changed stand in.
    asked = [i for i in examination.items if i.answer is not None and i.question.form == "image"]
    own = greedy_tokens(random_backbone, [item.encoded for item in asked], max_new_tokens=8)
    items, shares = [], []
    for number, (item, answer) in enumerate(zip(asked, own, strict=True)):
        for place in range(number % 4):
            answer[2 * place + 1] = 7 + place
        logits = full_logits(random_backbone, item.encoded.prompt_ids, item.encoded.vision, answer)
        shares.append((logits.argmax(-1) == torch.tensor(answer)).double().mean().item())
        items.append(replace(item, answer=(item.encoded, answer)))
    result = evaluate(random_backbone, replace(examination, items=tuple(items)), REQUEST)
    score = result.scores["forget_memorisation"]
    assert len(set(shares)) > 2
    assert score.n == len(shares)
    assert score.value == pytest.approx(np.mean(shares))


def test_letter_scoring_takes_the_first_character(random_backbone, people):
    few = replace(people, test=(), retain_seen=(), retain_unseen=())
    spec = replace(random_backbone.spec, option_scoring="letter")
    backbone = replace(random_backbone, spec=spec)
    examination = prepare(backbone, few, REQUEST, "search", seed=0)
    result = evaluate(backbone, examination, REQUEST)
    assert result.option_scoring == "letter"
    rows = [r for r in result.responses if "/classification/image/" in r.question_id]
    right = [r.response.strip()[:1].upper() == r.answer for r in rows]
    assert result.scores["forget_classification"].value == pytest.approx(np.mean(right))


def test_few_shot_people_are_in_the_result(random_backbone, people):
    backbone = benchmark_backbone(random_backbone)
    few = replace(
        people,
        forget=people.few_shot[:1],
        test=(),
        retain_seen=(),
        retain_unseen=(),
        few_shot=people.few_shot[1:],
    )
    examination = prepare(backbone, few, REQUEST, "search", seed=0)
    result = evaluate(backbone, examination, REQUEST)
    assert result.few_shot == examination.few_shot
    assert set(result.few_shot) == {"classification", "cloze"}


def test_evaluations_repeat_bit_for_bit(random_backbone, examination, evaluation):
    again = evaluate(random_backbone, examination, REQUEST)
    assert again == evaluation
    request = REQUEST.model_copy(update={"eval_batch_size": 7})
    assert evaluate(random_backbone, examination, request).responses == evaluation.responses


def test_scores_hold_no_text(random_backbone, people, examination, evaluation):
    private = evaluate(
        random_backbone, examination, REQUEST.model_copy(update={"log_responses": False})
    )
    assert private.responses is None
    assert private.scores == evaluation.scores
    shown = json.dumps({n: s.model_dump() for n, s in evaluation.scores.items()})
    shown += repr(evaluation) + repr(examination)
    for row in evaluation.responses:
        for text in (row.question, row.response):
            assert len(text) < 4 or text not in shown
    for person in people.forget + people.test + people.retain:
        source = next(p for p in make_world(0).people if p.id == person.id)
        for value in source.facts.values():
            assert value not in shown


@pytest.mark.parametrize(
    "asked",
    [
        {"forget_rougeL", "retain_rougeL"},
        {"retain_unseen_cloze_text", "test_refusal_raw"},
        {"forget_memorisation"},
        {"forget_memorisation_text", "forget_bleu"},
    ],
)
def test_a_few_scores_alone_are_those_of_the_whole_evaluation(
    random_backbone, people, examination, evaluation, asked
):
    scorer = Scorer(random_backbone, "", people, REQUEST)
    few = scorer.evaluate("search", 0, only=frozenset(asked))
    assert asked <= few.scores.keys()
    assert {name: evaluation.scores[name] for name in few.scores} == few.scores
    # No question is asked that none of them is made of.
    questions = {(r.split, r.question_id, r.wording) for r in few.responses}
    assert len(questions) == len(few.responses) <= sum(few.scores[name].n for name in asked) + 2
    assert 0 < len(few.responses) < len(examination.items)
