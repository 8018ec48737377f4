"""The picture of a study: what is drawn, and where."""

import io
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from vgid.config import TrialConfig
from vgid.report.front import Front, corner, page_picture, write_png
from vgid.report.records import TrialRecord, describe
from vgid.results import Harvested, Score, TrialResult

BASE = {"forget_rougeL": Score(value=0.95, n=60, low=0.9, high=1.0)}
BASE["retain_rougeL"] = Score(value=0.97, n=300, low=0.95, high=0.98)


def record(trial_id, reduction, retain, *, on_front=False, held_out=None, **config):
    completed = reduction is not None
    metrics = {"forget_rougeL_reduction": reduction, "retain_rougeL": retain, "forget_cloze": 0.25}
    result = TrialResult(
        trial_id=trial_id,
        status="completed" if completed else "failed",
        metrics=metrics if completed else {},
    )
    return TrialRecord(TrialConfig(**config), result, on_front, held_out)


@pytest.fixture
def front():
    held_out = {
        "forget_rougeL_reduction": Score(value=0.8, n=50, low=0.7, high=0.85),
        "retain_rougeL": Score(value=0.95, n=290, low=0.93, high=0.96),
    }
    records = [
        record("0000", 0.9, 0.90, on_front=True),
        record("0001", 0.5, 0.80, noise_type="white"),
        record("0002", 0.8, 0.96, on_front=True, held_out=held_out, beta=5.0),
        record("0003", None, None, noise_type="white"),
        record("0004", 0.4, 0.85, noise_type="gaussian", sigma=0.5, prompt_style="polite"),
    ]
    return Front("tiny <llava>", records, BASE, BASE)


def traces(front):
    figure = page_picture(front).plotly()
    go.Figure(figure)  # plotly's own validation of every attribute
    return {trace["name"]: trace for trace in figure["data"]}


def test_a_trials_scales_are_a_path_and_only_the_trial_is_a_trial(front):
    """Of 0000, which runs the paper's default, a milder scale is on the front as well."""
    scales = {0.5: (0.3, 0.965), 0.8: (0.85, 0.95), 1.2: (0.92, 0.70)}
    harvest = [
        Harvested(
            scale=scale,
            metrics={"forget_rougeL_reduction": x, "retain_rougeL": y},
            missed={"retain_rougeL>=0.8": 0.8 - y},
        )
        for scale, (x, y) in scales.items()
    ]
    trial = front.records[0]
    trial = replace(trial, result=trial.result.model_copy(update={"harvest": harvest}))
    mild, good, strong = trial.harvested
    good = replace(good, on_front=True)
    harvested = replace(front, records=[trial, mild, good, strong, *front.records[1:]])
    drawn = page_picture(harvested)
    path, rest = (s for s in drawn.panels[0].drawn if s.name == "trial, other scales")
    # From the mildest to the strongest, with the trial itself where its scale is.
    assert list(path.x) == [0.3, 0.85, 0.9, 0.92, None]
    assert list(path.y) == [0.965, 0.95, 0.90, 0.70, None]
    assert (rest.x, rest.keys) == ([0.3], ["0000x0.5"])  # neither on the front nor out of bounds
    by_name = traces(harvested)
    assert by_name["front"]["x"] == [0.8, 0.85, 0.9]
    assert by_name["trial out of bounds"]["x"] == [0.92]
    assert by_name["the paper's default setting"]["x"] == [0.9]
    assert harvested.caption == "3 on the front, 1 not completed"
    assert describe(good.config) == f"{describe(trial.config)} · scale 0.8"


def test_everything_is_in_its_place(front):
    drawn = traces(front)
    assert set(drawn) == {
        "trial, Gaussian noise",
        "trial, white image",
        "front",
        "front, held-out questions (95 %)",
        "the paper's default setting",
        "base model",
        "chosen trial",
    }
    assert (drawn["front"]["x"], drawn["front"]["y"]) == ([0.8, 0.9], [0.96, 0.90])
    assert drawn["trial, white image"]["x"] == [0.5]
    assert (drawn["base model"]["x"], drawn["base model"]["y"]) == ([0.0], [0.97])
    assert drawn["the paper's default setting"]["x"] == [0.9]
    held_out = drawn["front, held-out questions (95 %)"]
    assert held_out["x"] == pytest.approx([0.80])
    assert held_out["error_x"]["array"] == pytest.approx([0.05])
    assert held_out["error_x"]["arrayminus"] == pytest.approx([0.10])
    assert held_out["error_y"]["arrayminus"] == pytest.approx([0.02])
    assert front.caption == "2 on the front, 1 not completed"


