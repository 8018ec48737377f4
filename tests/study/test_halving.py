"""The rule of a rung against a twin that looks at each pair, and what must hold of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgid.results import rungs
from vgid.study.halving import best_first, goes_on

SCORE = st.one_of(st.integers(0, 4).map(float), st.floats(-1, 1))
RUNGS = st.integers(1, 3).flatmap(
    lambda objectives: st.lists(st.tuples(*[SCORE] * objectives), min_size=1, max_size=12)
)
ETA = st.integers(1, 5)


def dominates(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def by_hand(points):
    """Best first: fronts by looking at each pair, the farthest of each by all distances."""
    lows, highs = ([pick(axis) for axis in zip(*points, strict=True)] for pick in (min, max))

    def apart(a, b):
        total = 0.0
        for x, y, low, high in zip(a, b, lows, highs, strict=True):
            width = high - low if high > low else 1.0
            total += ((x - low) / width - (y - low) / width) ** 2
        return total

    left, ordered = sorted(points, reverse=True), []
    while left:
        front = [p for p in left if not any(dominates(q, p) for q in left)]
        left = [p for p in left if p not in front]
        chosen = [front.pop(0)]
        while front:
            gaps = [min(apart(p, c) for c in chosen) for p in front]
            chosen.append(front.pop(gaps.index(max(gaps))))
        ordered += chosen
    return ordered


@given(RUNGS, ETA)
def test_it_is_what_a_twin_finds_by_hand(points, eta):
    assert best_first(points) == by_hand(points)
    newcomer, *others = points
    kept = by_hand(points)[: math.ceil(len(points) / eta)]
    assert goes_on(newcomer, others, eta) == (newcomer in kept)


@given(RUNGS, ETA, st.data())
def test_who_dominates_all_is_never_stopped(others, eta, data):
    best = [max(axis) for axis in zip(*others, strict=True)]
    more = data.draw(st.lists(st.sampled_from([0.0, 0.5]), min_size=len(best), max_size=len(best)))
    newcomer = tuple(x + by for x, by in zip(best, more, strict=True))
    assert goes_on(newcomer, others, eta)


@given(RUNGS, ETA, st.data())
def test_the_order_of_arrival_changes_nothing(points, eta, data):
    newcomer, *others = points
    shuffled = data.draw(st.permutations(others))
    assert goes_on(newcomer, shuffled, eta) == goes_on(newcomer, others, eta)


@given(RUNGS, ETA)
def test_one_of_eta_goes_on_at_least_and_all_do_for_one(points, eta):
    verdicts = [goes_on(p, points[:i] + points[i + 1 :], eta) for i, p in enumerate(points)]
    assert sum(verdicts) >= math.ceil(len(points) / eta)
    if len(set(points)) == len(points):
        assert sum(verdicts) == math.ceil(len(points) / eta)
    assert all(verdicts) or eta > 1
    assert goes_on(points[0], [], eta)


@pytest.mark.parametrize(
    ("eta", "epochs", "expected"),
    [(1, 5, []), (2, 1, []), (2, 2, [1]), (2, 5, [1, 2, 4]), (2, 8, [1, 2, 4]), (3, 10, [1, 3, 9])],
)
def test_rungs_are_powers_of_eta_before_the_last_epoch(eta, epochs, expected):
    assert rungs(eta, epochs) == expected
