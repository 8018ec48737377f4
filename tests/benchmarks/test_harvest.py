"""The recorder of trials against the trial itself, and the replay against all by hand."""

import csv
import itertools

import numpy as np
import pandas as pd
import pytest

from tests.benchmarks import harvest, record_trials
from tests.conftest import make_random_backbone
from vgid.bases.tiny_llava import save
from vgid.config import LADDER, RequestConfig, TrialConfig
from vgid.data.synthetic import write_benchmark
from vgid.study.search_space import FOLDER, SearchSpace
from vgid.trial import TrialSession, run_trial


def test_a_longer_recording_begins_as_a_shorter_one():
    space = SearchSpace.load(FOLDER / "tiny-llava.yaml")
    few, many = record_trials.settings(space, 6), record_trials.settings(space, 9)
    assert many[:6] == few
    assert len({trial.model_dump_json() for trial in many}) == 9
    assert [many[0].alpha, many[0].learning_rate] == [1.0, 2e-3]  # the first point


def test_rows_are_what_the_trial_scores_after_each_epoch_and_at_each_scale(tmp_path):
    write_benchmark(tmp_path / "data")
    backbone = make_random_backbone()
    save(backbone.spec.name, backbone.model, backbone.processor.tokenizer, tmp_path / "model")
    request = RequestConfig(
        data=tmp_path / "data",
        store=tmp_path / "store",
        model_path=str(tmp_path / "model"),
        retain_people=4,
        bootstrap_samples=100,
        harvest=(1.2,),
    )
    trial = TrialConfig(epochs=2, lora_rank=2, learning_rate=5e-3)
    rows = list(record_trials.recorded(TrialSession(request), 7, trial))
    places = [(row["epoch"], row["scale"]) for row in rows]
    assert places == [(1, 1.0), *((2, scale) for scale in record_trials.SCALES)]
    whole = run_trial(trial, request, tmp_path / "whole")
    of = dict(zip(places, rows, strict=True))
    for scores, row in ((whole.scores, of[2, 1.0]), (whole.harvest[0].scores, of[2, 1.2])):
        for name in record_trials.SCORES:
            assert row[f"search_{name}"] == round(scores[name].value, 6)
    assert of[1, 1.0] != of[2, 1.0] and of[2, 0.5] != of[2, 1.35]
    assert 0 < of[1, 1.0]["train_s"] < of[2, 1.0]["train_s"] == of[2, 0.5]["train_s"]


@pytest.fixture
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = [f"{part}_{name}" for part in record_trials.PARTS for name in record_trials.SCORES]
    rows = [{"trial": record_trials.BASE, "epoch": 0, **dict.fromkeys(names, 0.9)}]
    for trial, (epoch, scale) in itertools.product(
        range(3), [(1, 1.0), *((2, scale) for scale in record_trials.SCALES)]
    ):
        scores = dict(zip(names, rng.uniform(0, 0.9, len(names)), strict=True))
        rows.append({"trial": trial, "epoch": epoch, "scale": scale, "train_s": 4.0, **scores})
    return pd.DataFrame(rows).assign(evaluate_s=0.5)


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        ("plain", {(2, 1.0)}),
        ("epochs", {(1, 1.0), (2, 1.0)}),
        ("the default's", {(2, scale) for scale in (1.0, *LADDER)}),
        ("all nine scales", {(2, scale) for scale in record_trials.SCALES}),
    ],
)
def test_the_replay_takes_a_ways_candidates_and_their_held_out_scores(table, way, kept):
    base, trials = table.iloc[0], table.iloc[1:]
    own = trials[harvest.WAYS[way](trials)]
    assert set(zip(own.epoch, own.scale, strict=True)) == kept
    volume, size = harvest.reached(harvest.candidates(own, base), base)
    # By hand: who is on the front of the search part, and the area under its held-out steps.
    points = [(0.9 - r.search_forget_rougeL, r.search_retain_rougeL) for _, r in own.iterrows()]
    front = [
        (0.9 - row.held_out_forget_rougeL, row.held_out_retain_rougeL)
        for (x, y), (_, row) in zip(points, own.iterrows(), strict=True)
        if not any((a >= x and b > y) or (a > x and b >= y) for a, b in points)
    ]
    grid = np.linspace(0, 0.9, 2001)
    heights = [max([y for x, y in front if x >= g and y > 0.45], default=0.45) - 0.45 for g in grid]
    assert size == len(front)
    assert volume == pytest.approx(np.trapezoid(heights, grid), abs=1e-3)


def test_the_shipped_recording_is_whole(capsys):
    with harvest.DATA.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert int(rows[0]["trial"]) == record_trials.BASE
    counts = {
        number: len(list(group))
        for number, group in itertools.groupby(rows[1:], key=lambda row: row["trial"])
    }
    assert set(counts.values()) == {4 + len(record_trials.SCALES)}
    harvest.main(["--orders", "5", "--markdown"])
    assert capsys.readouterr().out.count("\n") == 2 + len(harvest.WAYS)
