"""Health checks: each finds what it looks for, and nothing where there is nothing."""

import pytest

from tests.report.test_insights import made
from vgid.report.front import Front
from vgid.report.health import (
    IDLE,
    at_an_end,
    base_knew,
    health,
    small_front,
    unexplained,
    warnings,
    without_effect,
)
from vgid.report.insights import importances
from vgid.report.records import TrialRecord
from vgid.requirement import OBJECTIVES
from vgid.results import Score, TrialResult

EVEN = {"low": 0.5, "high": 4.0, "log": True}


def knowing(forget, cloze=0.9):
    values = {"forget_rougeL": forget, "forget_cloze": cloze, "retain_rougeL": 0.97}
    return {name: Score(value=v, n=60, low=v, high=v) for name, v in values.items()}


@pytest.mark.parametrize(
    ("forget", "cloze", "said"),
    [
        (0.95, 0.9, None),
        (0.50, 0.9, None),
        (0.49, 0.9, "little to forget"),
        (0.51, 0.05, "may never have known"),
        (0.43, 0.9, "may never have known"),
    ],
)
def test_a_base_that_knew_little_is_a_warning(forget, cloze, said):
    found = base_knew(knowing(forget, cloze))
    assert len(found) == (said is not None) and (said is None or said in found[0])
    front = Front("t", [], knowing(forget, cloze), warnings=["cut short"])
    assert warnings(front) == ["cut short", *found]
    assert base_knew({}) == []


def test_a_front_of_two_is_too_small_and_one_of_three_is_not():
    assert small_front(["0001", "0002", "0003"]) == []
    assert "front of 2 (0001 and 0002)" in small_front(["0001", "0002"])[0]
    assert "front of 0 leaves" in small_front([])[0]


def trials_at(values, name="alpha", **config):
    found = []
    for number, value in enumerate(values):
        trial = made(2)[0]
        given = trial.config.model_copy(update={name: value, **config})
        result = trial.result.model_copy(update={"trial_id": f"{number:04d}"})
        found.append(TrialRecord(given, result, on_front=number == 0))
    return found


def test_proposals_that_crowd_at_an_end_are_told():
    spread = [0.5 * 8 ** (n / 9) for n in range(10)]
    assert at_an_end(trials_at(spread), {"alpha": EVEN}) == []
    # 1.2 % of the range in the logarithm lie between 3.9 and the end.
    (found,) = at_an_end(trials_at([3.9, 4.0, 4.0, *spread[:7]]), {"alpha": EVEN})
    assert found.startswith("alpha: 3 of 10 trials lie at the upper end of its range, 4, 1 of them")
    assert at_an_end(trials_at([3.7, 3.7, 3.7, *spread[:7]]), {"alpha": EVEN}) == []
    (found,) = at_an_end(trials_at([*spread[3:], 0.5, 0.5, 0.5]), {"alpha": EVEN})
    assert "lower end of its range, 0.5, 0 of them" in found
    assert at_an_end(trials_at([4.0] * 7), {"alpha": EVEN}) == []  # too few
    fixed = {"alpha": 4.0, "beta": {"choices": [1, 2]}, "sigma": {"low": 1.0, "high": 1.0}}
    assert at_an_end(trials_at([4.0] * 9), fixed) == []


def test_a_grid_has_its_share_of_even_proposals_at_each_end():
    grid = {"sigma": {"low": 0.2, "high": 1.0, "step": 0.2}}
    noise = {"noise_type": "gaussian"}
    assert at_an_end(trials_at([0.2, 0.4, 0.6, 0.8, 1.0] * 2, "sigma", **noise), grid) == []
    assert (
        at_an_end(trials_at([1.0] * 4 + [0.2, 0.4, 0.6, 0.8, 0.6, 0.4], "sigma", **noise), grid)
        == []
    )
    crowd = trials_at([1.0] * 5 + [0.2, 0.4, 0.6, 0.8, 0.6], "sigma", **noise)
    assert "5 of 10 trials lie at the upper end" in at_an_end(crowd, grid)[0]
    # Those without a sigma do not count.
    without = trials_at([None] * 20, "sigma", noise_type="white")
    assert at_an_end(crowd + without, grid) == at_an_end(crowd, grid)


def test_an_objective_that_nothing_explains_is_told_and_then_no_parameter_is_blamed():
    first, second = OBJECTIVES
    assert unexplained({first: 0.4, second: 0.01}) == []
    (found,) = unexplained({first: 0.4, second: -0.03})
    assert "does not foretell the retain ROUGE-L (R² -0.03" in found
    shares = {first: {"alpha": 0.9, "beta": 0.1}, second: {"alpha": 0.99, "beta": IDLE / 2}}
    assert without_effect(shares, {first: 0.4, second: 0.2}) == []
    idle = dict.fromkeys(shares, shares[second])
    (found,) = without_effect(idle, {first: 0.4, second: 0.2})
    assert found.startswith("beta explains 2.5% of an objective at most")
    assert without_effect(idle, {first: 0.4, second: -0.2}) == []
    assert without_effect(idle, {}) == []  # too few trials


def test_a_study_is_looked_at_with_all_of_them():
    """Trials of which alpha and beta decide, evenly spread; one is on the front."""
    records = made(80)
    front = Front("t", records, knowing(0.95), space={"alpha": EVEN, "beta": EVEN})
    found = health(front, importances(front.trials))
    assert "front of 1 (0079)" in found[0]
    assert {sentence.split()[0] for sentence in found[1:]} == {"noise_type", "prompt_style"}
    none = Front("t", [TrialRecord(records[0].config, FAILED)], knowing(0.95))
    assert health(none, {}) == small_front([])


FAILED = TrialResult(trial_id="0000", status="failed", error="the loss is infinite")
