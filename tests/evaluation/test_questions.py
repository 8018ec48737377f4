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
from vgid.data.benchmark import Question
from vgid.data.splits import People
from vgid.errors import InputError
from vgid.evaluation.evaluate import evaluate
from vgid.evaluation.questions import (
    Examination,
    choose_few_shot,
    few_shot_turns,
    prepare,
)
from vgid.method.teacher import Intervention
from vgid.models.backbones import LLAVA_FRAME, QWEN_FRAME, TINY_LLAVA_FRAME, Backbone
from vgid.models.encoding import Query, encode
from vgid.prompts import REVERSE_PROMPT, UNLEARNING_INSTRUCTIONS
from vgid.results import Score


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


def test_generation_questions_on_an_image_are_asked_raw_too(random_backbone, people, examination):
    raw = {(i.split, i.question.id): i for i in examination.items if i.wording == "raw"}
    wrapped = {
        (i.split, i.question.id): i
        for i in examination.items
        if i.wording == "wrapped" and (i.question.task, i.question.form) == ("generation", "image")
    }
    assert raw.keys() == wrapped.keys()
    assert {split for split, _ in raw} == {"forget", "test", "retain_seen", "retain_unseen"}
    for key, item in raw.items():
        # The same picture, and all but the instructions of the same prompt, so little is run anew.
        assert [p.key for p in item.encoded.pictures] == [
            p.key for p in wrapped[key].encoded.pictures
        ]
        assert item.answer is None
    question = first(examination, "generation", "image")
    assert prompt_text(random_backbone, examination, question.id, "raw") == (
        f"<s>USER: <image>\n{question.text}\nASSISTANT:"
    )
    reversed_ = prepare(random_backbone, people, REQUEST, "search", seed=0, reverse=True)
    assert prompt_text(random_backbone, reversed_, question.id, "raw") == (
        f"<s>USER: <image>\n{question.text}\n{REVERSE_PROMPT}\nASSISTANT:"
    )
    # The public fine-tuning's prompt, whatever turn the evaluation asks the task in.
    backbone = benchmark_backbone(random_backbone, LLAVA_FRAME)
    asked = prepare(backbone, people, REQUEST, "search", seed=0)
    assert prompt_text(backbone, asked, question.id, "raw") == (
        f"<s>USER: <image>\n{question.text}\nASSISTANT:"
    )


def test_the_benchmarks_own_prompts_to_the_character(random_backbone, people):
    backbone = benchmark_backbone(random_backbone, LLAVA_FRAME)
    examination = prepare(backbone, people, REQUEST, "search", seed=0)
    by_id = {person.id: person for person in people.few_shot}

    def shots(task: str, form: str) -> list[Question]:
        return [
            q
            for person_id in examination.few_shot[task]
            for q in by_id[person_id].questions
            if (q.task, q.form) == (task, form)
        ]

    def shown(task: str, form: str) -> tuple[Question, str]:
        question = first(examination, task, form)
        return question, prompt_text(backbone, examination, question.id)

    def lettered(q: Question) -> str:
        assert q.options is not None
        options = "\n".join(f"{letter}: {q.options[letter]}" for letter in "ABCD")
        return f"{q.text}\n{options}"

    knowledge = "Answer the question based on your trained knowledge in one sentence"
    question, prompt = shown("generation", "image")
    assert prompt == (
        f"<s>USER: <image>\n{question.text}\n{knowledge} accurately in ENGLISH.\nASSISTANT: "
    )
    question, prompt = shown("generation", "text")
    assert prompt == f"<s>USER: {question.text}\n{knowledge} in ENGLISH.\nASSISTANT:"
    only = "\nPlease **ONLY** provide the correct answer that should replace the [Blank].\n"
    letter = "\nJust give ONE letter representing the answer directly.\n"
    for form, cloze, classification in (
        ("image", "USER:<image>\n", "USER: <image>\n"),
        ("text", "USER:\n", "USER:\n"),
    ):
        own = "USER: <image>\n" if form == "image" else "USER:\n"
        one, two = shots("cloze", form)
        question, prompt = shown("cloze", form)
        assert "__" in question.text
        assert prompt == (
            f"<s>{cloze}{one.text.replace('__', '[Blank]')}{only}Correct Answer: {one.answer}\n"
            f"{cloze}{two.text.replace('__', '[Blank]')}{only}Correct Answer: {two.answer}\n"
            f"{own}{question.text.replace('__', '[Blank]')}{only}ASSISTANT:"
        )
        (shot,) = shots("classification", form)
        question, prompt = shown("classification", form)
        assert prompt == (
            f"<s>{classification}Question: {lettered(shot)}\nCorrect Answer: {shot.answer}\n"
            f"{own}{lettered(question)}{letter}ASSISTANT:"
        )


def test_answers_are_forced_behind_the_turn_that_they_are_taught_in(random_backbone, people):
    tokenizer = random_backbone.processor.tokenizer
    for frame in (LLAVA_FRAME, TINY_LLAVA_FRAME):
        backbone = benchmark_backbone(random_backbone, frame)
        examination = prepare(backbone, people, REQUEST, "search", seed=0)
        question = first(examination, "generation", "image")
        item = next(i for i in examination.items if i.question.id == question.id)
        assert item.answer is not None
        taught, answer = item.answer
        forced = tokenizer.decode(taught.prompt_ids + answer)
        assert forced.endswith(f"in ENGLISH.\nASSISTANT: {question.answer}")


