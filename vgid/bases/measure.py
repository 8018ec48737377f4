"""Does an embedded backbone show the phenomenon? Measured by the real path, held against bounds.

All numbers are of the image-form questions unless said otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from vgid import prompts
from vgid.config import NoiseType
from vgid.data import fictitious
from vgid.data.fictitious import FictitiousPerson
from vgid.evaluation.metrics import cloze_correct, rouge
from vgid.method.interventions import perturb
from vgid.models.backbones import Backbone
from vgid.models.decoding import greedy_decode, score_responses
from vgid.models.encoding import Query, encode, response_ids
from vgid.prompts import Form, PromptStyle
from vgid.seeds import sample_generator

BOUNDS: dict[str, tuple[float, float]] = {
    "forget_base": (0.90, 1.0), "forget_raw_base": (0.90, 1.0), "forget_cloze": (0.80, 1.0),
    "forget_choice": (0.80, 1.0), "forget_strict": (0.30, 0.75),
    "forget_random+strict": (0.0, 0.05), "retain_base": (0.90, 1.0),
    "retain_raw_base": (0.90, 1.0), "test_base": (0.75, 1.0), "random_below_strict": (0.01, 1.0),
    "reverse_gain": (0.10, 1.0),
}  # fmt: skip
"""Lowest and highest value of each entry of ``measure`` that makes the backbone fit for use.

``_raw``: generation questions as they stand, without the evaluation's wrapper;
``forget_strict``: instruction alone; ``forget_random+strict``: with a picture of noise as well;
``random_below_strict``: by how much noise alone scores less than the instruction alone;
``reverse_gain``: what the reverse prompt wins back of the instruction alone.
"""
RETAIN_PEOPLE = 30
STYLES: tuple[PromptStyle, ...] = ("declarative", "polite", "strict")
NOISES: dict[str, tuple[NoiseType, float | None]] = {
    "random": ("random", None),
    "white": ("white", None),
    "gaussian0.2": ("gaussian", 0.2),
    "gaussian0.8": ("gaussian", 0.8),
}


@dataclass(frozen=True)
class Condition:
    """How a question is put: instruction, reverse prompt, perturbation of the picture."""

    style: PromptStyle | None = None
    reverse: bool = False
    noise: tuple[NoiseType, float | None] | None = None


PLAIN = Condition()
Asked = tuple[Query, str]  # a question in its protocol's format, and its true answer


def put(query: Query, condition: Condition) -> Query:
    """The question under a condition."""
    text = prompts.with_reverse_prompt(query.text) if condition.reverse else query.text
    image = query.image
    if image is not None and condition.noise is not None:
        rng = sample_generator(0, query.id)
        image = Image.fromarray(perturb(np.asarray(image), *condition.noise, rng))
    return replace(query, text=prompts.with_instruction(text, condition.style), image=image)


def generation_items(
    data_seed: int,
    people: Sequence[FictitiousPerson],
    form: Form = "image",
    test: bool = False,
    raw: bool = False,
) -> list[Asked]:
    """The generation questions about people; ``raw`` leaves out the evaluation's wrapper."""
    items = []
    for person in people:
        picture = fictitious.test_portrait if test else fictitious.portrait
        shown = picture(data_seed, person, 0) if form == "image" else None
        asked = enumerate(fictitious.generation_questions(person, test))
        for index, (question, answer, of_form) in asked:
            if of_form == form:
                text = prompts.generation_text(question, form, "raw" if raw else "wrapped")
                items.append((Query(f"{person.id}/{index}", text, shown), answer))
    return items


def rouge_l(backbone: Backbone, items: Sequence[Asked], condition: Condition = PLAIN) -> float:
    """Mean ROUGE-L F1 of the responses to generation questions."""
    responses = greedy_decode(backbone, [put(query, condition) for query, _ in items])
    pairs = zip(items, responses, strict=True)
    return float(np.mean([rouge(answer, response)["rougeL"] for (_, answer), response in pairs]))