def test_a_base_that_may_never_have_known_is_said_in_every_picture(front):
    assert front.doubt is None and front.caption == "2 on the front, 1 not completed"
    ignorant = replace(front, base=BASE | {"forget_rougeL": Score(value=0.2, n=9, low=0, high=1)})
    assert "ROUGE-L of 0.200" in ignorant.doubt
    assert ignorant.caption.endswith("; the base may never have known these people")


def test_trials_out_of_bounds_are_told_apart_and_say_what_they_miss(front, tmp_path):
    outside = front.records[1]
    outside.result.missed.update({"forget_cloze<=0.2": 0.05, "retain_rougeL>=0.7": -0.1})
    drawn = traces(front)
    assert "trial, white image" not in drawn
    assert drawn["trial out of bounds"]["x"] == [0.5]
    assert "misses forget_cloze&lt;=0.2 by 0.050" in str(drawn["trial out of bounds"]["hovertext"])
    assert "retain_rougeL>=0.7" not in str(drawn)
    assert "1 out of bounds" in front.caption
    write_png(tmp_path / "front.png", front)


def test_hovering_shows_the_configuration(front):
    (text,) = traces(front)["trial, Gaussian noise"]["hovertext"]
    for part in ("trial 0004", "σ0.5", "polite", "lr 1e-3", "rank 8", "0.400", "0.850"):
        assert part in text


def test_the_png_shows_every_kind_of_mark(tmp_path, front):
    write_png(tmp_path / "front.png", front)
    image = Image.open(tmp_path / "front.png").convert("RGB")
    assert image.size == (1610, 784)
    pixels = np.asarray(image).reshape(-1, 3)
    for colour in ((0xD1, 0x49, 0x5B), (0x22, 0x22, 0x22)):
        assert (pixels == colour).all(axis=1).sum() > 100


def test_the_same_study_gives_the_same_bytes(tmp_path, front):
    write_png(tmp_path / "front.png", front)
    first = (tmp_path / "front.png").read_bytes()
    write_png(tmp_path / "front.png", front)
    assert (tmp_path / "front.png").read_bytes() == first


@pytest.mark.parametrize("records", [[], [record("0000", None, None)]])
def test_a_study_without_a_completed_trial_still_has_its_picture(tmp_path, records):
    front = Front("tiny-llava", records, BASE)
    assert set(traces(front)) == {"base model", "chosen trial"}
    write_png(tmp_path / "front.png", front)
    Image.open(io.BytesIO((tmp_path / "front.png").read_bytes())).verify()


def test_trials_stopped_early_are_drawn_as_such_once_they_were_scored(front):
    def stopped(trial_id, metrics):
        result = TrialResult(trial_id=trial_id, status="pruned", metrics=metrics)
        return TrialRecord(TrialConfig(), result)

    scored = stopped("0005", {"forget_rougeL_reduction": 0.2, "retain_rougeL": 0.9, "loss": 0.1})
    both = replace(front, records=[*front.records, scored, stopped("0006", {"loss": 0.2})])
    drawn = traces(both)["trial stopped early"]
    assert (drawn["x"], drawn["y"], drawn["customdata"]) == ([0.2], [0.9], ["0005"])
    assert both.caption == "2 on the front, 2 stopped early, 1 not completed"
    assert both.front == front.front and both.drawn == front.drawn


def test_the_corner_is_where_the_front_forgets_enough(front):
    mild = record("0007", 0.1, 0.99, on_front=True)
    with_mild = corner(replace(front, records=[*front.records, mild]))
    assert [with_mild.ends(axis) for axis in "xy"] == [corner(front).ends(axis) for axis in "xy"]
    assert with_mild.ends("x")[0] > 0.5 and with_mild.ends("x")[1] > 0.9
    low, high = corner(replace(front, records=[mild])).ends("x")
    assert low < 0.1 < high < 0.2  # for want of a better one


def test_methods_without_noise_have_plain_marks():
    records = [
        record("0000", 0.9, 0.90, on_front=True, method="ga"),
        record("0001", 0.5, 0.80, method="ga"),
    ]
    drawn = traces(Front("tiny", records, BASE))
    assert {"trial", "front"} <= drawn.keys()
    assert not any("noise" in name for name in drawn)
    (hover,) = drawn["trial"]["hovertext"]
    assert "GA" in hover and "responses" not in hover
