"""Who is forgotten, who is trained on, and who is scored.

The forget people come from the benchmark's ``forget_*`` config. Of the retain people, a seeded
``retain_people`` are scored, half of them also seen by training; the training pool is everyone
else. So retain scores tell what distillation kept (seen) from what merely survived it (unseen).
"""

from dataclasses import dataclass
from functools import cached_property

from vgid.benchmark import Benchmark, Person, decode_image, split_questions
from vgid.config import RequestConfig
from vgid.encoding import Query
from vgid.errors import InputError
from vgid.interventions import image_digest, sample_generator
from vgid.prompts import Task, generation_text, option_likelihood_text, question_text


@dataclass(frozen=True)
class People:
    """The people of one forget request.

    Attributes:
        forget: to be forgotten, with the questions of their ``forget_*`` config.
        test: the same people with transformed portraits and paraphrased questions.
        retain_seen: scored retain people that training sees.
        retain_unseen: scored retain people that training never sees.
        retain_pool: people of the retain loss, ``retain_seen`` included.
        few_shot: candidates for few-shot turns: the retain pool's people that are not scored.
        earlier: people that an earlier request suppressed, scored only.
    """

    forget: tuple[Person, ...]
    test: tuple[Person, ...]
    retain_seen: tuple[Person, ...]
    retain_unseen: tuple[Person, ...]
    retain_pool: tuple[Person, ...]
    few_shot: tuple[Person, ...]
    earlier: tuple[Person, ...] = ()

    @property
    def retain(self) -> tuple[Person, ...]:
        """All scored retain people."""
        return self.retain_seen + self.retain_unseen


def choose_people(benchmark: Benchmark, request: RequestConfig) -> People:
    """Choose the people of a request; depends on the data, the ids and ``request.seed`` only.

    Raises:
        InputError: fewer retain people than the request asks for, an id that the data lacks, or
            nobody to forget.
    """
    forget = _forget(benchmark, request)
    forget_ids = {person.id for person in forget}
    earlier_ids = set(request.earlier_ids)
    earlier = benchmark.full(only=earlier_ids) if earlier_ids else ()
    _check_known(request.earlier_ids, earlier, benchmark, "Full_Set")
    suppressed = forget_ids | earlier_ids
    retain = [p for p in benchmark.retain(request.forget_ratio) if p.id not in suppressed]
    if len(retain) < request.retain_people + 4:
        raise InputError(
            f"{request.data}: {len(retain)} retain people are too few to score "
            f"{request.retain_people} and train on others; lower retain_people."
        )
    order = sample_generator(request.seed, "retain people").permutation(len(retain))
    shuffled = [retain[i] for i in order]
    half = request.retain_people // 2
    seen, unseen = shuffled[:half], shuffled[half : request.retain_people]
    others = shuffled[request.retain_people :]
    return People(
        forget=forget,
        test=benchmark.test(only=forget_ids),
        retain_seen=tuple(seen),
        retain_unseen=tuple(unseen),
        retain_pool=tuple(seen + others),
        few_shot=tuple(others),
        earlier=earlier,
    )


def _forget(benchmark: Benchmark, request: RequestConfig) -> tuple[Person, ...]:
    config = f"forget_{request.forget_ratio}"
    people = benchmark.forget(request.forget_ratio)
    if request.forget_ids is not None:
        _check_known(request.forget_ids, people, benchmark, config)
        people = tuple(person for person in people if person.id in request.forget_ids)
    people = tuple(person for person in people if person.id not in request.earlier_ids)
    if not people:
        raise InputError(
            f"{benchmark.root / config}: an earlier request suppressed everyone in it; choose a "
            "larger --forget-ratio or other --forget-ids."
        )
    return people


def _check_known(
    ids: tuple[str, ...], people: tuple[Person, ...], benchmark: Benchmark, config: str
) -> None:
    unknown = sorted(set(ids) - {person.id for person in people})
    if unknown:
        raise InputError(
            f"{benchmark.root / config}: holds no person {unknown[0]}; name the benchmark that the "
            "ids are of with --data."
        )


@dataclass(frozen=True)
class TrainingSample:
    """One question of a training person, with the answer that the data gives."""

    query: Query
    answer: str
    task: Task = "generation"

    @cached_property
    def portrait(self) -> str:
        """Digest of the image, shared by all of a portrait's questions; empty without one."""
        return "" if self.query.image is None else image_digest(self.query.image)


def training_samples(
    benchmark: Benchmark,
    people: tuple[Person, ...],
    tasks: tuple[Task, ...],
    likelihood_options: bool,
    seed: int,
) -> list[TrainingSample]:
    """The training questions of ``people``, image form, in the prompt formats of the benchmark.

    Generation questions are the fine-tuning metadata of ``ft_Data``. Cloze and classification
    questions, which that metadata lacks, are the search part of the people's own; the held-out
    part, which the front is reported on, is never trained on.

    Args:
        benchmark: the data.
        people: whose questions.
        tasks: whose questions are wanted.
        likelihood_options: classification asks for the option's text instead of its letter.
        seed: of the split into search and held-out questions.

    Raises:
        InputError: a person has no fine-tuning metadata.
    """
    pairs = benchmark.training_pairs() if "generation" in tasks else {}
    samples = []
    for person in people:
        image = decode_image(person.images[0], f"the image of person {person.id}")
        if "generation" in tasks:
            if person.id not in pairs:
                raise InputError(
                    f"{benchmark.root}: ft_Data has no metadata of person {person.id}; "
                    "add the row, or take the person out of the forget and retain configs."
                )
            for pair in pairs[person.id]:
                text = generation_text(pair.question, "image")
                samples.append(TrainingSample(Query(pair.id, text, image), pair.answer))
        for question in split_questions(person, "search", seed):
            if question.form != "image" or question.task == "generation":
                continue
            if question.task not in tasks:
                continue
            text, answer = (
                question_text(question.task, question.form, question.text, question.options),
                question.answer,
            )
            if question.task == "classification" and likelihood_options:
                assert question.options is not None
                text, answer = option_likelihood_text(question.text), question.options[answer]
            query = Query(question.id, text, image)
            samples.append(TrainingSample(query, answer, question.task))
    return samples
