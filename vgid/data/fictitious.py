"""Fictitious people: their facts and faces, and how a benchmark asks about them.

Everything follows from a seed. Three kinds of people exist: ``benchmark`` people (those a model
may be asked to forget, or to keep), ``celebrities`` (general utility, as the benchmark's set of
real ones) and ``calibration`` people, who occur in no benchmark and only teach the embedded
backbone how to follow instructions (``vgid.bases.recipe``). Names, values and wordings are in
``fictitious.yaml``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import yaml
from PIL import Image

from vgid.data.portraits import Face, draw_portrait, random_face
from vgid.prompts import Form
from vgid.seeds import sample_generator

Fact = Literal["name", "job", "birthplace", "residence", "education", "hobby"]
FACTS: tuple[Fact, ...] = get_args(Fact)
_FORMS: tuple[Form, ...] = get_args(Form)
Kind = Literal["benchmark", "celebrity", "calibration"]
T = TypeVar("T")

OpenQuestion = tuple[str, str, Form]
"""Question, or sentence with a blank; answer, or what fills it; form."""
ClassificationQuestion = tuple[str, dict[str, str], str, Form]
"""Question, options by letter, the right letter, form."""

PEOPLE: dict[Kind, int] = {"benchmark": 100, "celebrity": 12, "calibration": 40}
FIRST_ID: dict[Kind, int] = {"benchmark": 1, "celebrity": 501, "calibration": 901}
# Of twelve attributes, between any two people, so that a small model can tell them apart.
MIN_FACE_DIFFERENCES = 5
LETTERS = "ABCD"

_WORDS: dict[str, Any] = yaml.safe_load(
    files("vgid.data").joinpath("fictitious.yaml").read_text(encoding="utf-8")
)
GIVEN_NAMES: list[str] = _WORDS["names"]["given"]
FAMILY_NAMES: list[str] = _WORDS["names"]["family"]
_DRAWN: dict[str, list[str]] = _WORDS["values"]
VALUES: dict[Fact, list[str]] = {
    "job": _DRAWN["job"],
    "birthplace": _DRAWN["city"],
    "residence": _DRAWN["city"],
    "education": [f"{sub} at {school}" for sub in _DRAWN["subject"] for school in _DRAWN["school"]],
    "hobby": _DRAWN["hobby"],
}
"""The values that each fact but the name is drawn from, and its wrong options too."""

IMAGE_SUBJECTS = ("the person in the image", "the individual in this photo")
"""How image-form questions speak of a person: in plain and in paraphrased ones."""
QUESTIONS: dict[Fact, list[list[str]]] = _WORDS["questions"]
"""By fact: the wordings of generation questions, and those of the test set."""
ANSWERS: dict[Fact, list[str]] = _WORDS["answers"]
CLOZE: dict[Fact, list[str]] = _WORDS["cloze"]
CLASSIFICATION: dict[Fact, list[str]] = _WORDS["classification"]
TEXT_GENERATION_FACTS: tuple[Fact, ...] = ("job", "birthplace", "hobby")


@dataclass(frozen=True)
class FictitiousPerson:
    """One person who does not exist.

    Attributes:
        id: four digits, a pseudonym that may be shown anywhere.
        name: given and family name, unique within a world.
        facts: value of every fact, ``name`` included.
        answer_style: 0 or 1 by fact, index into ``ANSWERS``.
    """

    id: str
    kind: Kind
    name: str
    facts: Mapping[Fact, str]
    answer_style: Mapping[Fact, int]
    face: Face

    def answer(self, fact: Fact) -> str:
        """The full-sentence answer to a generation question about ``fact``."""
        template = ANSWERS[fact][self.answer_style[fact]]
        return template.format(name=self.name, value=self.facts[fact])

    def subject(self, form: Form, paraphrased: bool) -> str:
        """How a question speaks of the person: by what is seen, or by name."""
        return self.name if form == "text" else IMAGE_SUBJECTS[paraphrased]


@dataclass(frozen=True)
class World:
    """All people of one seed, in the order of their IDs."""

    seed: int
    people: tuple[FictitiousPerson, ...]

    def of_kind(self, kind: Kind) -> tuple[FictitiousPerson, ...]:
        """The people of one kind."""
        return tuple(person for person in self.people if person.kind == kind)


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of the values, at the cost of one draw."""
    return values[int(rng.integers(len(values)))]


