"""Bounds on scores: what is read as one, and by how much a score misses it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgid.config import RequestConfig, parse
from vgid.errors import InputError
from vgid.requirement import Requirement, unknown

NUMBERS = st.floats(0, 1).map(lambda number: round(number, 3))


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
