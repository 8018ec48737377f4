import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rouge_score.rouge_scorer import RougeScorer

from vgid.backbones import QWEN_FRAME, Backbone, PromptFrame
from vgid.benchmark import Person, Question, split_questions
from vgid.config import RequestConfig
from vgid.decoding import greedy_tokens
from vgid.errors import InputError
from vgid.evaluation import (
    Evaluation,
    Examination,
    choose_few_shot,
    evaluate,
    few_shot_turns,
    prepare,
)
from vgid.fictitious import (
    classification_questions,
    cloze_questions,
    generation_questions,
    make_world,
    portrait,
)
from vgid.fictitious import test_portrait as transformed_portrait
from vgid.interventions import sample_generator
from vgid.prompts import REVERSE_PROMPT, UNLEARNING_INSTRUCTIONS
from vgid.splits import People
from vgid.teacher import Intervention

REQUEST = RequestConfig(
    data=Path("data"), store=Path("store"), bootstrap_samples=200, log_responses=True, seed=3
)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_person(index: int, config: str, poses: int = 1) -> Person:
    """A person of the synthetic benchmark, as it would be read from a config."""
    source = make_world(0).people[index]
    test = config == "Test_Set"
    rows = [("generation", *q, None) for q in generation_questions(source, test)]
    rows += [("cloze", *q, None) for q in cloze_questions(source, test)]
    rng = sample_generator(0, source.id)
    rows += [
        ("classification", text, letter, form, options)
        for text, options, letter, form in classification_questions(source, rng, test)
    ]
    questions = tuple(
        Question(f"{config}/{source.id}/{task}/{form}/{i}", source.id, task, form, text, answer, o)
        for i, (task, text, answer, form, o) in enumerate(rows)
    )
    draw = transformed_portrait if test else portrait
    images = tuple(png(draw(0, source, pose)) for pose in range(poses))
    return Person(source.id, images, questions)


def few_questions(person: Person) -> Person:
    """Only the first question of each task and form, so that few-shot prompts stay short."""
    kept: dict[tuple[str, str], Question] = {}
    for question in person.questions:
        kept.setdefault((question.task, question.form), question)
    return replace(person, questions=tuple(kept.values()))


@pytest.fixture(scope="module")
def people() -> People:
    return People(
        forget=tuple(make_person(i, "forget_5") for i in (0, 1)),
        test=tuple(make_person(i, "Test_Set", poses=2) for i in (0, 1)),
        retain_seen=(make_person(2, "retain_95"),),
        retain_unseen=tuple(make_person(i, "retain_95") for i in (3, 4)),
        retain_pool=(),
        few_shot=tuple(few_questions(make_person(i, "retain_95")) for i in range(5, 11)),
    )


@pytest.fixture(scope="module")
def examination(random_backbone: Backbone, people: People) -> Examination:
    return prepare(random_backbone, people, REQUEST, "search", seed=0)


@pytest.fixture(scope="module")
def evaluation(random_backbone: Backbone, examination: Examination) -> Evaluation:
    return evaluate(random_backbone, examination, REQUEST)


def benchmark_backbone(backbone: Backbone, frame: PromptFrame | None = None) -> Backbone:
    """The same model, asked as the benchmark asks a LLaVA 1.5: few-shot, letters."""
    spec = replace(
        backbone.spec,
        few_shot={"classification": 1, "cloze": 2},
        option_scoring="letter",
        frame=frame or backbone.spec.frame,
    )
    return replace(backbone, spec=spec)


def prompt_text(backbone: Backbone, examination: Examination, question_id: str) -> str:
    """The prompt as the model sees it, each run of image tokens written as one ``<image>``."""
    (item,) = (i for i in examination.items if i.question.id == question_id)
    tokenizer = backbone.processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert item.encoded.prompt_ids.count(image) % 16 == 0
    return tokenizer.decode(item.encoded.prompt_ids).replace("<image>" * 16, "<image>")


def first(examination: Examination, task: str, form: str, split: str = "forget") -> Question:
    return next(
        item.question
        for item in examination.items
        if (item.question.task, item.question.form, item.split) == (task, form, split)
    )


# ------------------------------------------------------------------------------------- questions


