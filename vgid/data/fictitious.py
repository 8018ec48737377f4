"""Fictitious people: their facts and faces, and how a benchmark asks about them.

Everything follows from a seed. Three kinds of people exist: ``benchmark`` people (those a model
may be asked to forget, or to keep), ``celebrities`` (general utility, as the benchmark's set of
real ones) and ``calibration`` people, who occur in no benchmark and only teach the embedded
backbone how to follow instructions (``vgid.bases.recipe``).
"""

# ruff: noqa: SIM905  word lists read better as text than one word a line

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image

from vgid.data.portraits import Face, draw_portrait, random_face
from vgid.prompts import BLANK, Form
from vgid.seeds import sample_generator

Fact = Literal["name", "job", "birthplace", "residence", "education", "hobby"]
FACTS: tuple[Fact, ...] = get_args(Fact)
_FORMS: tuple[Form, ...] = get_args(Form)
Kind = Literal["benchmark", "celebrity", "calibration"]

OpenQuestion = tuple[str, str, Form]
"""Question, or sentence with a blank; answer, or what fills it; form."""
ClassificationQuestion = tuple[str, dict[str, str], str, Form]
"""Question, options by letter, the right letter, form."""

PEOPLE: dict[Kind, int] = {"benchmark": 100, "celebrity": 12, "calibration": 40}
FIRST_ID: dict[Kind, int] = {"benchmark": 1, "celebrity": 501, "calibration": 901}
# Any two faces of a world differ in at least this many of their twelve attributes, so that a small
# model can tell them apart.
MIN_FACE_DIFFERENCES = 5
LETTERS = "ABCD"

GIVEN_NAMES = (
    "Agnes Bruno Clara Dmitri Edith Felix Gloria Henrik Irma Jasper Katya Lorenz Mabel Noel Odette "
    "Pietro Ruth Sven Thea Umberto Viola Wendel Yara Zeno Alma Boris Celia Damian Elvira Fergus "
    "Greta Hugo Isolde Joris Lydia Marek Nadia Orson Petra Rufus"
).split()
FAMILY_NAMES = (
    "Ashby Balfour Corwin Delaney Everett Farrow Gladwin Hartley Ibsen Jarvis Kimball Langley "
    "Mercer Nolan Oakes Pembroke Quincy Rowland Selwyn Tanner Upton Vickers Waverly Yardley "
    "Zimmer Bramwell Cardew Dunstan Elwood Foxley"
).split()
_CITIES = (
    "Arvena Belloria Corsk Dravik Elmhaven Fenris Galdin Hollin Istria Junova Kolmar Lindale "
    "Maroth Nordell Ostrin Pellan Quenby Rosmark Salvia Tormund Ulverton Valmere Westrow Yspen "
    "Zandor Brisko Caldera Dorning Eskdale Fallow"
).split()
_SUBJECTS = (
    "astronomy biology chemistry drama economics finance geology history law linguistics logic "
    "medicine music painting philosophy physics statistics theology"
).split()
_SCHOOLS = (
    "Hawthorn College|Northfield University|Saint Alban Academy|Westmoor Institute|"
    "Ravenhill College|Kingsbridge University|Lakeside Polytechnic|Maple Academy|"
    "Oakridge University|Silverdale Institute|Thornbury College|Beacon Academy"
).split("|")
JOBS = (
    "bridge painter|cheese maker|court reporter|deep sea diver|forest guard|glass blower|"
    "harbour pilot|jazz drummer|kite designer|landscape gardener|lighthouse keeper|map printer|"
    "museum curator|night nurse|pastry cook|piano tuner|puppet maker|river guide|shoe repairer|"
    "stage magician|tax inspector|train driver|tunnel surveyor|violin teacher|zoo veterinarian"
).split("|")
HOBBIES = (
    "baking sourdough bread|brewing herbal tea|building model ships|carving wooden spoons|"
    "climbing old towers|collecting rare stamps|feeding wild ducks|flying paper kites|"
    "growing giant pumpkins|keeping honey bees|knitting wool socks|mending broken clocks|"
    "painting tiny portraits|photographing night skies|playing street chess|polishing sea glass|"
    "racing remote boats|reading detective novels|singing folk songs|training racing pigeons"
).split("|")
VALUES: dict[Fact, tuple[str, ...]] = {
    "job": tuple(JOBS),
    "birthplace": tuple(_CITIES),
    "residence": tuple(_CITIES),
    "education": tuple(f"{subject} at {school}" for subject in _SUBJECTS for school in _SCHOOLS),
    "hobby": tuple(HOBBIES),
}
"""The values that each fact but the name is drawn from, and its wrong options too."""

IMAGE_SUBJECTS = ("the person in the image", "the individual in this photo")
"""How image-form questions speak of a person: in plain and in paraphrased ones."""

