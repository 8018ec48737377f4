"""The comparison of methods: surfaces, volumes, picks and verdicts, and a small real one."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from studies.compare_methods import main
from tests.small_benchmark import write_small
from vgid.config import StudyConfig, TrialConfig
from vgid.paper.compare import (
    CompareConfig,
    _done,
    chosen_settings,
    standings,
    verdict,
    write_comparison,
)
from vgid.paper.figures import attainment_picture, attainment_surface
from vgid.paper.settings import read_settings
from vgid.results import Score
from vgid.study.finished import Source, Trial

GRID = 6
FRONTS = st.lists(
    st.lists(
        st.tuples(st.integers(0, GRID), st.integers(0, GRID)).map(lambda p: (p[0] / 1, p[1] / 1)),
        max_size=5,
    ),
    min_size=1,
    max_size=4,
)


def attained(x, y, fronts):
    """How many fronts have a point at least as good as (x, y), point by point."""
    return sum(any(a >= x and b >= y for a, b in front) for front in fronts)


@given(FRONTS)
def test_surfaces_bound_what_enough_fronts_attain(fronts):
    for level in range(1, len(fronts) + 1):
        corners = attainment_surface(fronts, level)
        for x in range(GRID + 2):
            for y in range(GRID + 2):
                inside = bool(((corners[:, 0] >= x) & (corners[:, 1] >= y)).any())
                assert inside == (attained(x, y, fronts) >= level), (level, x, y, corners)
        assert (np.diff(corners[:, 0]) > 0).all() and (np.diff(corners[:, 1]) < 0).all()


def test_levels_that_do_not_exist():
    for level in (0, 3):
        with pytest.raises(ValueError, match="level"):
            attainment_surface([[(1.0, 1.0)], []], level)


@pytest.mark.parametrize("runs", range(1, 6))
def test_the_median_is_what_at_least_half_of_the_runs_attain(runs):
    fronts = [[(float(x), 1.0)] for x in range(1, runs + 1)]
    median, best, worst = attainment_picture("t", {"vgid": fronts}, (0.0, 1.0)).panels[0].drawn[:3]
    reached = max(median.x)
    assert attained(reached, 1.0, fronts) >= runs / 2 > attained(reached + 1, 1.0, fronts)
    assert (max(best.x), max(worst.x)) == (runs, 1)


def score(value):
    return Score(value=value, n=30, low=0, high=1)


BASE = {"forget_rougeL": score(1.0), "retain_rougeL": score(0.9)}


def study(method, seed, points, held_out=None):
    """A study whose trials have these (reduction, retain); the front is re-scored as given."""
    trials = []
    for number, (reduction, retain) in enumerate(points):
        scores = None
        if held_out is None or number in held_out:
            again = (reduction, retain) if held_out is None else held_out[number]
            scores = {
                "forget_rougeL": 1.0 - again[0],
                "retain_rougeL": again[1],
                "test_rougeL": 0.5,
                "forget_cloze": 0.25,
            }
        config = TrialConfig(method=method, epochs=number + 1)
        trial_id = f"{number:04d}"
        trials.append(Trial(trial_id, config, (reduction, retain), Path("none"), scores))
    config = StudyConfig(method=method, seed=seed, output="none")
    base = {"search": BASE, "held_out": BASE}
    name = f"{method}-{seed}"
    return Source.model_construct(config=config, base=base, name=name, trials=tuple(trials))


def test_hypervolumes_and_the_paired_lead():
    found = [
        study("vgid", 0, [(0.8, 0.85), (0.4, 0.9)], {0: (0.7, 0.85), 1: (0.4, 0.9)}),
        study("vgid", 1, [(0.9, 0.9)]),
        study("ga", 0, [(0.5, 0.55)]),
        study("ga", 1, [(0.5, 0.65)]),
    ]
    first, second = standings(found, 0.02)
    assert (first.method, second.method) == ("vgid", "ga")
    # Above the reference (0, 0.45): two overlapping rectangles.
    own = [0.7 * 0.4 + 0.4 * 0.05, 0.9 * 0.45]
    others = [0.5 * 0.1, 0.5 * 0.2]
    assert first.held_out == pytest.approx(own) and second.held_out == pytest.approx(others)
    assert first.search.value == pytest.approx((0.8 * 0.4 + 0.4 * 0.05 + own[1]) / 2)
    assert second.lead is not None and first.lead is None
    assert second.lead.value == pytest.approx(np.mean(np.subtract(own, others)))


def test_the_pick_is_chosen_on_search_questions_and_told_on_held_out_ones():
    points = [(0.9, 0.80), (0.6, 0.885), (0.5, 0.89)]
    held_out = {0: (0.9, 0.8), 1: (0.3, 0.7), 2: (0.5, 0.89)}
    (standing,) = standings([study("npo", 0, points, held_out)], 0.02)
    (pick,) = standing.picks
    assert pick is not None
    assert pick["forget_reduction_share"] == pytest.approx(0.3)
    assert pick["retain_drop"] == pytest.approx(0.2)
    (none,) = standings([study("npo", 0, [(0.9, 0.5)])], 0.02)
    assert none.picks == (None,) and none.pick("retain_drop").n == 0


def test_a_method_without_a_completed_trial_has_no_volume():
    listed = standings([study("ga", 0, []), study("vgid", 0, [(0.5, 0.9)])], 0.02)
    assert [standing.method for standing in listed] == ["vgid", "ga"]
    assert listed[1].held_out == (0.0,)


@pytest.mark.parametrize(
    ("dpo", "says"),
    [
        ([0.3, 0.4, 0.5], ["VGID has the largest", "PO (DPO)", "lies above zero"]),
        ([0.9, 0.4, 0.8], ["VGID has the largest", "do not tell it from PO (DPO)"]),
        ([0.97, 0.99, 0.93], ["PO (DPO) has the largest", "lies above zero"]),
    ],
)
def test_the_verdict_says_who_won_whoever_it_is(dpo, says):
    own = [0.85, 0.9, 0.8]
    found = [study("vgid", s, [(x, 0.9)]) for s, x in enumerate(own)]
    found += [study("po_dpo", s, [(x, 0.9)]) for s, x in enumerate(dpo)]
    text = verdict(standings(found, 0.02))
    assert all(part in text for part in says), text
    # A third with a lower mean that swings is not beaten, whatever the runner-up is.
    swings = [study("ga", s, [(x, 0.9)]) for s, x in enumerate([0.9, 0.1, 0.1])]
    assert "GA" in verdict(standings(found + swings, 0.02)).split("tell it from")[-1]
    assert "One seed" in verdict(standings([found[0], found[3]], 0.02))
    assert "One method" in verdict(standings(found[:1], 0.02))


def test_the_chosen_setting_is_the_median_pick_or_the_closest_one():
    found = [
        study("vgid", 0, [(0.9, 0.5), (0.5, 0.9)]),
        study("vgid", 1, [(0.7, 0.9)]),
        study("vgid", 2, [(0.6, 0.5), (0.9, 0.5), (0.8, 0.9)]),
        study("ga", 0, [(0.9, 0.5)]),
        study("ga", 1, [(0.9, 0.4), (0.8, 0.6)]),
        study("ga", 2, [(0.9, 0.3)]),
        *(study("npo", seed, []) for seed in range(3)),
    ]
    chosen = chosen_settings(standings(found, 0.02), 0.02)
    assert chosen["vgid"] == found[1].trials[0].config
    assert chosen["ga"] == found[4].trials[1].config
    assert "npo" not in chosen


def test_the_report_and_its_files(tmp_path):
    found = [study("vgid", s, [(0.8 + s / 50, 0.9), (0.9, 0.7)]) for s in range(3)]
    found += [study("ga", s, [(0.3 + s / 50, 0.8)]) for s in range(3)]
    config = CompareConfig(output=tmp_path, methods=("vgid", "ga"), trials=2)
    summary = write_comparison(config, found)
    assert all((tmp_path / name).is_file() for name in summary["files"])
    text = (tmp_path / "comparison.md").read_text()
    assert "VGID has the largest" in text and "0 of 3" in text and "3 of 3" in text
    assert Image.open(tmp_path / "attainment.png").width > 1000
    page = (tmp_path / "attainment.html").read_text()
    # The median, the best and the worst surface.
    assert page.count('"legendgroup":"VGID"') == 3
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    (lead,) = [row for row in rows if row["measure"] == "vgid_lead_held_out"]
    assert lead["method"] == "ga" and float(lead["low"]) > 0
    backbone, settings = read_settings(tmp_path / "settings.json")
    assert backbone == "tiny-llava" and set(settings) == {"vgid", "ga"}


def test_the_report_tells_of_what_forgets_little_of_celebrities_and_of_an_ignorant_base(tmp_path):
    found = [study("vgid", s, [(0.8, 0.9)]) for s in range(2)]
    found += [study("rmu", s, [(x, 0.9)]) for s, x in enumerate((0.02, 0.9))]
    config = CompareConfig(output=tmp_path, methods=("vgid", "rmu"), trials=1, seeds=2)
    write_comparison(config, found)
    text = (tmp_path / "comparison.md").read_text()
    assert re.search(r"\| RMU \| 2 of 2 \| 1 \| 0.460 ", text) and "elebrit" not in text
    assert re.search(r"\| VGID \| 2 of 2 \| 2 \|", text) and "never have known" not in text

    for trial in (trial for one in found for trial in one.trials):
        trial.held_out["celebrity_rougeL"] = 0.75
    base = {"search": BASE | {"forget_rougeL": score(0.2)}, "held_out": BASE}
    little = {"update": {"base": base}}
    found = [one.model_copy(**little) if one.config.seed == 1 else one for one in found]
    write_comparison(config, found)
    text = (tmp_path / "comparison.md").read_text()
    assert "| celebrity ROUGE-L |" in text and "0.750" in text
    assert text.count("The base may never have known") == text.count("Seed 1. The base may") == 1


def small_space(folder: Path) -> Path:
    """Two methods with trials that take a second each."""
    rate = {"low": 1e-3, "high": 4e-3, "log": True}
    shared = {"epochs": 1, "lora_rank": 2, "train_tasks": ["cloze"]}
    methods = {method: {"parameters": {"learning_rate": rate}} for method in ("vgid", "ga")}
    path = folder / "space.yaml"
    space = {"backbone": "tiny-llava", "shared": shared, "methods": methods}
    path.write_text(yaml.safe_dump(space))
    return path


def test_a_small_comparison_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    write_small(tmp_path / "data")
    arguments = [
        *("--output", str(out), "--search-space", str(small_space(tmp_path)), "--seeds", "1"),
        *("--methods", "vgid,ga", "--trials", "2", "--retain-people", "4"),
        *("--data", str(tmp_path / "data")),
        *("--max-concurrent", "1"),
    ]
    assert main(arguments) == 0
    summary = json.loads((out / "comparison.json").read_text())
    assert set(summary["held_out_hypervolume"]) == {"vgid", "ga"}
    for method in ("vgid", "ga"):
        record = json.loads((out / "studies" / f"{method}-0" / "study.json").read_text())
        assert record["config"]["method"] == method
        assert sum(record["counts"].values()) == 2
    before = {p: p.stat().st_mtime_ns for p in out.glob("studies/*/study.json")}
    assert main(arguments) == 0  # what is done is not done again
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert "One seed cannot tell" in capsys.readouterr().out

    # Studies that did not answer the same questions are not compared.
    path = out / "studies" / "ga-0" / "study.json"
    record = json.loads(path.read_text())
    record["base"]["held_out"]["retain_rougeL"]["value"] = 0.5
    path.write_text(json.dumps(record))
    assert main(arguments) == 2
    assert "scores differently" in capsys.readouterr().err
    path.write_text(json.dumps({"interrupted": False}))
    assert main(arguments) == 2
    assert str(path.parent) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--methods", "duet"], "methods"),
        (["--trials", "0"], "trials"),
        (["--backbone", "no-such"], "no-such"),
        (["--backbone", "llava-1.5-7b"], "--data"),
        (["--retain-drop", "-1"], "retain_drop"),
        (["--speed", "9"], "see --help"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, more, sentence):
    assert main(["--output", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_done_is_used_where_it_was_asked_for_like_this_one(tmp_path):
    asked = StudyConfig(output=tmp_path, data=tmp_path / "data", trials=2)
    ran = {**asked.model_dump(mode="json"), "data": "/moved/from", "max_concurrent": 7}
    (tmp_path / "study.json").write_text(json.dumps({"interrupted": False, "config": ran}))
    assert _done(asked)
    for other in ({"trials": 3}, {"forget_ratio": 10}, {"sampler": "tpe"}, {"method": "ga"}):
        assert not _done(asked.model_copy(update=other)), other


@pytest.mark.parametrize("error", [None, "The study stopped: its disk is full."])
def test_a_study_that_lacks_something_is_run_again(tmp_path, error):
    study = StudyConfig(output=tmp_path)
    summary = {"config": study.model_dump(mode="json"), "interrupted": False, "error": error}
    (tmp_path / "study.json").write_text(json.dumps(summary))
    assert _done(study) == (error is None)
