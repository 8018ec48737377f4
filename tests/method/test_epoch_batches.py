from collections import Counter
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

from vgid.config import TrialConfig
from vgid.method.distillation import DistillationSet, epoch_batches, retain_batches

MLLMU = {"generation": 7, "cloze": 1}
"""Training questions of a person of MLLMU-Bench: ``ft_Data``'s pairs and the search cloze."""
SYNTHETIC = {"generation": 12, "cloze": 2, "classification": 4}


def plan(
    tasks: list, portraits: list | None = None, targets: Any = (), first: Any = (), **settings: Any
) -> tuple[DistillationSet, Any]:
    """A set that only its order matters of, and a config."""
    data = DistillationSet([None] * len(tasks), targets, tasks, first=first)  # type: ignore[list-item]
    vars(data)["portraits"] = portraits or list(range(len(tasks)))
    return data, TrialConfig(**{"batch_size": 12, "retain_batch_size": 6, **settings})


def of_people(people: int, counts: dict[str, int]) -> tuple[list[str], list[int]]:
    """Tasks and portraits of that many people, person by person as the data has them."""
    one = [task for task, n in counts.items() for _ in range(n)]
    return one * people, [person for person in range(people) for _ in one]


def furthest_from_proportion(order: list[int], tasks: list[str]) -> float:
    """Over all stretches and tasks: questions of the task beyond or below its share, at most."""
    reach = []
    for task, count in Counter(tasks).items():
        mine = np.cumsum([0] + [tasks[i] == task for i in order])
        ahead = mine - count / len(tasks) * np.arange(len(order) + 1)
        reach.append(ahead.max() - ahead.min())  # a stretch is a difference of two beginnings
    return max(reach)


def test_epoch_batches_cover_everything_once_in_nearly_equal_parts():
    data, config = plan(["generation"] * 70)
    batches = epoch_batches(data, config, epoch=3)
    assert sorted(i for b in batches for i in b) == list(range(70))
    assert {len(b) for b in batches} == {11, 12}
    assert batches == epoch_batches(data, config, epoch=3)
    assert batches != epoch_batches(data, config, epoch=4)
    assert batches != epoch_batches(data, plan([], seed=1)[1], epoch=3)


@pytest.mark.parametrize("people", [5, 24, 25])
@pytest.mark.parametrize("questions_per_image", [1, 2, 4])
@pytest.mark.parametrize(("counts", "bound"), [(MLLMU, 2.5), (SYNTHETIC, 3.5)])
def test_an_epoch_shows_each_question_once_and_any_stretch_the_tasks_in_proportion(
    people, questions_per_image, counts, bound
):
    tasks, portraits = of_people(people, counts)
    data, config = plan(tasks, portraits, questions_per_image=questions_per_image)
    for epoch in range(3):
        order = list(chain(*epoch_batches(data, config, epoch)))
        assert sorted(order) == list(range(len(tasks)))
        assert furthest_from_proportion(order, tasks) <= bound


def test_people_with_fewer_questions_are_spread_over_the_epoch_too():
    few = {0: 3, 1: 1}
    portraits = [p for p in range(25) for _ in range(few.get(p, 8))]
    tasks = ["cloze" if p > 1 and i % 8 == 4 else "generation" for i, p in enumerate(portraits)]
    assert Counter(tasks)["cloze"] == 23
    data, config = plan(tasks, portraits)
    order = list(chain(*epoch_batches(data, config, 0)))
    assert sorted(order) == list(range(len(portraits)))
    assert furthest_from_proportion(order, tasks) <= 2.5
    places = [place for place, i in enumerate(order) if portraits[i] == 0]
    assert min(np.diff(places)) > len(order) / 6


