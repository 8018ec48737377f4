"""Who is forgotten, who is trained on, and who is scored, on which questions.

Of the retain people, a seeded ``retain_people`` are scored, half of them also seen by training; the
training pool is everyone else. So retain scores tell what distillation kept (seen) from what merely
survived it (unseen). In a few steps training shows a part of a large pool only, so those to be seen
come first in it.

Training questions are the pairs of ``ft_Data``, which may repeat the evaluation's questions word
for word. Pairs that are search questions are trained on; pairs that are held-out questions only
where the request says ``train_pairs: all``.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vgid.config import Method, RequestConfig, uses
from vgid.data.benchmark import Benchmark, Person, split_questions
from vgid.data.people import comparable
from vgid.errors import InputError
from vgid.prompts import Task
from vgid.results import Verbatim
from vgid.seeds import sample_generator

Said = tuple[str, str]
"""A person's ID and what is asked about them, as ``comparable`` gives it."""


@dataclass(frozen=True)
class People:
    """The people of one forget request.

    Attributes:
        forget: with the questions of their ``forget_*`` config.
        test: the same people with transformed portraits and paraphrased questions.
        retain_seen: scored retain people that training sees, before others of the pool.
        retain_unseen: scored retain people that training never sees.
        retain_pool: people of the retain loss, ``retain_seen`` included.
        few_shot: candidates for few-shot turns: the retain pool's people that are not scored.
        earlier: people that an earlier request suppressed, scored only.
        celebrities: scored only; none where the data has none.
    """

    forget: tuple[Person, ...]
    test: tuple[Person, ...]
    retain_seen: tuple[Person, ...]
    retain_unseen: tuple[Person, ...]
    retain_pool: tuple[Person, ...]
    few_shot: tuple[Person, ...]
    earlier: tuple[Person, ...] = ()
    celebrities: tuple[Person, ...] = ()

    @property
    def retain(self) -> tuple[Person, ...]:
        """All scored retain people."""
        return self.retain_seen + self.retain_unseen


def choose_people(benchmark: Benchmark, request: RequestConfig) -> People:
    """Choose the people of a request; depends on the data, the ids and ``request.seed`` only.

    InputError where there are fewer than the request asks for, or nobody to forget.
    """
    forget = _forget(benchmark, request)
    forget_ids = {person.id for person in forget}
    earlier = benchmark.full(only=request.earlier_ids) if request.earlier_ids else ()
    _check_known(request.earlier_ids, earlier, benchmark.root / "Full_Set")
    suppressed = forget_ids.union(request.earlier_ids)
    retain = [p for p in benchmark.retain(request.forget_ratio) if p.id not in suppressed]
    if len(retain) < request.retain_people + 4:
        raise InputError(
            f"{request.data}: {len(retain)} retain people are too few to score "
            f"{request.retain_people} and train on others; lower retain_people."
        )
    order = sample_generator(request.seed, "retain people").permutation(len(retain))
    shuffled = [retain[i] for i in order]
    half = request.retain_people // 2
    # From one shuffle, so that seen and unseen people differ in nothing but training.
    seen, unseen = shuffled[:half], shuffled[half : request.retain_people]
    others = shuffled[request.retain_people :]
    celebrities: tuple[Person, ...] = ()
    if benchmark.has_celebrities():
        # As many as scored retain people at most: the benchmark's 153 would take longest.
        ids = benchmark.person_ids("Retain_Set")
        order = sample_generator(request.seed, "celebrities").permutation(len(ids))
        celebrities = benchmark.celebrities(only={ids[i] for i in order[: request.retain_people]})
    return People(
        forget=forget,
        test=benchmark.test(only=forget_ids),
        retain_seen=tuple(seen),
        retain_unseen=tuple(unseen),
        retain_pool=tuple(seen + others),
        # Nobody who is scored: a turn with a person's answers would give the next question's away.
        few_shot=tuple(others),
        earlier=earlier,
        celebrities=celebrities,
    )


def _forget(benchmark: Benchmark, request: RequestConfig) -> tuple[Person, ...]:
    place = benchmark.root / f"forget_{request.forget_ratio}"
    people = benchmark.forget(request.forget_ratio)
    if request.forget_ids is not None:
        _check_known(request.forget_ids, people, place)
        people = tuple(person for person in people if person.id in request.forget_ids)
    people = tuple(person for person in people if person.id not in request.earlier_ids)
    if not people:
        raise InputError(
            f"{place}: an earlier request suppressed everyone in it; choose a larger "
            "--forget-ratio or other --forget-ids."
        )
    return people


def _check_known(ids: Collection[str], people: Collection[Person], place: Path) -> None:
    for unknown in sorted(set(ids) - {person.id for person in people}):
        raise InputError(
            f"{place}: holds no person {unknown}; name the benchmark that the ids are of with "
            "--data."
        )


def held_out_of_training(people: People, request: RequestConfig) -> frozenset[Said]:
    """The held-out questions of all whom training sees, scored or not; none if it may have all."""
    if request.train_pairs == "all":
        return frozenset()
    return frozenset(
        (person.id, comparable(question.text))
        for person in (*people.forget, *people.test, *people.retain_pool)
        for question in split_questions(person, "held_out", request.seed)
    )


def count_verbatim(
    benchmark: Benchmark,
    people: People,
    request: RequestConfig,
    method: Method,
    tasks: Collection[Task],
) -> Verbatim:
    """How many of the scored generation questions training sees word for word, wrapped or raw."""
    left_out = held_out_of_training(people, request)
    # Retain people are trained on by methods with a retain term only.
    trained = people.forget + (people.retain_pool if uses(method, "beta") else ())
    pairs = benchmark.training_pairs() if "generation" in tasks else {}
    seen = {
        (person.id, comparable(pair.question))
        for person in trained
        for pair in pairs.get(person.id, ())
    }.difference(left_out)
    counts: Verbatim = {"search": {}, "held_out": {}}
    splits = {"forget": people.forget, "test": people.test, "retain": people.retain}
    for part, found in counts.items():
        for split, members in splits.items():
            for question in (q for p in members for q in split_questions(p, part, request.seed)):
                if question.task != "generation":
                    continue
                name = split if question.form == "image" else f"{split}_text"
                count = found.setdefault(name, {"scored": 0, "seen": 0})
                count["scored"] += 1
                count["seen"] += (question.person_id, comparable(question.text)) in seen
    return counts
