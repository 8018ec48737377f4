"""Does an embedded backbone show the phenomenon? Measured by the real path, held against bounds.

By the path that studies use: processor, batched greedy decoding, the benchmark's metrics. All
numbers are of the image-form questions unless said otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vgid.config import NoiseType
from vgid.data.fictitious import (
    FictitiousPerson,
    classification_questions,
    cloze_questions,
    forget_people,
    generation_questions,
    make_world,
    portrait,
    test_portrait,
)
from vgid.evaluation.metrics import cloze_correct, rouge
from vgid.method.interventions import perturb
from vgid.models.backbones import Backbone
from vgid.models.decoding import greedy_decode, score_responses
from vgid.models.encoding import Query, encode, response_ids
from vgid.prompts import (
    Form,
    PromptStyle,
    cloze_text,
    generation_text,
    option_likelihood_text,
    with_instruction,
    with_reverse_prompt,
)
from vgid.seeds import sample_generator

BOUNDS: dict[str, tuple[float, float]] = {
    "forget_base": (0.90, 1.0),
    "forget_raw_base": (0.90, 1.0),
    "forget_cloze": (0.80, 1.0),
    "forget_choice": (0.80, 1.0),
    "forget_strict": (0.30, 0.75),
    "forget_random+strict": (0.0, 0.05),
    "retain_base": (0.90, 1.0),
    "retain_raw_base": (0.90, 1.0),
    "test_base": (0.75, 1.0),
    "random_below_strict": (0.01, 1.0),
    "reverse_gain": (0.10, 1.0),
}
"""Lowest and highest value of each entry of ``measure`` that makes the backbone fit for use.

``_raw``: generation questions as they stand, without the evaluation's wrapper;
``forget_strict``: instruction alone; ``forget_random+strict``: with a picture of noise as well;
``random_below_strict``: by how much noise alone scores less than the instruction alone;
``reverse_gain``: what the reverse prompt wins back of the instruction alone.
"""
RETAIN_PEOPLE = 30
STYLES: tuple[PromptStyle, ...] = ("declarative", "polite", "strict")
VIEWS: tuple[tuple[str, NoiseType, float | None], ...] = (
    ("random", "random", None),
    ("white", "white", None),
    ("gaussian0.2", "gaussian", 0.2),
    ("gaussian0.8", "gaussian", 0.8),
)


@dataclass(frozen=True)
class Condition:
    """How a question is put: instruction, reverse prompt, perturbation of the picture."""

    style: PromptStyle | None = None
    reverse: bool = False
    noise: tuple[NoiseType, float | None] | None = None


PLAIN = Condition()


@dataclass(frozen=True)
class Item:
    """One question in its protocol's format, its true answer and the picture."""

    id: str
    text: str
    answer: str
    image: Image.Image | None

    def query(self, condition: Condition) -> Query:
        """The question under a condition."""
        text = with_reverse_prompt(self.text) if condition.reverse else self.text
        image = self.image
        if image is not None and condition.noise is not None:
            noise_type, sigma = condition.noise
            rng = sample_generator(0, self.id)
            image = Image.fromarray(perturb(np.asarray(image), noise_type, sigma, rng))
        return Query(self.id, with_instruction(text, condition.style), image)


def generation_items(
    data_seed: int,
    people: Sequence[FictitiousPerson],
    form: Form = "image",
    test: bool = False,
    raw: bool = False,
) -> list[Item]:
    """The generation questions about people, of the test set (other pose and wording) or not.

    ``raw`` leaves out the evaluation's wrapper.
    """
    items = []
    for person in people:
        image = test_portrait(data_seed, person, 0) if test else portrait(data_seed, person)
        for index, (question, answer, of_form) in enumerate(generation_questions(person, test)):
            if of_form == form:
                items.append(
                    Item(
                        f"{person.id}/{index}",
                        question if raw else generation_text(question, form),
                        answer,
                        image if form == "image" else None,
                    )
                )
    return items


def rouge_l(backbone: Backbone, items: Sequence[Item], condition: Condition = PLAIN) -> float:
    """Mean ROUGE-L F1 of the responses to generation questions."""
    responses = greedy_decode(backbone, [item.query(condition) for item in items])
    pairs = zip(items, responses, strict=True)
    return float(np.mean([rouge(item.answer, response)["rougeL"] for item, response in pairs]))


