from collections import Counter
from typing import Any

import pytest

from vgid.config import TrialConfig
from vgid.distillation import DistillationSet, epoch_batches, retain_batch


def plan(
    tasks: list, portraits: list | None = None, **settings: Any
) -> tuple[DistillationSet, Any]:
    """A set that only its order matters of, and a config."""
    data = DistillationSet([None] * len(tasks), [], tasks)  # type: ignore[list-item]
    vars(data)["portraits"] = portraits or list(range(len(tasks)))
    return data, TrialConfig(**{"batch_size": 12, "retain_batch_size": 6, **settings})


def test_epoch_batches_cover_everything_once_in_nearly_equal_parts():
    data, config = plan(["generation"] * 70)
    batches = epoch_batches(data, config, epoch=3)
    assert sorted(i for b in batches for i in b) == list(range(70))
    assert {len(b) for b in batches} == {11, 12}
    assert batches == epoch_batches(data, config, epoch=3)
    assert batches != epoch_batches(data, config, epoch=4)
    assert batches != epoch_batches(data, plan([], seed=1)[1], epoch=3)


@pytest.mark.parametrize("people", [5, 6])
@pytest.mark.parametrize("questions_per_image", [1, 2, 3])
def test_batches_hold_the_tasks_in_equal_parts_and_repeat_none_too_early(
    people, questions_per_image
):
    one = ["generation"] * 12 + ["cloze"] * 2 + ["classification"] * 4
    tasks = one * people
    portraits = [p for p in range(people) for _ in one]
    data, config = plan(tasks, portraits, questions_per_image=questions_per_image)
    batches = epoch_batches(data, config, epoch=0)
    assert sum(map(len, batches)) == len(tasks)
    for batch in batches:
        counts = Counter(tasks[i] for i in batch)
        assert max(counts.values()) - min(counts.values()) <= 2
    seen = Counter(i for batch in batches for i in batch)
    for task, times in (("generation", {0, 1}), ("cloze", {3}), ("classification", {1, 2})):
        assert {seen[i] for i, t in enumerate(tasks) if t == task} == times


def test_questions_of_a_portrait_follow_each_other_and_all_portraits_get_their_turn():
    portraits = [p for p in range(4) for _ in range(6)]
    data, config = plan(["generation"] * 24, portraits, questions_per_image=3)
    order = [portraits[i] for batch in epoch_batches(data, config, 0) for i in batch]
    threes = [order[i : i + 3] for i in range(0, 24, 3)]
    assert all(len(set(three)) == 1 for three in threes)
    assert sorted(t[0] for t in threes[:4]) == sorted(t[0] for t in threes[4:]) == [0, 1, 2, 3]


def test_retain_batches_pass_without_replacement():
    data, config = plan(["generation"] * 20)
    one_pass = [retain_batch(data, config, step) for step in range(3)]
    drawn = [i for batch in one_pass for i in batch]
    assert len(set(drawn)) == len(drawn) == 18
    assert retain_batch(data, config, 3) != one_pass[0]
    assert sorted(retain_batch(plan(["generation"] * 4)[0], config, 0)) == [0, 1, 2, 3]
