"""The questions that unlearning trains on, in the prompt formats of the benchmark."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from PIL import Image

from vgid.config import TrainWording, TrialConfig
from vgid.data.benchmark import Benchmark, Person, decode_image, split_questions
from vgid.data.people import TrainingPair, comparable
from vgid.data.splits import Said
from vgid.errors import InputError
from vgid.models.encoding import Query
from vgid.prompts import Task, Wording, generation_text, option_likelihood_text, question_text
from vgid.seeds import image_digest


@dataclass(frozen=True)
class TrainingSample:
    """One question of a training person, with the answer that the data gives."""

    query: Query
    answer: str
    task: Task = "generation"
    person_id: str = ""

    @cached_property
    def portrait(self) -> str:
        """Digest of the image, shared by all of a portrait's questions; empty without one."""
        return "" if self.query.image is None else image_digest(self.query.image)


def training_samples(
    benchmark: Benchmark,
    people: tuple[Person, ...],
    trial: TrialConfig,
    likelihood_options: bool,
    seed: int,
    left_out: Collection[Said] = frozenset(),
) -> list[TrainingSample]:
    """The training questions of ``people``, image form, in the prompt formats of the benchmark.

    Generation questions are the metadata of ``ft_Data``, others the search part of the people's
    own; with ``likelihood_options``, classification asks for the option's text. Those ``left_out``
    are scored. A person without metadata, or no question at all, is an ``InputError``.
    """
    tasks = trial.train_tasks
    pairs = benchmark.training_pairs() if "generation" in tasks else {}
    samples = []
    for person in people:
        image = decode_image(person.images[0], f"the image of person {person.id}")
        if "generation" in tasks:
            if person.id not in pairs and not benchmark.skip_defects:
                raise InputError(
                    f"{benchmark.root}: ft_Data has no metadata of person {person.id}; "
                    "add the row, or take the person out of the forget and retain configs."
                )
            samples += worded(pairs.get(person.id, ()), image, trial.train_wording, left_out)
        for question in split_questions(person, "search", seed):
            if question.form != "image" or question.task == "generation":
                continue
            if question.task not in tasks or (person.id, comparable(question.text)) in left_out:
                continue
            text = question_text(question.task, question.form, question.text, question.options)
            answer = question.answer
            if likelihood_options and question.options is not None:
                text, answer = option_likelihood_text(question.text), question.options[answer]
            query = Query(question.id, text, image)
            samples.append(TrainingSample(query, answer, question.task, person.id))
    if people and not samples:
        raise InputError(
            f"{benchmark.root}: every training question of the {len(people)} people is scored as "
            "held-out; add others, or train on all with --train-pairs all."
        )
    return samples


def worded(
    pairs: Collection[TrainingPair],
    image: Image.Image,
    wording: TrainWording,
    left_out: Collection[Said] = (),
) -> list[TrainingSample]:
    """A person's generation samples: all pairs in one wording, then in the other."""
    samples = []
    wordings: tuple[Wording, ...] = ("wrapped", "raw") if wording == "both" else (wording,)
    for each, pair in product(wordings, pairs):
        if (pair.person_id, comparable(pair.question)) not in left_out:
            name = pair.id if each == "wrapped" else f"{pair.id}/{each}"
            query = Query(name, generation_text(pair.question, "image", each), image)
            samples.append(TrainingSample(query, pair.answer, person_id=pair.person_id))
    return samples