def test_parts_share_no_question_and_are_all_questions(random_backbone, people, examination):
    held_out = prepare(random_backbone, people, REQUEST, "held_out", seed=5)
    search_ids = {item.question.id for item in examination.items}
    held_out_ids = {item.question.id for item in held_out.items}
    everyone = people.forget + people.test + people.retain
    assert not search_ids & held_out_ids
    assert search_ids | held_out_ids == {q.id for p in everyone for q in p.questions}


def test_protocol_prompts(random_backbone, examination):
    question = first(examination, "generation", "image")
    assert prompt_text(random_backbone, examination, question.id) == (
        f"<s>USER: <image>\n{question.text}\nAnswer the question based on your trained knowledge "
        "in one sentence accurately in ENGLISH.\nASSISTANT:"
    )
    question = first(examination, "generation", "text")
    assert prompt_text(random_backbone, examination, question.id) == (
        f"<s>USER: {question.text}\nAnswer the question based on your trained knowledge in one "
        "sentence in ENGLISH.\nASSISTANT:"
    )
    question = first(examination, "cloze", "image")
    assert prompt_text(random_backbone, examination, question.id) == (
        f"<s>USER: <image>\n{question.text.replace('__', '[Blank]')}\nPlease **ONLY** provide the "
        "correct answer that should replace the [Blank].\nASSISTANT:"
    )
    question = first(examination, "classification", "image")
    assert prompt_text(random_backbone, examination, question.id) == (
        f"<s>USER: <image>\n{question.text}\nJust give the answer directly.\nASSISTANT:"
    )


def test_few_shot_prompts_are_the_benchmarks(random_backbone, people):
    backbone = benchmark_backbone(random_backbone)
    examination = prepare(backbone, people, REQUEST, "search", seed=0)
    by_id = {person.id: person for person in people.few_shot}

    def shots(task: str, form: str) -> list[Question]:
        return [
            q
            for person_id in examination.few_shot[task]
            for q in by_id[person_id].questions
            if (q.task, q.form) == (task, form)
        ]

    (shot,) = shots("classification", "image")
    question = first(examination, "classification", "image")
    assert prompt_text(backbone, examination, question.id) == (
        f"<s>USER: <image>\nQuestion: {shot.text}\nA: {shot.options['A']}\n"
        f"B: {shot.options['B']}\nC: {shot.options['C']}\nD: {shot.options['D']}\n"
        f"Correct Answer: {shot.answer}\n"
        f"USER: <image>\n{question.text}\nA: {question.options['A']}\nB: {question.options['B']}\n"
        f"C: {question.options['C']}\nD: {question.options['D']}\n"
        "Just give ONE letter representing the answer directly.\nASSISTANT:"
    )
    (shot,) = shots("classification", "text")
    question = first(examination, "classification", "text")
    assert prompt_text(backbone, examination, question.id).startswith(
        f"<s>USER:\nQuestion: {shot.text}\nA: {shot.options['A']}\n"
    )
    only = "\nPlease **ONLY** provide the correct answer that should replace the [Blank].\n"
    one, two = shots("cloze", "image")
    question = first(examination, "cloze", "image")
    assert prompt_text(backbone, examination, question.id) == (
        f"<s>USER:<image>\n{one.text.replace('__', '[Blank]')}{only}Correct Answer: {one.answer}\n"
        f"USER:<image>\n{two.text.replace('__', '[Blank]')}{only}Correct Answer: {two.answer}\n"
        f"USER: <image>\n{question.text.replace('__', '[Blank]')}{only}ASSISTANT:"
    )
    one, two = shots("cloze", "text")
    question = first(examination, "cloze", "text")
    assert prompt_text(backbone, examination, question.id).startswith(
        f"<s>USER:\n{one.text.replace('__', '[Blank]')}{only}Correct Answer: {one.answer}\nUSER:\n"
    )
    question = first(examination, "generation", "image")
    assert "Correct Answer" not in prompt_text(backbone, examination, question.id)