def test_questions_of_a_portrait_follow_each_other_and_all_portraits_get_their_turn():
    portraits = [p for p in range(4) for _ in range(6)]
    data, config = plan(["generation"] * 24, portraits, questions_per_image=3)
    order = [portraits[i] for batch in epoch_batches(data, config, 0) for i in batch]
    threes = [order[i : i + 3] for i in range(0, 24, 3)]
    assert all(len(set(three)) == 1 for three in threes)
    assert sorted(t[0] for t in threes[:4]) == sorted(t[0] for t in threes[4:]) == [0, 1, 2, 3]


def test_mixed_targets_take_turns_for_every_question_and_halve_each_task():
    """With an epoch that drew the cloze questions most, 31 % of the others had one target only."""
    tasks, portraits = of_people(25, MLLMU)
    targets = [[(source, i) for i in range(len(tasks))] for source in ("teacher", "reference")]
    data, config = plan(tasks, portraits, targets)
    met: dict[int, list[str]] = {}
    for epoch in range(4):
        halves = Counter()
        for i in chain(*epoch_batches(data, config, epoch)):
            (((source, j),),) = data.rounds([i], epoch)
            assert j == i
            met.setdefault(i, []).append(source)
            halves[tasks[i], source] += 1
        for task, n in Counter(tasks).items():
            assert abs(halves[task, "teacher"] - n / 2) <= 0.5
    assert met.keys() == set(range(len(tasks)))
    turns = [["teacher", "reference"] * 2, ["reference", "teacher"] * 2]
    assert all(sources in turns for sources in met.values())
    # Nor does one person begin with the teacher only.
    begins = Counter(portraits[i] for i, sources in met.items() if sources[0] == "teacher")
    assert len(begins) == 25 and max(begins.values()) < 8


def test_retain_passes_hold_every_question_once_in_nearly_equal_parts():
    data, config = plan(["generation"] * 20)
    drawn = list(islice(retain_batches(data, config), 8))
    for one_pass in (drawn[:4], drawn[4:]):
        assert sorted(chain(*one_pass)) == list(range(20))
        assert {len(batch) for batch in one_pass} == {5}
    assert drawn[:4] != drawn[4:]
    for start in (1, 4, 6):
        assert list(islice(retain_batches(data, config, start), 2)) == drawn[start : start + 2]
    assert sorted(next(retain_batches(plan(["generation"] * 4)[0], config))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("batch_size", "questions_per_image", "portraits_drawn"), [(4, 1, 300), (8, 4, 150)]
)
def test_people_to_be_seen_are_shown_in_75_steps_of_450_people(
    batch_size, questions_per_image, portraits_drawn, monkeypatch
):
    """Drawn from all alike, 8 of the 25 were; and the order was drawn at each of the steps."""
    calls = []
    draw = DistillationSet.batches
    monkeypatch.setattr(DistillationSet, "batches", lambda *a: calls.append(a) or draw(*a))
    tasks, portraits = of_people(450, MLLMU)
    settings = {"retain_batch_size": batch_size, "questions_per_image": questions_per_image}
    seen = set(range(100, 125))
    first = [i for i, person in enumerate(portraits) if person in seen]
    drawn = {
        name: {portraits[i] for i in chain(*islice(retain_batches(data, config), 75))}
        for name, (data, config) in {
            "first": plan(tasks, portraits, first=first, **settings),
            "alike": plan(tasks, portraits, **settings),
        }.items()
    }
    assert len(calls) == 2
    assert seen <= drawn["first"] and len(drawn["alike"] & seen) < 25
    assert len(drawn["first"]) == len(drawn["alike"]) == portraits_drawn


def test_the_first_come_first_in_every_pass_and_whole_passes_are_as_before():
    tasks, portraits = of_people(30, MLLMU)
    first = [i for i, person in enumerate(portraits) if person in (3, 4)]
    data, config = plan(tasks, portraits, first=first, retain_batch_size=2)
    for start in (0, 120):
        assert {portraits[i] for i in next(retain_batches(data, config, start))} == {3, 4}
    order = list(chain(*islice(retain_batches(data, config), 120)))
    assert sorted(order) == list(range(240))
    assert furthest_from_proportion(order, tasks) <= 2.5
