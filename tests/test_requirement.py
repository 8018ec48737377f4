"""What is asked of scores: which way is better, and by how much one misses a bound."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgid.config import RequestConfig, parse
from vgid.errors import InputError
from vgid.requirement import OBJECTIVES, Requirement, minimised, turned, unknown

NUMBERS = st.floats(0, 1).map(lambda number: round(number, 3))


@pytest.mark.parametrize(
    ("less_is_better", "scores"),
    [
        (True, "forget_rougeL forget_cloze_text test_rougeL earlier_rougeL forget_memorisation"),
        (True, "retain_rougeL_drop forget_rougeL_rise"),
        (False, f"{' '.join(OBJECTIVES)} retain_seen_cloze celebrity_rougeL retain_rougeL_raw"),
    ],
)
def test_what_people_to_forget_still_score_is_to_be_small_and_all_else_large(
    less_is_better, scores
):
    for name in scores.split():
        assert minimised(name) == less_is_better
        assert turned(name, 0.25) == (-0.25 if less_is_better else 0.25)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["retain_rougeL"], "at least 2"),
        (["retain_rougeL", "retain_rougeL"], "name each score once"),
        (["a", "b", "c", "d", "e"], "at most 4"),
    ],
)
def test_objectives_are_two_to_four_and_no_two_the_same(tmp_path, names, told):
    values = {"data": tmp_path, "store": tmp_path, "objectives": names}
    with pytest.raises(InputError, match=rf"objectives: .*{told}"):
        parse(RequestConfig, values, "command line")


@given(st.sampled_from([">=", "<="]), NUMBERS, NUMBERS, NUMBERS, st.booleans())
def test_a_bound_is_missed_on_its_wrong_side_by_the_distance(sign, bound, score, base, of_base):
    asked = Requirement.read(f"retain_rougeL {sign} {bound}{'*base' if of_base else ''}")
    assert Requirement.read(str(asked)) == asked
    limit = bound * base if of_base else bound
    kept = score >= limit if sign == ">=" else score <= limit
    missed = asked.missed_by({"retain_rougeL": score}, {"retain_rougeL": base})
    assert (missed <= 0) == kept
    assert abs(missed) == abs(score - limit)


@pytest.mark.parametrize("text", ["retain>0.9", "retain>=", ">=0.9", "a>=0.9*bases", "a>=-1", ""])
def test_what_is_no_bound_is_refused_with_the_form(tmp_path, text):
    values = {"data": tmp_path, "store": tmp_path, "require": [text]}
    with pytest.raises(InputError, match=r"require.0: .* write METRIC>=NUMBER or METRIC<=NUMBER"):
        parse(RequestConfig, values, "command line")


def test_a_score_that_there_is_not_is_named_with_those_that_there_are():
    names, base = {"a", "gone"}, {"a"}
    assert (
        unknown([Requirement.read("gone>=0.5"), Requirement.read("a>=1*base")], names, base) is None
    )
    assert "no score is called b; there are a, gone" in unknown(
        [Requirement.read("b<=1")], names, base
    )
    assert "there are a." in unknown([Requirement.read("gone<=1*base")], names, base)