def test_few_shot_images_come_before_the_questions_own(random_backbone, people):
    backbone = benchmark_backbone(random_backbone)
    examination = prepare(backbone, people, REQUEST, "search", seed=0)
    question = first(examination, "cloze", "image")
    (item,) = (i for i in examination.items if i.question.id == question.id)
    by_id = {person.id: person for person in (*people.few_shot, *people.forget)}
    ids = [*examination.few_shot["cloze"], question.person_id]
    images = [Image.open(io.BytesIO(by_id[i].images[0])) for i in ids]
    expected = backbone.processor.image_processor(images=images, return_tensors="pt")
    assert torch.equal(item.encoded.vision["pixel_values"], expected["pixel_values"])


def test_a_shot_of_another_frame_is_a_completed_turn(random_backbone, people):
    backbone = benchmark_backbone(random_backbone, QWEN_FRAME)
    person = people.few_shot[0]
    (shot,) = few_shot_turns(backbone, [person], "cloze", "text")
    (question,) = (q for q in person.questions if (q.task, q.form) == ("cloze", "text"))
    assert shot.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{question.text.replace('__', '[Blank]')}\nPlease **ONLY** provide the correct answer "
        "that should replace the [Blank].<|im_end|>\n<|im_start|>assistant\n"
        f"{question.answer}</s>\n"
    )
    assert shot.image is None


def test_few_shot_people_are_seeded_recorded_and_nobody_scored(random_backbone, people):
    backbone = benchmark_backbone(random_backbone)
    chosen = {}
    for seed in range(4):
        examination = prepare(backbone, people, REQUEST, "search", seed=seed)
        assert examination.few_shot == prepare(backbone, people, REQUEST, "search", seed).few_shot
        assert [len(examination.few_shot[t]) for t in ("classification", "cloze")] == [1, 2]
        asked = {item.question.person_id for item in examination.items}
        for ids in examination.few_shot.values():
            assert not asked & set(ids)
        chosen[seed] = examination.few_shot
    assert len({str(value) for value in chosen.values()}) > 1


def test_few_shot_choice_does_not_depend_on_file_order(people):
    forwards = choose_few_shot(people.few_shot, "cloze", 2, 1, "data")
    backwards = choose_few_shot(people.few_shot[::-1], "cloze", 2, 1, "data")
    assert forwards == backwards


def test_too_few_few_shot_people_is_an_input_error(random_backbone, people):
    backbone = benchmark_backbone(random_backbone)
    alone = replace(people, few_shot=people.few_shot[:1])
    with pytest.raises(InputError, match=r"^data: 1 of the 2 .* lower retain_people\.$"):
        prepare(backbone, alone, REQUEST, "search", seed=0)
    short = replace(people.few_shot[0], questions=())
    with pytest.raises(InputError, match="0 of the 1"):
        choose_few_shot([short], "cloze", 1, 0, "data")


def test_option_likelihood_needs_no_few_shot_people(random_backbone, people):
    backbone = benchmark_backbone(random_backbone)
    examination = prepare(backbone, people, REQUEST, "search", seed=0, option_scoring="likelihood")
    assert set(examination.few_shot) == {"cloze"}


def test_instruction_and_reverse_prompt_frame_the_question(random_backbone, people):
    examination = prepare(
        random_backbone,
        people,
        REQUEST,
        "search",
        seed=0,
        intervention=Intervention(style="polite"),
        reverse=True,
    )
    question = first(examination, "generation", "image")
    assert prompt_text(random_backbone, examination, question.id) == (
        f"<s>USER: <image>\n{UNLEARNING_INSTRUCTIONS['polite']}\n{question.text}\nAnswer the "
        "question based on your trained knowledge in one sentence accurately in ENGLISH.\n"
        f"{REVERSE_PROMPT}\nASSISTANT:"
    )


def test_noise_reaches_the_model_seeded_per_image(random_backbone, people, examination):
    def pixels(noise: Intervention) -> dict[str, torch.Tensor]:
        noisy = prepare(random_backbone, people, REQUEST, "search", seed=0, intervention=noise)
        return {
            i.question.id: i.encoded.vision["pixel_values"]
            for i in noisy.items
            if i.question.form == "image"
        }

    white = pixels(Intervention(noise_type="white"))
    assert all(torch.equal(p, torch.full_like(p, p.max())) for p in white.values())
    noise = pixels(Intervention(noise_type="random", seed=1))
    again = pixels(Intervention(noise_type="random", seed=1))
    other = pixels(Intervention(noise_type="random", seed=2))
    assert all(torch.equal(noise[i], again[i]) for i in noise)
    assert not any(torch.equal(noise[i], other[i]) for i in noise)
    plain = pixels(Intervention())
    for one, two in itertools.combinations(noise, 2):
        assert torch.equal(noise[one], noise[two]) == torch.equal(plain[one], plain[two])