def test_a_context_too_short_takes_fewer_shots_and_the_scores_say_so(random_backbone, people):
    backbone = benchmark_backbone(random_backbone, LLAVA_FRAME)
    whole = prepare(backbone, people, REQUEST, "search", seed=0)
    question = first(whole, "cloze", "image")
    text_config = backbone.model.config.get_text_config()
    (item,) = (i for i in whole.items if i.question.id == question.id)
    assert (item.shots, item.encoded.shots) == (1.0, 2)
    context = text_config.max_position_embeddings
    try:
        # One token too few for the prompt and the longest response.
        text_config.max_position_embeddings = len(item.encoded.prompt_ids) + 49
        cut = prepare(backbone, people, REQUEST, "search", seed=0)
        text_config.max_position_embeddings = 20
        with pytest.raises(InputError, match=r"exceed the context of 20 of tiny-llava"):
            prepare(backbone, people, REQUEST, "search", seed=0)
    finally:
        text_config.max_position_embeddings = context
    (short,) = (i for i in cut.items if i.question.id == question.id)
    assert (short.shots, short.encoded.shots) == (0.5, 1)
    prompt, before = (prompt_text(backbone, e, question.id) for e in (cut, whole))
    one, _, own = before.split("USER:")[1:]
    assert prompt == f"<s>USER:{one}USER:{own}"
    assert not any("_shots" in name for name in cloze_scores(backbone, whole))
    scores = cloze_scores(backbone, cut)
    lengths = [
        len(i.encoded.prompt_ids)
        for i in whole.items
        if (i.split, i.question.task, i.question.form) == ("forget", "cloze", "image")
    ]
    shares = [0.5 if n >= len(item.encoded.prompt_ids) else 1.0 for n in lengths]
    assert scores["forget_cloze_shots"].value == sum(shares) / len(shares)
    assert scores["forget_cloze_shots"].n == scores["forget_cloze"].n == len(shares)
    assert scores["forget_cloze_shots_text"].value == 1.0


def cloze_scores(backbone: Backbone, examination: Examination) -> dict[str, Score]:
    asked = [i for i in examination.items if (i.split, i.question.task) == ("forget", "cloze")]
    return evaluate(backbone, replace(examination, items=tuple(asked)), REQUEST).scores


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


def test_a_qwen_conversation_has_one_system_turn(random_backbone, people):
    backbone = benchmark_backbone(random_backbone, QWEN_FRAME)
    shots = few_shot_turns(backbone, people.few_shot[:2], "cloze", "text")
    assert [shot.image for shot in shots] == [None, None]
    query = Query("q", "Who is it?", None, shots, task="generation")
    (encoded,) = encode(backbone, [query])
    only = "\nPlease **ONLY** provide the correct answer that should replace the [Blank]."
    one, two = (
        next(q for q in person.questions if (q.task, q.form) == ("cloze", "text"))
        for person in people.few_shot[:2]
    )
    end = "<|im_end|>"
    assert backbone.processor.tokenizer.decode(encoded.prompt_ids) == (
        f"<s><|im_start|>system\nYou are a helpful assistant.{end}\n"
        f"<|im_start|>user\n{one.text.replace('__', '[Blank]')}{only}{end}\n"
        f"<|im_start|>assistant\n{one.answer}</s>\n"
        f"<|im_start|>user\n{two.text.replace('__', '[Blank]')}{only}{end}\n"
        f"<|im_start|>assistant\n{two.answer}</s>\n"
        f"<|im_start|>user\nWho is it?{end}\n<|im_start|>assistant\n"
    )


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
    for seed in range(5):
        forwards = choose_few_shot(people.few_shot, "cloze", 2, seed, "data")
        backwards = choose_few_shot(people.few_shot[::-1], "cloze", 2, seed, "data")
        assert forwards == backwards
        # The benchmark's few-shot people stand as its file has them, by ID.
        assert forwards[0].id < forwards[1].id


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
    backbone.spec = replace(backbone.spec, option_scoring="likelihood")
    examination = prepare(backbone, people, REQUEST, "search", seed=0)
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


def test_celebrities_are_asked_everything_without_few_shot_turns(random_backbone, people):
    celebrity = make_person(110, "Retain_Set")
    backbone = benchmark_backbone(random_backbone, LLAVA_FRAME)
    few = replace(people, forget=people.forget[:1], test=(), retain_seen=(), retain_unseen=())
    examination = prepare(
        backbone, replace(few, celebrities=(celebrity,)), REQUEST, "search", seed=0
    )
    asked = [i for i in examination.items if i.split == "celebrity"]
    assert tuple(item.question for item in asked) == celebrity.questions
    assert all(item.encoded.shots == 0 and item.shots is None for item in asked)
    question = first(examination, "cloze", "text", "celebrity")
    assert prompt_text(backbone, examination, question.id) == (
        f"<s>USER:\n{question.text.replace('__', '[Blank]')}\nPlease **ONLY** provide the correct "
        "answer that should replace the [Blank].\nASSISTANT:"
    )


def test_an_unreadable_image_is_an_input_error(random_backbone, people):
    torn = replace(people.forget[0], images=(b"not an image",))
    with pytest.raises(InputError, match=f"person {torn.id}"):
        prepare(random_backbone, replace(people, forget=(torn,)), REQUEST, "search", seed=0)
