"""A forecast against sums that are done by hand."""

import os

import pytest

from vgid.report.forecast import Forecast, forecast

FIRST = {
    "wall_s": 100.0,
    "phases": {
        "start-up": {"total_s": 20.0},
        "load": {"total_s": 4.0},
        "teacher": {"total_s": 10.0},
        "train": {"total_s": 30.0},
        "evaluate": {"total_s": 15.0},
        "save": {"total_s": 5.0},
        "re-score": {"total_s": 12.0},
    },
    "store": {"limit_bytes": 1000},
}


@pytest.fixture
def folder(tmp_path):
    for name, size in {"adapters/0": 50, "trials/0": 7, "store/a": 300, "data/a": 40}.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(b"x" * size)
    (tmp_path / "study.json").write_bytes(b"y" * 3)
    return tmp_path


@pytest.mark.parametrize(("slots", "rounds"), [(1, 7), (2, 4), (7, 1), (9, 1)])
def test_time_is_what_is_there_once_and_rounds_of_trials(folder, slots, rounds):
    found = forecast(FIRST, folder, 7, slots)
    once = 100 - 30 - 15 - 5 - 10 - 12
    assert found.seconds == (once + 10 + 12 + rounds * 50, once + rounds * (50 + 10 + 12))


def test_a_study_of_the_one_trial_takes_what_it_took(folder):
    found = forecast(FIRST, folder, 1, 1)
    assert found.seconds == (100, 100) and found.size == (400, 400)


def test_disk_grows_by_adapters_records_and_a_store_up_to_its_limit(folder):
    os.link(folder / "adapters/0", folder / "adapters/0x0.9")  # takes nothing
    assert forecast(FIRST, folder, 3, 1).size == (400 + 2 * 107, 400 + 2 * 107 + 600)
    assert forecast(FIRST, folder, 5, 1).size == (400 + 4 * 107, 400 + 4 * 107 + 700)
    full = FIRST | {"store": {"limit_bytes": 200}}  # it was lowered
    assert forecast(full, folder, 5, 1).size == (400 + 4 * 107,) * 2


def test_money_is_told_where_there_is_a_price():
    whole = Forecast(24, 4, (3600, 9000), (10**9, 2 * 10**9))
    assert whole.lines(None)[0] == "All 24 trials, 4 at a time: 1 h 00 min to 2 h 30 min"
    assert whole.lines(98.0) == [
        "All 24 trials, 4 at a time: 1 h 00 min to 2 h 30 min, which costs 98.00 to 245.00 at 98 "
        "an hour",
        "Disk: 1.0 GB to 2.0 GB",
    ]