def test_test_questions_use_all_poses_by_seed(random_backbone, people, examination):
    def pictures(exam: Examination) -> list[bytes]:
        return [
            item.encoded.vision["pixel_values"].numpy().tobytes()
            for item in exam.items
            if item.split == "test"
            and item.question.form == "image"
            and item.question.person_id == people.test[0].id
        ]

    other = prepare(random_backbone, people, REQUEST, "search", seed=1)
    assert len(set(pictures(examination))) == 2
    assert pictures(examination) != pictures(other)
    assert sorted(set(pictures(examination))) == sorted(set(pictures(other)))


def test_celebrities_are_asked_everything(random_backbone, people):
    celebrity = make_person(110, "Retain_Set")
    few = replace(people, forget=people.forget[:1], test=(), retain_seen=(), retain_unseen=())
    examination = prepare(random_backbone, few, REQUEST, "search", seed=0, celebrities=(celebrity,))
    asked = [i.question for i in examination.items if i.split == "celebrity"]
    assert tuple(asked) == celebrity.questions


def test_an_unreadable_image_is_an_input_error(random_backbone, people):
    torn = replace(people.forget[0], images=(b"not an image",))
    with pytest.raises(InputError, match=f"person {torn.id}"):
        prepare(random_backbone, replace(people, forget=(torn,)), REQUEST, "search", seed=0)


# ---------------------------------------------------------------------------------------- scores


def test_names_and_counts_of_the_scores(people, evaluation):
    metrics = ["bleu", "cloze", "classification", "refusal", "gibberish"]
    metrics += [f"rouge{k}{end}" for k in "12L" for end in ("", "_recall")]
    splits = ["forget", "test", "retain", "retain_seen", "retain_unseen"]
    names = {
        f"{split}_{metric}{end}" for split in splits for metric in metrics for end in ("", "_text")
    }
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
    assert scores["forget_memorisation_text"].n == count(people.forget, "generation", "text")
    assert scores["test_cloze"].n == count(people.test, "cloze", "image")
    assert scores["retain_seen_bleu"].n == count(people.retain_seen, "generation", "image")
    assert scores["retain_classification_text"].n == count(people.retain, "classification", "text")
    assert evaluation.option_scoring == "likelihood"
    assert evaluation.few_shot == {}


def test_rouge_and_cloze_follow_from_the_responses(evaluation):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    by_task: dict[str, list[float]] = {"generation": [], "cloze": []}
    for row in evaluation.responses:
        _, _, task, form, _ = row.question_id.split("/")
        if row.split != "test" or form != "image":
            continue
        if task == "generation":
            score = scorer.score(row.answer, row.response)["rougeL"].fmeasure
            by_task[task].append(score)
        elif task == "cloze":
            by_task[task].append(row.answer.lower() in row.response.lower())
    assert evaluation.scores["test_rougeL"].value == pytest.approx(np.mean(by_task["generation"]))
    assert evaluation.scores["test_cloze"].value == pytest.approx(np.mean(by_task["cloze"]))


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
        if item.split == "forget" and item.question.task == "generation":
            assert item.answer == tokens_of(random_backbone, item.question.answer)
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
        items.append(replace(item, answer=answer))
    result = evaluate(random_backbone, replace(examination, items=tuple(items)), REQUEST)
    score = result.scores["forget_memorisation"]
    assert len(set(shares)) > 2
    assert score.n == len(shares)
    assert score.value == pytest.approx(np.mean(shares))


def test_letter_scoring_takes_the_first_character(random_backbone, people):
    few = replace(people, test=(), retain_seen=(), retain_unseen=())
    examination = prepare(random_backbone, few, REQUEST, "search", seed=0, option_scoring="letter")
    result = evaluate(random_backbone, examination, REQUEST)
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
