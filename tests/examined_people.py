"""A few people of the synthetic benchmark, for the tests of examination and evaluation."""

import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from vgid.config import RequestConfig
from vgid.data.benchmark import Person, Question
from vgid.data.fictitious import (
    classification_questions,
    cloze_questions,
    generation_questions,
    make_world,
    portrait,
)
from vgid.data.fictitious import test_portrait as transformed_portrait
from vgid.data.splits import People
from vgid.evaluation.questions import Examination
from vgid.models.backbones import Backbone, PromptFrame
from vgid.prompts import Wording
from vgid.seeds import sample_generator

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


def few_people() -> People:
    """Two people to forget, three retained, six for few-shot turns."""
    return People(
        forget=tuple(make_person(i, "forget_5") for i in (0, 1)),
        test=tuple(make_person(i, "Test_Set", poses=2) for i in (0, 1)),
        retain_seen=(make_person(2, "retain_95"),),
        retain_unseen=tuple(make_person(i, "retain_95") for i in (3, 4)),
        retain_pool=(),
        few_shot=tuple(few_questions(make_person(i, "retain_95")) for i in range(5, 11)),
    )


def benchmark_backbone(backbone: Backbone, frame: PromptFrame | None = None) -> Backbone:
    """The same model, asked as the benchmark asks a LLaVA 1.5: few-shot, letters."""
    spec = replace(
        backbone.spec,
        few_shot={"classification": 1, "cloze": 2},
        option_scoring="letter",
        frame=frame or backbone.spec.frame,
    )
    return replace(backbone, spec=spec)


def prompt_text(
    backbone: Backbone, examination: Examination, question_id: str, wording: Wording = "wrapped"
) -> str:
    """The prompt as the model sees it, each run of image tokens written as one ``<image>``."""
    asked = (question_id, wording)
    (item,) = (i for i in examination.items if (i.question.id, i.wording) == asked)
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
