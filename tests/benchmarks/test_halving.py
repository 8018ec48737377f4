"""The schedules in closed form, and the replay against the harvest's and by hand."""

import numpy as np
import pandas as pd
import pytest

from tests.benchmarks import halving, harvest
from tests.benchmarks.record_trials import BASE, SCHEDULES
from vgid.config import TrialConfig

SEARCHED = ["alpha", "beta", "noise_type", "sigma", "prompt_style", "learning_rate"]


def test_schedules_warm_up_alike_and_fall_where_they_say():
    trial = TrialConfig(learning_rate=1.0, warmup_fraction=0.1)
    linear, short, constant = (SCHEDULES[name](trial, 50) for name in SCHEDULES)
    assert constant == [0.2, 0.4, 0.6, 0.8, *[1.0] * 47]
    assert short[:41] == constant[:41]
    assert short[41:] == pytest.approx([1 - 0.9 * step / 10 for step in range(1, 11)])
    assert linear[-1] == pytest.approx(0.1) and linear[30] < short[30]


def test_the_shipped_recordings_are_of_the_same_trials_and_their_epochs():
    tables = [pd.read_csv(path) for path in halving.FILES]
    # Rows stand in the order in which trials ended; what is paired is the same setting.
    settings = [
        table[table.trial != BASE].drop_duplicates("trial").set_index("trial").sort_index()
        for table in tables
    ]
    for own in settings:
        pd.testing.assert_frame_equal(own[SEARCHED], settings[0][SEARCHED])
    first, short, constant = map(halving.curves, tables)
    assert first.shape == short.shape == constant.shape == (10, 5, 2)
    # The one falls in its last epoch only, and all else of the two is the same.
    assert (short[:, :4] == constant[:, :4]).all() and (short[:, 4] != constant[:, 4]).any()


def test_fronts_are_numbered_from_those_that_none_dominates():
    points = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    assert halving.fronts(points).tolist() == [0, 0, 1, 0, 2]


def test_who_stops_nobody_reaches_what_all_trials_reach(capsys):
    table = pd.read_csv(halving.FILES[0])
    base, trials = table[table.trial == BASE].iloc[0], halving.recordings(table)
    study = halving.Study(1, [])
    for trial in trials:
        study.run(trial)
    own = table[(table.trial != BASE)]
    own = own[harvest.WAYS["the default's"](own)]
    whole, _ = harvest.reached(harvest.candidates(own, base), base)
    assert study.volume(np.inf, base) == whole and study.volume(1.0, base) == 0
    assert len(study.ended) == 10 and study.stopped == 0
    # The first goes on; a second that the first dominates at epoch 1 has trained one epoch.
    better, worse = trials[9], halving.Recorded(trials[9].curve - 0.1, 3.0, 2.0, trials[9].found)
    study = halving.Study(2, [1])
    study.run(better)
    before = study.seconds
    study.run(worse)
    assert study.seconds - before == 5.0 and (study.stopped, study.certain) == (1, 1)
    halving.main(["--orders", "1", "--resamples", "2", "--markdown"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * 2 + len(halving.FILES) * 4 + len(halving.RULES)
