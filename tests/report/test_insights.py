"""What made the difference in a study: shares against known causes, and what is drawn."""

import copy
import math
import random
from dataclasses import replace

import plotly.graph_objects as go
import pytest

from vgid.config import TrialConfig
from vgid.report.front import Front
from vgid.report.insights import (
    MIN_EXPLAINED,
    MIN_TRIALS,
    axes,
    explained,
    importances,
    insights,
    varied,
)
from vgid.report.records import TrialRecord, run_name
from vgid.requirement import OBJECTIVES
from vgid.results import Score, TrialResult

BASE = {"retain_rougeL": Score(value=0.97, n=300, low=0.95, high=0.98)}
STYLES = ("strict", "polite", "declarative")


def made(count):
    """Trials whose reduction depends on alpha alone and whose retain score on beta alone."""
    records = []
    for number in range(count):
        alpha = 0.5 * 8 ** (number / max(1, count - 1))
        beta = 0.5 * 8 ** ((number * 7 % count) / max(1, count - 1))
        noise = ("random", "gaussian")[number % 2]
        config = TrialConfig(
            alpha=alpha,
            beta=beta,
            noise_type=noise,
            sigma=0.5 + number / count if noise == "gaussian" else None,
            prompt_style=STYLES[number % 3],
        )
        metrics = {OBJECTIVES[0]: math.log(alpha), OBJECTIVES[1]: 0.5 + math.log(beta)}
        result = TrialResult(trial_id=f"{number:04d}", status="completed", metrics=metrics)
        records.append(TrialRecord(config, result, on_front=number == count - 1))
    return records


def test_a_share_goes_to_what_caused_the_difference():
    shares = importances(made(24))
    assert list(shares) == list(OBJECTIVES)
    assert shares[OBJECTIVES[0]]["alpha"] > 0.8
    assert shares[OBJECTIVES[1]]["beta"] > 0.8
    for by_name in shares.values():
        assert "sigma" not in by_name  # only some trials have it
        assert sum(by_name.values()) == pytest.approx(1.0)
    assert importances(made(24)) == shares


def test_each_objective_of_a_study_has_its_bars_and_its_axis():
    names = (*OBJECTIVES, "celebrity_rougeL")
    records = [
        replace(
            record,
            objectives=names,
            result=record.result.model_copy(
                update={"metrics": record.result.metrics | {names[2]: float(n % 3)}}
            ),
        )
        for n, record in enumerate(made(24))
    ]
    shares = importances(records)
    assert list(shares) == list(names) == list(explained(records))
    assert shares[names[2]]["prompt_style"] > 0.8
    assert axes(records)[-1].label == names[2]
    bars, _ = insights(Front("s", records, BASE), shares).panels
    assert [series.name for series in bars.drawn][2] == names[2]
    assert len({series.colour for series in bars.drawn}) == 3


def test_few_trials_explain_nothing():
    assert importances(made(MIN_TRIALS - 1)) == {}
    assert importances([]) == {}
    alike = [record for record in made(1) for _ in range(MIN_TRIALS)]
    assert importances(alike) == {}


def test_an_objective_without_differences_has_no_cause():
    flat = with_scores(made(12), OBJECTIVES[1], [0.9] * 12)
    assert set(importances(flat)[OBJECTIVES[1]].values()) == {0.0}


def with_scores(records, objective, values):
    """The same trials, with these values of an objective."""
    return [
        replace(
            r, result=r.result.model_copy(update={"metrics": {**r.result.metrics, objective: v}})
        )
        for r, v in zip(records, values, strict=True)
    ]


def test_a_forest_foretells_what_depends_on_the_setting_and_no_noise():
    records = made(2 * MIN_EXPLAINED)
    fit = explained(records)
    assert set(fit) == set(OBJECTIVES) and min(fit.values()) > 0.5
    assert explained(records) == fit
    rng = random.Random(1)
    noise = with_scores(records, OBJECTIVES[1], [rng.random() for _ in records])
    mixed = explained(noise)
    assert mixed[OBJECTIVES[0]] == fit[OBJECTIVES[0]] and mixed[OBJECTIVES[1]] < 0.1
    assert explained(with_scores(records, OBJECTIVES[1], [0.9] * len(records))).keys() == {
        OBJECTIVES[0]
    }
    assert explained(records[: MIN_EXPLAINED - 1]) == explained(records[:1] * 30) == {}


def test_every_axis_spans_what_was_tried():
    records = made(9)
    assert varied(records) == ["alpha", "beta", "noise_type", "sigma", "prompt_style"]
    by_label = {axis.label: axis for axis in axes(records)}
    alpha = by_label["alpha"]
    assert alpha.ticks == ((0.0, "0.5"), (1.0, "4"))
    assert alpha.heights == pytest.approx([number / 8 for number in range(9)])  # logarithmic
    assert [text for _, text in by_label["prompt_style"].ticks] == sorted(STYLES)
    assert by_label["sigma"].heights[0] is None
    assert by_label["forget reduction"].heights[-1] == 1.0


def one_by_one(trace):
    """The lines of a trace, each as its text and its points."""
    lines, points, said = [], [], None
    for x, y, text in zip(trace["x"], trace["y"], trace["hovertext"], strict=True):
        if x is None:
            assert y is None
            lines.append((said, points))
            points = []
        else:
            said = text
            points.append((x, y))
    assert not points
    return lines


def expected_lines(records):
    """Every trial's line, the front last, without the axes on which it has no place."""
    columns = axes(records) if records else []
    lines = []
    for number, record in sorted(enumerate(records), key=lambda pair: pair[1].on_front):
        heights = enumerate(column.heights[number] for column in columns)
        points = [(place, height) for place, height in heights if height is not None]
        lines.append((run_name(record.config, record.result.trial_id), points))
    return lines


def test_fanova_looks_at_a_bounded_number_of_trials_and_says_so(monkeypatch):
    monkeypatch.setattr("vgid.report.insights.MAX_TRIALS", 24)
    many = made(240)
    shares = importances(many)
    assert shares == importances(many[::10])
    assert shares[OBJECTIVES[0]]["alpha"] > 0.8
    above, below = insights(Front("t", many, BASE), shares).panels
    assert "over 24 of the trials" in above.title
    assert below.title.startswith("The front and 24 of the trials")
    above, below = insights(Front("t", made(24), BASE), shares).panels
    assert "over the trials" in above.title
    assert below.title.startswith("Every trial")


@pytest.mark.parametrize("count", [0, 3, 12])
def test_every_trial_is_a_line(count):
    front = Front("tiny <llava>", made(count), BASE)
    shares = importances(front.drawn)
    picture = insights(front, shares)
    figure = picture.plotly()
    go.Figure(copy.deepcopy(figure))  # plotly's own validation of every attribute
    lines = [trace for trace in figure["data"] if trace["type"] == "scatter" and trace["x"]]
    lines = [trace for trace in lines if "lines" in trace["mode"]]
    bars = [trace["name"] for trace in figure["data"] if trace["type"] == "bar"]
    assert len(lines) == min(count, 2)  # one trace a kind, however many trials
    drawn = [line for trace in lines for line in one_by_one(trace)]
    assert drawn == expected_lines(front.drawn)
    assert bars == (["forget reduction", "retain ROUGE-L"] if count >= MIN_TRIALS else [])
    if count:
        assert lines[-1]["hovertext"][0].startswith(f"{count - 1:04d} · ")
    said = {text["text"] for text in figure["layout"]["annotations"]}
    assert {axis.ticks[-1][1] for axis in (axes(front.drawn) if count else ())} <= said