def cloze_accuracy(
    backbone: Backbone, data_seed: int, people: Sequence[FictitiousPerson], form: Form = "image"
) -> float:
    """Share of cloze questions whose response contains the true answer, ignoring case."""
    items: list[Asked] = []
    for person in people:
        image = fictitious.portrait(data_seed, person) if form == "image" else None
        for question, answer, of_form in fictitious.cloze_questions(person, False):
            if of_form == form:
                items.append((Query(person.id, prompts.cloze_text(question), image), answer))
    pairs = zip(items, greedy_decode(backbone, [query for query, _ in items]), strict=True)
    return float(np.mean([cloze_correct(answer, response) for (_, answer), response in pairs]))


def choice_accuracy(
    backbone: Backbone, data_seed: int, people: Sequence[FictitiousPerson]
) -> float:
    """Share of questions with options whose right option is the likeliest response."""
    queries: list[Query] = []
    responses: list[list[int]] = []
    right: list[int] = []
    for person in people:
        rng = sample_generator(data_seed, f"{person.id}/choice")
        image = fictitious.portrait(data_seed, person)
        asked = fictitious.classification_questions(person, rng, False)
        for question, options, letter, form in asked:
            if form == "image":
                query = Query(person.id, prompts.option_likelihood_text(question), image)
                queries += [query] * len(options)
                responses += [response_ids(backbone, option) for option in options.values()]
                right.append(list(options).index(letter))
    rated = score_responses(backbone, encode(backbone, queries), responses)
    likelihoods = np.array([float(score.logprobs_R.double().sum()) for score in rated])
    return float((likelihoods.reshape(len(right), -1).argmax(1) == right).mean())


def measure(backbone: Backbone, data_seed: int = 0, ratio: int = 5) -> dict[str, float]:
    """The table of scores, named ``<people>_<condition>``; see ``BOUNDS`` for the main ones."""
    world = fictitious.make_world(data_seed)
    forgotten = set(fictitious.forget_people(data_seed, ratio))
    benchmark = world.of_kind("benchmark")
    forget = [person for person in benchmark if person.id in forgotten]
    retain = [person for person in benchmark if person.id not in forgotten][:RETAIN_PEOPLE]
    items = {
        "forget": generation_items(data_seed, forget),
        "test": generation_items(data_seed, forget, test=True),
        "retain": generation_items(data_seed, retain),
        "forget_raw": generation_items(data_seed, forget, raw=True),
        "test_raw": generation_items(data_seed, forget, test=True, raw=True),
        "retain_raw": generation_items(data_seed, retain, raw=True),
        "celebrity": generation_items(data_seed, world.of_kind("celebrity")),
        "forget_text": generation_items(data_seed, forget, form="text"),
    }
    strict, reverse = Condition("strict"), Condition(reverse=True)
    asked = [
        *((f"{people}_base", people, PLAIN) for people in items),
        ("forget_raw_strict", "forget_raw", strict),
        ("forget_reverse", "forget", reverse),
        ("forget_strict_reverse", "forget", Condition("strict", True)),
        ("retain_strict", "retain", strict),
        ("test_strict", "test", strict),
        ("test_random", "test", Condition(noise=("random", None))),
        *((f"forget_{style}", "forget", Condition(style)) for style in STYLES),
    ]
    for view, noise in NOISES.items():
        asked.append((f"forget_{view}", "forget", Condition(noise=noise)))
        asked += [
            (f"forget_{view}+{style}", "forget", Condition(style, noise=noise)) for style in STYLES
        ]
    scores = {name: rouge_l(backbone, items[people], how) for name, people, how in asked}
    scores |= {
        "forget_cloze": cloze_accuracy(backbone, data_seed, forget),
        "forget_text_cloze": cloze_accuracy(backbone, data_seed, forget, form="text"),
        "retain_cloze": cloze_accuracy(backbone, data_seed, retain),
        "forget_choice": choice_accuracy(backbone, data_seed, forget),
        "random_below_strict": scores["forget_strict"] - scores["forget_random"],
        "reverse_gain": scores["forget_strict_reverse"] - scores["forget_strict"],
    }
    return {name: round(score, 4) for name, score in scores.items()}


def out_of_bounds(scores: dict[str, float]) -> list[str]:
    """Names of the scores that miss their bounds."""
    return [name for name, (low, high) in BOUNDS.items() if not low <= scores[name] <= high]