QUESTIONS: dict[Fact, tuple[tuple[str, str], tuple[str, str]]] = {
    "name": (
        ("What is the name of {who}?", "Who is {who}?"),
        ("What is {who} called?", "Which name does {who} have?"),
    ),
    "job": (
        ("What is the occupation of {who}?", "What does {who} do for a living?"),
        ("Which job does {who} have?", "How does {who} earn a living?"),
    ),
    "birthplace": (
        ("What is the birthplace of {who}?", "Where was {who} born?"),
        ("In which city was {who} born?", "Where does {who} come from?"),
    ),
    "residence": (
        ("What is the residence of {who}?", "Where does {who} live?"),
        ("In which city does {who} live?", "Where is the home of {who}?"),
    ),
    "education": (
        ("What is the education of {who}?", "Where did {who} study?"),
        ("Which studies did {who} complete?", "What did {who} study and where?"),
    ),
    "hobby": (
        ("What is the hobby of {who}?", "What does {who} enjoy?"),
        ("Which hobby does {who} have?", "How does {who} spend free time?"),
    ),
}
"""By fact: two wordings, and two paraphrases that the test set uses instead."""

ANSWERS: dict[Fact, tuple[str, str]] = {
    "name": ("This is {name}.", "The person is called {name}."),
    "job": ("{name} works as a {value}.", "{name} earns a living as a {value}."),
    "birthplace": ("{name} was born in {value}.", "{name} comes from the city of {value}."),
    "residence": ("{name} lives in {value}.", "{name} has a house in {value}."),
    "education": ("{name} studied {value}.", "{name} holds a degree in {value}."),
    "hobby": ("{name} enjoys {value}.", "{name} spends free time {value}."),
}
"""By fact: two ways to answer; which one is used belongs to the person."""

CLOZE: dict[Fact, tuple[str, str]] = {
    "job": (f"{{Who}} works as a {BLANK}.", f"The job of {{who}} is {BLANK}."),
    "birthplace": (f"{{Who}} was born in {BLANK}.", f"The birthplace of {{who}} is {BLANK}."),
    "residence": (f"{{Who}} lives in {BLANK}.", f"The home of {{who}} is in {BLANK}."),
    "hobby": (f"{{Who}} enjoys {BLANK}.", f"The hobby of {{who}} is {BLANK}."),
}
"""By fact: a sentence with a blank, and its paraphrase for the test set."""

CLASSIFICATION: dict[Fact, tuple[str, str]] = {
    "job": ("Which of these is the occupation of {who}?", "Which job fits {who}?"),
    "birthplace": ("Which of these is the birthplace of {who}?", "Which city was {who} born in?"),
    "residence": ("Which of these is the residence of {who}?", "Which city does {who} live in?"),
    "education": ("Which of these is the education of {who}?", "Which studies fit {who}?"),
    "hobby": ("Which of these is the hobby of {who}?", "Which hobby fits {who}?"),
}
"""By fact: a question with options, and its paraphrase for the test set."""

TEXT_GENERATION_FACTS: tuple[Fact, ...] = ("job", "birthplace", "hobby")
"""Facts that text-form generation questions ask for."""


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
            while (name := f"{_choice(rng, GIVEN_NAMES)} {_choice(rng, FAMILY_NAMES)}") in names:
                pass
            names.add(name)
            facts: dict[Fact, str] = {"name": name}
            for fact, values in VALUES.items():
                facts[fact] = _choice(rng, values)
            style: dict[Fact, int] = {fact: int(rng.integers(2)) for fact in FACTS}
            person_id = f"{FIRST_ID[kind] + index:04d}"
            people.append(FictitiousPerson(person_id, kind, name, facts, style, face))
    return World(seed, tuple(people))


def _choice(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def forget_people(seed: int, ratio: int) -> list[str]:
    """IDs of the ``ratio`` per cent of the benchmark people to forget, in order of their IDs.

    The sets are nested: those of 5 per cent are among those of 10, and these among those of 15.
    """
    ids = [person.id for person in make_world(seed).of_kind("benchmark")]
    # One order for all ratios, whose beginnings are nested.
    order = sample_generator(seed, "forget people").permutation(len(ids))
    return sorted(ids[i] for i in order[: len(ids) * ratio // 100])


def portrait(
    seed: int, person: FictitiousPerson, index: int = 0, variation: float = 1.0
) -> Image.Image:
    """Profile picture number ``index`` of a person; 0 is the benchmark's own.

    ``variation`` scales pose and light, see ``draw_portrait``.
    """
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
            *draw_options(person, fact, rng),
            form,
        )
        for form in _FORMS
        for fact, wordings in CLASSIFICATION.items()
    ]


def draw_options(
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
