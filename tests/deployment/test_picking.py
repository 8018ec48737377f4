"""The rules of a pick, against brute force and cases worked out by hand."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgid.deployment.rules import Bounds, Marks, Measure, choose
from vgid.errors import InputError

BASE_FORGET, BASE_RETAIN = 1.0, 0.98
FREE = Bounds(forget=None)
THOUSANDTHS = st.integers(0, 1000).map(lambda i: i / 1000)
BOUNDS = st.none() | THOUSANDTHS


def marks(trial_id, reduction, retain, rise=0.0, cloze=0.2):
    return Marks(
        trial_id,
        BASE_FORGET,
        Measure(reduction, reduction - 0.05),
        Measure(retain, retain - 0.05),
        Measure(BASE_RETAIN - retain, BASE_RETAIN - retain + 0.05),
        Measure(rise, rise + 0.05),
        Measure(cloze, cloze + 0.3),
    )


@st.composite
def fronts(draw):
    rows = draw(st.lists(st.tuples(*[THOUSANDTHS] * 4), min_size=1, max_size=8))
    return [marks(f"{i:04d}", *row) for i, row in enumerate(rows)]


def keeps(m, bounds):
    """Whether a candidate keeps the bounds, in whole thousandths."""
    pairs = (
        (m.retain_drop, bounds.retain_drop),
        (m.reverse_rise, bounds.reverse_rise),
        (m.cloze, bounds.cloze),
    )
    enough = bounds.forget is None or (
        round(1000 * m.reduction.worst) >= round(1000 * bounds.forget * BASE_FORGET)
    )
    return enough and all(b is None or round(1000 * m.value) <= round(1000 * b) for m, b in pairs)


@given(fronts(), st.builds(Bounds, BOUNDS, BOUNDS, BOUNDS, BOUNDS))
def test_max_forget_is_the_most_forgetting_of_those_within_the_bounds(candidates, bounds):
    within = [m for m in candidates if keeps(m, bounds)]
    if not within:
        with pytest.raises(InputError, match="none of the front's"):
            choose(candidates, "max-forget", bounds)
        return
    chosen = choose(candidates, "max-forget", bounds).chosen
    assert chosen in within
    for other in within:
        assert (other.reduction.value, other.retain.value) <= (
            chosen.reduction.value,
            chosen.retain.value,
        )


@given(fronts(), BOUNDS, BOUNDS)
def test_constraint_is_max_forget_with_the_two_default_bounds(candidates, drop, rise):
    full = Bounds(0.05 if drop is None else drop, 0.03 if rise is None else rise)
    try:
        expected = choose(candidates, "max-forget", full).chosen
    except InputError:
        with pytest.raises(InputError):
            choose(candidates, "constraint", Bounds(drop, rise))
        return
    assert choose(candidates, "constraint", Bounds(drop, rise)).chosen == expected


@given(fronts())
def test_the_knee_is_farthest_from_the_line_through_the_extremes(candidates):
    """Distance to a line by its textbook formula, the front by comparing all pairs."""
    points = [(m.reduction.value, m.retain.value) for m in candidates]
    front = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    chosen = choose(candidates, "knee", FREE).chosen
    point = (chosen.reduction.value, chosen.retain.value)
    assert point in front
    ax, ay = min(front)
    bx, by = max(front)
    if (ax, ay) == (bx, by):
        return

    def height(p):
        x, y = (p[0] - ax) / (bx - ax), (p[1] - by) / (ay - by)
        return (x * 1 + y * 1 - 1) / math.hypot(1, 1)

    assert height(point) >= max(map(height, front)) - 1e-12


@given(fronts(), st.sampled_from(["knee", "max-forget", "constraint"]), st.randoms())
def test_the_order_of_the_candidates_does_not_matter(candidates, rule, draw):
    wide = Bounds(1.0, 1.0, forget=None)
    first = choose(candidates, rule, wide)
    shuffled = list(candidates)
    draw.shuffle(shuffled)
    assert choose(shuffled, rule, wide) == first
    assert sorted(m.trial_id for m in first.order) == [m.trial_id for m in candidates]
    assert set(first.why) == {m.trial_id for m in candidates}


@given(fronts(), st.sampled_from(["knee", "max-forget"]))
def test_a_bound_that_the_choice_keeps_does_not_change_it(candidates, rule):
    chosen = choose(candidates, rule, FREE).chosen
    tight = Bounds(
        max(chosen.retain_drop.value, 0.0),
        chosen.reverse_rise.value,
        chosen.cloze.value,
        chosen.gone.worst,
    )
    assert choose(candidates, rule, tight).chosen == chosen


BEND = [
    marks("0001", 0.20, 0.97),
    marks("0002", 0.80, 0.95),  # 0.02 of retain for 0.6 of forgetting: the knee
    marks("0003", 0.90, 0.85, rise=0.2),
    marks("0004", 0.95, 0.60),
    marks("0005", 0.79, 0.94),  # dominated by 0002
]


def test_a_bend_worked_out_by_hand():
    assert choose(BEND, "knee", Bounds()).chosen.trial_id == "0002"
    assert choose(BEND, "max-forget", Bounds()).chosen.trial_id == "0004"
    assert choose(BEND, "max-forget", Bounds(retain_drop=0.15)).chosen.trial_id == "0003"
    assert choose(BEND, "constraint", Bounds()).chosen.trial_id == "0002"
    assert choose(BEND, "constraint", Bounds(retain_drop=0.4)).chosen.trial_id == "0004"
    gentle = Bounds(retain_drop=0.02, forget=None)
    assert choose(BEND, "knee", gentle).chosen.trial_id == "0001"


def test_where_no_trial_is_above_the_chord_the_one_that_forgets_most_is_taken():
    hollow = [marks("0001", 0.1, 0.97), marks("0002", 0.5, 0.70), marks("0003", 0.9, 0.65)]
    for candidates in (hollow, [hollow[0], hollow[2]]):
        choice = choose(candidates, "knee", FREE)
        assert choice.chosen.trial_id == "0003"
        assert choice.why["0003"].startswith("chosen: no trial lies above the chord")


def test_everyone_is_told_why_not():
    choice = choose(BEND, "constraint", Bounds())
    assert [m.trial_id for m in choice.order] == ["0002", "0005", "0003", "0004", "0001"]
    assert choice.why["0002"] == "chosen: forgets most within the bounds"
    assert choice.why["0005"] == "forgets 0.010 less, keeps 0.010 less"
    assert choice.why["0001"] == (
        "share forgotten 0.200, by its interval perhaps 0.150, where 0.5 is asked for "
        "(0.350 too little)"
    )
    assert choice.why["0003"] == (
        "retain drop 0.130 where 0.05 is allowed (0.080 too much) and "
        "reverse rise 0.200 where 0.03 is allowed (0.170 too much)"
    )
    assert (
        str(choice) == "constraint, share forgotten ≥ 0.5, retain drop ≤ 0.05, reverse rise ≤ 0.03"
    )


def test_a_bound_is_met_by_what_equals_it_in_decimals():
    drop = 0.80 - 0.75
    assert drop > 0.05
    one = Marks(
        "0001", 1.0, Measure(0.9, 0.9), Measure(0.75, 0.7), Measure(drop, drop), Measure(0, 0)
    )
    assert choose([one], "constraint", Bounds()).chosen == one


@pytest.mark.parametrize("rule", ["knee", "max-forget", "constraint"])
def test_what_forgets_nothing_is_no_candidate(rule):
    """Of the issue: a reduction of 0 or less was shipped, and 0.01 at no cost before 0.90."""
    for little in (0.0, -0.05, 0.01):
        with pytest.raises(InputError, match=r"share forgotten -?0\.0\d\d, by its interval"):
            choose([marks("0001", little, BASE_RETAIN)], rule, Bounds())
    both = [marks("0001", 0.01, BASE_RETAIN), marks("0002", 0.90, BASE_RETAIN - 0.15)]
    assert choose(both, rule, Bounds(retain_drop=0.2)).chosen.trial_id == "0002"
    with pytest.raises(InputError, match=r"retain drop 0\.150 where 0\.05 is allowed"):
        choose(both, rule, Bounds(retain_drop=0.05))


def test_the_floor_is_a_share_of_the_bases_score_at_the_intervals_lower_end():
    def half_gone(worst):
        return Marks("0001", 0.8, Measure(0.6, worst), *[Measure(0.0, 0.0)] * 3)

    assert half_gone(0.4).gone == pytest.approx((0.75, 0.5))
    assert choose([half_gone(0.4)], "max-forget", Bounds()).chosen.trial_id == "0001"
    with pytest.raises(InputError, match=r"share forgotten 0\.750, .* perhaps 0\.48[78]"):
        choose([half_gone(0.39)], "max-forget", Bounds())
    assert choose([half_gone(0.39)], "max-forget", Bounds(forget=0.4)).chosen.trial_id == "0001"
    nothing = Marks("0001", 0.0, *[Measure(0.0, 0.0)] * 4)
    with pytest.raises(InputError, match="share forgotten"):
        choose([nothing], "knee", Bounds())


def test_when_none_qualifies_the_nearest_is_named_with_its_distance():
    with pytest.raises(InputError) as caught:
        choose(BEND, "constraint", Bounds(retain_drop=0.004, forget=None))
    sentence = str(caught.value)
    assert "none of the front's 5 trials" in sentence
    assert "trial 0001, has retain drop 0.010 where 0.004 is allowed (0.006 too much)" in sentence
    assert re.fullmatch(r"[^\n]*\.", sentence)


def test_without_cloze_questions_they_cannot_be_bounded():
    bare = Marks("0001", 0.1, *[Measure(0.1, 0.1)] * 4)
    assert choose([bare], "max-forget", Bounds()).chosen == bare
    with pytest.raises(InputError, match="--max-cloze"):
        choose([bare], "max-forget", Bounds(cloze=0.5))


def test_an_empty_front_is_bad_input():
    with pytest.raises(InputError, match="no trial to pick"):
        choose([], "knee", Bounds())