def cloze_accuracy(
    backbone: Backbone, data_seed: int, people: Sequence[FictitiousPerson], form: Form = "image"
) -> float:
    """Share of cloze questions whose response contains the true answer, ignoring case."""
    items = [
        Item(
            f"{person.id}/cloze/{index}",
            cloze_text(question),
            answer,
            portrait(data_seed, person) if form == "image" else None,
        )
        for person in people
        for index, (question, answer, of_form) in enumerate(cloze_questions(person, False))
        if of_form == form
    ]
    responses = greedy_decode(backbone, [item.query(PLAIN) for item in items])
    hits = [cloze_correct(i.answer, r) for i, r in zip(items, responses, strict=True)]
    return float(np.mean(hits))


def choice_accuracy(
    backbone: Backbone, data_seed: int, people: Sequence[FictitiousPerson]
) -> float:
    """Share of questions with options whose right option is the likeliest response."""
    queries: list[Query] = []
    responses: list[list[int]] = []
    right: list[bool] = []
    for person in people:
        rng = sample_generator(data_seed, f"{person.id}/choice")
        image = portrait(data_seed, person)
        for question, options, letter, form in classification_questions(person, rng, False):
            if form == "image":
                query = Query(person.id, option_likelihood_text(question), image)
                queries += [query] * len(options)
                responses += [response_ids(backbone, option) for option in options.values()]
                right += [letter == other for other in options]
    rated = score_responses(backbone, encode(backbone, queries), responses)
    options_per_question = 4
    likelihoods = np.array([float(score.logprobs_R.double().sum()) for score in rated])
    likeliest = likelihoods.reshape(-1, options_per_question).argmax(1)
    truth = np.array(right).reshape(-1, options_per_question).argmax(1)
    return float((likeliest == truth).mean())


def measure(backbone: Backbone, data_seed: int = 0, ratio: int = 5) -> dict[str, float]:
    """The table of scores, named ``<people>_<condition>``; see ``BOUNDS`` for the main ones."""
    world = make_world(data_seed)
    forgotten = set(forget_people(data_seed, ratio))
    benchmark = world.of_kind("benchmark")
    forget = [person for person in benchmark if person.id in forgotten]
    retain = [person for person in benchmark if person.id not in forgotten][:RETAIN_PEOPLE]
    forget_items = generation_items(data_seed, forget)
    test_items = generation_items(data_seed, forget, test=True)

    scores = {
        "forget_base": rouge_l(backbone, forget_items),
        "test_base": rouge_l(backbone, test_items),
        "retain_base": rouge_l(backbone, generation_items(data_seed, retain)),
        "forget_raw_base": rouge_l(backbone, generation_items(data_seed, forget, raw=True)),
        "test_raw_base": rouge_l(
            backbone, generation_items(data_seed, forget, test=True, raw=True)
        ),
        "retain_raw_base": rouge_l(backbone, generation_items(data_seed, retain, raw=True)),
        "forget_raw_strict": rouge_l(
            backbone, generation_items(data_seed, forget, raw=True), Condition("strict")
        ),
        "celebrity_base": rouge_l(
            backbone, generation_items(data_seed, world.of_kind("celebrity"))
        ),
        "forget_text_base": rouge_l(backbone, generation_items(data_seed, forget, form="text")),
        "forget_cloze": cloze_accuracy(backbone, data_seed, forget),
        "forget_text_cloze": cloze_accuracy(backbone, data_seed, forget, form="text"),
        "retain_cloze": cloze_accuracy(backbone, data_seed, retain),
        "forget_choice": choice_accuracy(backbone, data_seed, forget),
        "forget_reverse": rouge_l(backbone, forget_items, Condition(reverse=True)),
        "forget_strict_reverse": rouge_l(backbone, forget_items, Condition("strict", True)),
        "retain_strict": rouge_l(
            backbone, generation_items(data_seed, retain), Condition("strict")
        ),
        "test_strict": rouge_l(backbone, test_items, Condition("strict")),
        "test_random": rouge_l(backbone, test_items, Condition(noise=("random", None))),
    }
    for style in STYLES:
        scores[f"forget_{style}"] = rouge_l(backbone, forget_items, Condition(style))
    for view, noise_type, sigma in VIEWS:
        noise = (noise_type, sigma)
        scores[f"forget_{view}"] = rouge_l(backbone, forget_items, Condition(noise=noise))
        for style in STYLES:
            scores[f"forget_{view}+{style}"] = rouge_l(
                backbone, forget_items, Condition(style, noise=noise)
            )
    scores["random_below_strict"] = scores["forget_strict"] - scores["forget_random"]
    scores["reverse_gain"] = scores["forget_strict_reverse"] - scores["forget_strict"]
    return {name: round(score, 4) for name, score in scores.items()}


def out_of_bounds(scores: dict[str, float]) -> list[str]:
    """Names of the scores that miss their bounds."""
    return [name for name, (low, high) in BOUNDS.items() if not low <= scores[name] <= high]
