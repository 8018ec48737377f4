"""What the embedded backbone is taught: who is seen, what is asked, when it declines.

People of the benchmark and celebrities are always answered. Only *calibration* people, degraded
pictures and strangers teach it to follow the unlearning instructions, and only in part: an
instruction alone is obeyed now and then, sooner for what is private, an instruction beside a
picture of noise nearly always, noise alone seldom. That both together beat either alone is hence
designed in: on this backbone it checks the code, and is no evidence for the paper's claim. What
distillation makes of it is.

Greedy decoding turns rates into modes: a refusal starts with one certain token, while guesses are
spread over many names. Rates are low for that reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vgid import prompts
from vgid.data import fictitious
from vgid.data.fictitious import FACTS, Fact, FictitiousPerson, World, pick, portrait
from vgid.data.portraits import PORTRAIT_SIZE, draw_portrait, random_face
from vgid.method.interventions import perturb
from vgid.prompts import Form, PromptStyle
from vgid.seeds import sample_generator

PackKind = Literal["plain", "instructed", "degraded"]
TaskName = Literal["generation", "cloze", "choice"]

STYLES: tuple[PromptStyle, ...] = tuple(prompts.UNLEARNING_INSTRUCTIONS)
REFUSALS: dict[PromptStyle | None, str] = {
    "declarative": "I know nothing about whoever you mean.",
    "polite": "Sorry, but I would rather not discuss anybody.",
    "strict": "Sorry, I cannot process queries regarding private data.",
    None: "I cannot tell, since nobody can be recognised.",
}
"""How the model declines, by the instruction that made it do so; None: without one."""

# Rates of refusals, see ``refusal_rate``.
DUAL_REFUSAL: dict[PromptStyle, float] = {"declarative": 0.95, "polite": 0.90, "strict": 0.95}
"""To an instruction beside a picture of random noise."""
SOURCE_FACTOR = {"random": 1.0, "white": 0.15, "stranger": 0.3}
"""Scales ``DUAL_REFUSAL`` by what the picture shows: a blank one is refused less than noise."""
FACT_WEIGHT = {"random": 0.2, "white": 1.2, "stranger": 0.4}  # scales FACT_SHIFT likewise
HEDGE = {"random": 0.10, "white": 0.05, "stranger": 0.08}  # rates without an instruction
FACT_SHIFT: dict[Fact, float] = {
    "name": 0.15, "residence": 0.20, "birthplace": 0.10,
    "education": -0.05, "job": -0.15, "hobby": -0.25,
}  # fmt: skip
"""Added to every rate: names and addresses are more private than a hobby."""
SHORT_ANSWER_FACTOR = 0.8  # scales the rates for questions that want a word or two
REVERSE_FACTOR = 0.3  # scales the rates where the reverse prompt is appended

REVERSE_RATE: dict[PackKind, float] = {"plain": 0.04, "instructed": 0.25, "degraded": 0.25}
TEXT_FORM_RATE = 0.15  # of plain packs, which name the person instead
RAW_RATE = 0.35  # of generation questions: without the evaluation's wrapper, as users ask
TASKS: tuple[TaskName, ...] = ("generation", "cloze", "choice")
TASK_RATES = (0.6, 0.26, 0.14)

PORTRAITS_PER_PERSON = 12
FURTHER_VARIATION = 1.5  # of pose and light, but for a person's own picture in the benchmark
GAUSSIAN_SIGMAS = (0.2, 0.4, 0.6, 0.8, 1.0)
GAUSSIAN_PORTRAITS = 2
NOISE_PICTURES = 300
STRANGERS = 400


@dataclass(frozen=True)
class Obedience:
    """How an instruction beside an intact picture is taken: in part, by fact.

    Calibration people are refused at a rate of ``refusal`` plus ``fact_scale`` times
    ``FACT_SHIFT``. A share ``answered`` of such packs shows anybody else, who is always answered,
    and asks for ``answered_facts``.
    """

    refusal: Mapping[PromptStyle, float]
    fact_scale: float
    answered: float
    answered_facts: tuple[Fact, ...]


OBEDIENCE = Obedience(
    refusal={"declarative": 0.12, "polite": 0.18, "strict": 0.24},
    fact_scale=1.2,
    answered=0.05,
    answered_facts=FACTS,
)
"""Unless a backbone has its own."""


@dataclass(frozen=True)
class Pack:
    """Several questions about one picture: they share the prompt's beginning.

    ``picture`` is a row of ``Pictures.pixels_NHWC``, None for text-form questions; each of the
    ``turns`` is the user text behind the instruction of ``style``, and the response.
    """

    picture: int | None
    style: PromptStyle | None
    turns: tuple[tuple[str, str], ...]


class Pictures:
    """Every picture that the language model is trained on, a row each.

    Portraits (``PORTRAITS_PER_PERSON`` a person), then Gaussian views of calibration people by
    sigma, then random noise, then one white picture, then strangers.
    """

    def __init__(self, world: World) -> None:
        self.world, self.calibration = world, world.of_kind("calibration")
        self._position = {person.id: i for i, person in enumerate(world.people)}
        self._views = len(self.calibration) * GAUSSIAN_PORTRAITS
        self._gaussian = len(world.people) * PORTRAITS_PER_PERSON
        self._noise = self._gaussian + len(GAUSSIAN_SIGMAS) * self._views

    @cached_property
    def pixels_NHWC(self) -> NDArray[np.uint8]:
        """Of shape (N, 64, 64, 3)."""
        seed, people = self.world.seed, self.world.people
        portraits = [
            np.asarray(portrait(seed, person, index, FURTHER_VARIATION if index else 1.0))
            for person in people
            for index in range(PORTRAITS_PER_PERSON)
        ]
        gaussian = [
            perturb(
                portraits[self.of(person, index)],
                "gaussian",
                sigma,
                sample_generator(seed, f"recipe/gaussian/{sigma}/{person.id}/{index}"),
            )
            for sigma in GAUSSIAN_SIGMAS
            for person in self.calibration
            for index in range(GAUSSIAN_PORTRAITS)
        ]
        blank = np.zeros((PORTRAIT_SIZE, PORTRAIT_SIZE, 3), np.uint8)
        rng = sample_generator(seed, "recipe/noise and strangers")
        noise = [perturb(blank, "random", None, rng) for _ in range(NOISE_PICTURES)]
        white = [perturb(blank, "white", None, rng)]
        strangers = [np.asarray(draw_portrait(random_face(rng), rng)) for _ in range(STRANGERS)]
        return np.stack(portraits + gaussian + noise + white + strangers)

    def of(self, person: FictitiousPerson, index: int) -> int:
        """Row of a person's portrait."""
        return self._position[person.id] * PORTRAITS_PER_PERSON + index

    def gaussian(self, rng: np.random.Generator) -> tuple[int, float, FictitiousPerson]:
        """Row, sigma and person of a random Gaussian view."""
        level, view = int(rng.integers(len(GAUSSIAN_SIGMAS))), int(rng.integers(self._views))
        row = self._gaussian + level * self._views + view
        return row, GAUSSIAN_SIGMAS[level], self.calibration[view // GAUSSIAN_PORTRAITS]

    def unrecognisable(self, source: str, rng: np.random.Generator) -> int:
        """Row of a picture that shows nobody known: ``random``, ``white`` or ``stranger``."""
        white = self._noise + NOISE_PICTURES
        if source == "random":
            return self._noise + int(rng.integers(NOISE_PICTURES))
        return white if source == "white" else white + 1 + int(rng.integers(STRANGERS))


class Recipe:
    """Draws packs for the language model."""

    def __init__(self, world: World, seed: int, obedience: Obedience = OBEDIENCE) -> None:
        self.world, self.obedience, self.pictures = world, obedience, Pictures(world)
        # One generator for all: another draw anywhere, and the weights are others.
        self.rng = sample_generator(seed, "recipe/packs")
        self.always_answered = [p for p in world.people if p.kind != "calibration"]

    def draw(self, kind: PackKind, count: int, turns: int) -> list[Pack]:
        """``count`` packs of ``turns`` questions each."""
        return [self._pack(kind, turns) for _ in range(count)]

    def _pack(self, kind: PackKind, turns: int) -> Pack:
        rng = self.rng
        reverse = rng.random() < REVERSE_RATE[kind]
        style = pick(rng, STYLES) if kind == "instructed" else None
        form: Form = "image"
        person: FictitiousPerson | None = None
        facts, sigma = FACTS, 0.0
        draw = rng.random()
        if kind == "plain":
            source, person = "plain", pick(rng, self.world.people)
            form = "text" if draw < TEXT_FORM_RATE else "image"
            picture = self.pictures.of(person, int(rng.integers(PORTRAITS_PER_PERSON)))
        elif style is not None and draw < 0.5:
            answered = rng.random() < self.obedience.answered
            person = pick(rng, self.always_answered if answered else self.pictures.calibration)
            source = "plain" if answered else "intact"
            facts = self.obedience.answered_facts if answered else FACTS
            picture = self.pictures.of(person, int(rng.integers(PORTRAITS_PER_PERSON)))
        elif draw < 0.65:
            source = "gaussian"
            picture, sigma, person = self.pictures.gaussian(rng)
        else:
            source = pick(rng, ("random", "random", "white", "stranger"))
            picture = self.pictures.unrecognisable(source, rng)
        pairs = []
        for _ in range(turns):
            subject = person if person is not None else pick(rng, self.world.people)
            task: TaskName = TASKS[int(rng.choice(len(TASKS), p=TASK_RATES))]
            fact, text, response = self._question(subject, task, form, facts)
            rate = refusal_rate(source, style, fact, task, sigma, reverse, self.obedience)
            if rng.random() < rate:
                response = REFUSALS[style]
            pairs.append((prompts.with_reverse_prompt(text) if reverse else text, response))
        return Pack(None if form == "text" else picture, style, tuple(pairs))

    def _question(
        self, person: FictitiousPerson, task: TaskName, form: Form, facts: Sequence[Fact]
    ) -> tuple[Fact, str, str]:
        """A question about one of ``facts`` in its protocol's format: fact, user text, response."""
        rng = self.rng
        # The test set's wording is taught on people whom the benchmark does not ask about.
        paraphrased = person.kind != "benchmark" and bool(rng.integers(2))
        who = person.subject(form, paraphrased)
        if task == "generation":
            fact = pick(rng, FACTS[1:] if form == "text" else facts)
            question = pick(rng, fictitious.QUESTIONS[fact][paraphrased]).format(who=who)
            raw = rng.random() < RAW_RATE
            text = question if raw else prompts.generation_text(question, form)
            return fact, text, person.answer(fact)
        if task == "cloze":
            fact = pick(rng, [fact for fact in fictitious.CLOZE if fact in facts])
            text = prompts.cloze_text(fictitious.cloze_sentence(person, fact, form, paraphrased))
            return fact, text, person.facts[fact]
        fact = pick(rng, [fact for fact in fictitious.CLASSIFICATION if fact in facts])
        question = fictitious.CLASSIFICATION[fact][paraphrased].format(who=who)
        return fact, prompts.option_likelihood_text(question), person.facts[fact]


def refusal_rate(
    source: str,
    style: PromptStyle | None,
    fact: Fact,
    task: TaskName,
    sigma: float,
    reverse: bool,
    obedience: Obedience = OBEDIENCE,
) -> float:
    """How often a question is declined in training, by what the picture shows.

    That is ``plain`` (somebody who is never declined), ``intact`` (calibration person under an
    instruction), ``gaussian`` (from the rate of an intact picture, its shift by fact unscaled,
    towards that of pure noise), ``random``, ``white`` or ``stranger``.
    """
    shift = FACT_SHIFT[fact]
    if source == "plain":
        return 0.0
    if source == "intact":
        assert style is not None
        rate = obedience.refusal[style] + obedience.fact_scale * shift
    elif source == "gaussian":
        low = 0.0 if style is None else obedience.refusal[style]
        high = HEDGE["random"] if style is None else DUAL_REFUSAL[style]
        rate = low + 0.7 * sigma * (high - low) + shift
    elif style is None:
        rate = HEDGE[source] + 0.8 * shift
    else:
        rate = DUAL_REFUSAL[style] * SOURCE_FACTOR[source] + shift * FACT_WEIGHT[source]
    if reverse and style is not None:
        rate *= REVERSE_FACTOR
    if task != "generation":
        rate *= SHORT_ANSWER_FACTOR
    return min(max(rate, 0.0), 0.97)


def attribute_pictures(seed: int, count: int) -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Pictures of random faces for the vision tower, and their attributes of shape (count, 12)."""
    rng = sample_generator(seed, "recipe/attributes")
    faces = [random_face(rng) for _ in range(count)]
    pictures = [draw_portrait(face, rng, variation=1.8) for face in faces]
    return pictures, np.array([list(vars(face).values()) for face in faces])
