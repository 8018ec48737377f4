import io
import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.examined_people import (
    REQUEST,
    benchmark_backbone,
    few_people,
    first,
    make_person,
    prompt_text,
)
from vgid.backbones import QWEN_FRAME, Backbone
from vgid.benchmark import Question
from vgid.errors import InputError
from vgid.examination import (
    Examination,
    choose_few_shot,
    few_shot_turns,
    prepare,
)
from vgid.prompts import REVERSE_PROMPT, UNLEARNING_INSTRUCTIONS
from vgid.splits import People
from vgid.teacher import Intervention


@pytest.fixture(scope="module")
def people() -> People:
    return few_people()


@pytest.fixture(scope="module")
def examination(random_backbone: Backbone, people: People) -> Examination:
    return prepare(random_backbone, people, REQUEST, "search", seed=0)


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