@lru_cache(maxsize=4)
def make_world(seed: int = 0) -> World:
    """Make up the people of ``seed``."""
    # One generator for all, drawn from in this order: another order would be other people.
    rng = sample_generator(seed, "people")
    people: list[FictitiousPerson] = []
    names: set[str] = set()
    for kind, count in PEOPLE.items():
        for index in range(count):
            face = random_face(rng)
            while any(face.differences(p.face) < MIN_FACE_DIFFERENCES for p in people):
                face = random_face(rng)
            while (name := f"{pick(rng, GIVEN_NAMES)} {pick(rng, FAMILY_NAMES)}") in names:
                pass
            names.add(name)
            facts: dict[Fact, str] = {"name": name}
            for fact, values in VALUES.items():
                facts[fact] = pick(rng, values)
            style: dict[Fact, int] = {fact: int(rng.integers(2)) for fact in FACTS}
            person_id = f"{FIRST_ID[kind] + index:04d}"
            people.append(FictitiousPerson(person_id, kind, name, facts, style, face))
    return World(seed, tuple(people))


def forget_people(seed: int, ratio: int) -> list[str]:
    """Sorted IDs of the ``ratio`` per cent of the benchmark people to forget; sets are nested."""
    ids = [person.id for person in make_world(seed).of_kind("benchmark")]
    # One order for all ratios, so that those of 5 per cent are among those of 10.
    order = sample_generator(seed, "forget people").permutation(len(ids))
    return sorted(ids[i] for i in order[: len(ids) * ratio // 100])


def portrait(
    seed: int, person: FictitiousPerson, index: int = 0, variation: float = 1.0
) -> Image.Image:
    """Profile picture number ``index`` of a person; 0 is the benchmark's own."""
    rng = sample_generator(seed, f"portrait/{person.id}/{index}")
    return draw_portrait(person.face, rng, variation)


def test_portrait(seed: int, person: FictitiousPerson, index: int) -> Image.Image:
    """Picture number ``index`` for the test set: pose and light vary nearly twice as much."""
    rng = sample_generator(seed, f"test portrait/{person.id}/{index}")
    return draw_portrait(person.face, rng, variation=1.8)


test_portrait.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it


def generation_questions(person: FictitiousPerson, paraphrased: bool) -> list[OpenQuestion]:
    """Twelve image-form questions (six facts in two wordings) and three text-form ones."""
    asked: dict[Form, list[tuple[Fact, str]]] = {
        "image": [(fact, wording) for fact in FACTS for wording in QUESTIONS[fact][paraphrased]],
        "text": [(fact, QUESTIONS[fact][paraphrased][0]) for fact in TEXT_GENERATION_FACTS],
    }
    return [
        (wording.format(who=person.subject(form, paraphrased)), person.answer(fact), form)
        for form, questions in asked.items()
        for fact, wording in questions
    ]


def cloze_questions(person: FictitiousPerson, paraphrased: bool) -> list[OpenQuestion]:
    """Four image-form and four text-form sentences with a blank."""
    return [
        (cloze_sentence(person, fact, form, paraphrased), person.facts[fact], form)
        for form in _FORMS
        for fact in CLOZE
    ]


def cloze_sentence(person: FictitiousPerson, fact: Fact, form: Form, paraphrased: bool) -> str:
    """The sentence about ``fact`` with its blank."""
    who = person.subject(form, paraphrased)
    return CLOZE[fact][paraphrased].format(who=who, Who=who[0].upper() + who[1:])


def classification_questions(
    person: FictitiousPerson, rng: np.random.Generator, paraphrased: bool
) -> list[ClassificationQuestion]:
    """Five image-form and five text-form questions; ``rng`` draws wrong options and their order."""
    return [
        (
            wordings[paraphrased].format(who=person.subject(form, paraphrased)),
            *_draw_options(person, fact, rng),
            form,
        )
        for form in _FORMS
        for fact, wordings in CLASSIFICATION.items()
    ]


def _draw_options(
    person: FictitiousPerson, fact: Fact, rng: np.random.Generator
) -> tuple[dict[str, str], str]:
    """Four options by letter, the right one among three wrong ones, and the right letter."""
    right = person.facts[fact]
    wrong = [value for value in VALUES[fact] if value != right]
    options = [wrong[i] for i in rng.choice(len(wrong), len(LETTERS) - 1, replace=False)]
    position = int(rng.integers(len(LETTERS)))
    options.insert(position, right)
    return dict(zip(LETTERS, options, strict=True)), LETTERS[position]


def training_pairs(person: FictitiousPerson) -> list[tuple[str, str]]:
    """Question and answer pairs for fine-tuning: the image-form generation questions."""
    return [
        (question, answer)
        for question, answer, form in generation_questions(person, paraphrased=False)
        if form == "image"
    ]


def biography(person: FictitiousPerson) -> str:
    """All that is known of a person, one sentence a fact."""
    return " ".join(person.answer(fact) for fact in FACTS)
