"""The choice and the verdict of the best-setting benchmark, on records written by hand."""

import json

import pytest

from tests.benchmarks.best_config import Best, choose, measures, summary
from vgid.config import TrialConfig
from vgid.results import Score, TrialResult
from vgid.study.ledger import Record

BASE = {"retain_rougeL": 0.9}


def record(
    name: str, forget: float, test: float, retain: float, status="completed", cloze: float = 0.2
) -> Record:
    values = {"forget_rougeL": forget, "test_rougeL": test, "retain_rougeL": retain}
    values["forget_cloze"] = cloze
    scores = {key: Score(value=value, low=value, high=value, n=5) for key, value in values.items()}
    result = TrialResult(trial_id=name, status=status, scores=scores)
    return Record(trial_id=name, config=TrialConfig(), started="2026-01-01T00:00", result=result)


def test_the_least_known_among_those_within_the_bound_is_chosen():
    records = [
        record("0000", 0.0, 0.0, 0.85),  # knows least, keeps too little
        record("0001", 0.05, 0.10, 0.895),
        record("0002", 0.10, 0.02, 0.890),  # 0.12 known, just within
        record("0003", 0.0, 0.0, 0.9, status="failed"),
        record("0004", 0.01, 0.20, 0.9),
    ]
    running = records[0].model_copy(update={"trial_id": "0005", "result": None})
    assert choose([*records, running], BASE, 0.01).trial_id == "0002"
    assert choose(records, BASE, 0.0).trial_id == "0004"
    assert choose(records, BASE, 0.05).trial_id == "0000"


def test_what_cloze_questions_still_find_counts_as_known():
    records = [record("0000", 0.0, 0.0, 0.9, cloze=0.5), record("0001", 0.1, 0.1, 0.9, cloze=0.2)]
    assert choose(records, BASE, 0.01).trial_id == "0001"


def test_without_a_trial_within_the_bound_the_smallest_drop_decides():
    records = [record("0000", 0.0, 0.0, 0.85), record("0001", 0.5, 0.5, 0.88)]
    assert choose(records, BASE, 0.01).trial_id == "0001"


def test_measures_are_shares_and_drops():
    base = {f"{split}_rougeL": 0.8 for split in ("forget", "retain", "retain_seen")}
    base |= {"retain_unseen_rougeL": 0.6}
    scores = {
        "forget_rougeL": 0.2,
        "retain_rougeL": 0.75,
        "retain_seen_rougeL": 0.8,
        "retain_unseen_rougeL": 0.5,
        "test_rougeL": 0.3,
        "forget_cloze": 0.4,
        "forget_memorisation": 0.7,
    }
    assert measures(base, scores) == pytest.approx(
        {
            "forget_reduction": 0.75,
            "retain_drop": 0.05,
            "retain_seen_drop": 0.0,
            "retain_unseen_drop": 0.1,
            "test_rougeL": 0.3,
            "forget_cloze": 0.4,
            "forget_memorisation": 0.7,
        }
    )


def test_targets_hold_for_the_mean_and_are_counted_by_seed():
    rows = [(0.95, 0.03, 0.1, 0.3), (0.91, 0.00, 0.1, 0.5)]
    names = ("forget_reduction", "retain_drop", "test_rougeL", "forget_cloze")
    found = [
        Best(seed, "0000", {}, True, {}, dict(zip(names, row, strict=True)))
        for seed, row in enumerate(rows)
    ]
    verdict = summary(found)
    assert {name: row["met"] for name, row in verdict.items()} == {
        "forget_reduction": True,
        "retain_drop": True,
        "test_rougeL": True,
        "forget_cloze": False,
    }
    assert [verdict[name]["seeds_that_meet_it"] for name in names] == [1, 1, 2, 1]
    # t(0.975, 1) = 12.706; the standard error of two values is half their distance.
    assert verdict["forget_reduction"]["interval"] == pytest.approx(
        [0.93 - 12.7062 * 0.02, 0.93 + 12.7062 * 0.02], abs=1e-5
    )
    assert summary(found[:1])["retain_drop"]["interval"] is None
    json.dumps(verdict)
