"""The drawing kit: what both renderings show, and that labels keep their distance."""

import copy
import io

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from vgid.report.drawing import MARKERS, Panel, Picture, Scale, Series, _labels

RED, BLUE = "#d00000", "#0000d0"


def pixels(picture, colour):
    image = np.asarray(Image.open(io.BytesIO(picture.png())).convert("RGB"))
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return np.argwhere((np.abs(image.astype(int) - wanted) < 90).all(-1))  # edges are blended


TEN = Scale(range=(0, 10))


def alone(*drawn, x=TEN, y=TEN):
    return Picture("a <picture>", [Panel(x, y, drawn)], size=(4, 4), dpi=100)


def test_both_show_marks_lines_steps_and_bounds():
    bounds = Series("s", [2, 8], [5, 5], RED, x_bounds=[(0, 3), (7, 10)], listed=False)
    found = pixels(alone(bounds), RED)
    wide = found[:, 1].max() - found[:, 1].min()
    assert wide > 280  # the intervals reach the ends of a scale of some 340 pixels
    trace = alone(bounds).plotly()["data"][0]
    assert (trace["error_x"]["array"], trace["error_x"]["arrayminus"]) == ([1, 2], [2, 1])
    assert "error_y" not in trace

    path = {"x": [1, 9], "y": [9, 1], "colour": RED, "mark": "", "line": 3, "listed": False}
    straight, steps = (pixels(alone(Series("s", **path, steps=s)), RED) for s in (False, True))
    # Down first, then right: the steps lie along the left and lower edges of the same box.
    low, left = steps[:, 0].max(), steps[:, 1].min()
    assert (np.minimum(low - steps[:, 0], steps[:, 1] - left) < 10).all()
    assert not (np.minimum(low - straight[:, 0], straight[:, 1] - left) < 10).all()
    assert alone(Series("s", **path, steps=True)).plotly()["data"][0]["line"]["shape"] == "vh"

    gap = {**path, "x": [1, 1, None, 9, 9], "y": [1, 9, None, 1, 9]}
    columns = set(pixels(alone(Series("s", **gap)), RED)[:, 1])
    assert max(columns) - min(columns) > 240 and len(columns) < 20


@pytest.mark.parametrize("mark", MARKERS)
def test_every_mark_is_drawn_by_both(mark):
    picture = alone(Series("s", [5], [5], RED, mark, 30, listed=False))
    assert len(pixels(picture, RED)) > 20
    go.Figure(picture.plotly())  # plotly's own validation of every attribute


def test_bars_stand_beside_each_other_either_way():
    for horizontal in (False, True):
        scale = {"x": Scale(), "y": Scale(ticks=[(0, "a"), (1, "b")])}
        if not horizontal:
            scale = {"x": scale["y"], "y": scale["x"]}
        along, across = ("x", "y") if horizontal else ("y", "x")
        values = {along: [1, 2], across: [0, 1], f"{along}_bounds": [(1, 1), (1, 3)]}
        mark = "bar-right" if horizontal else "bar"
        sides = [Series(c, **values, colour=c, mark=mark) for c in (RED, BLUE)]
        picture = alone(*sides, **scale)
        red, blue = (pixels(picture, colour) for colour in (RED, BLUE))
        assert len(red) > 100 and len(blue) > 100
        data = picture.plotly()["data"]
        assert [trace[along] for trace in data[:2]] == [[1, 2], [1, 2]]
        assert data[1][f"error_{along}"]["array"] == [0, 1]
        go.Figure(copy.deepcopy(picture.plotly()))


def test_one_name_is_one_entry_and_no_text_is_markup():
    drawn = [Series("<b>a</b>", [1], [n], RED, hover=["<i>\nb"]) for n in (1, 2)]
    panel = Panel(Scale("x < y", ticks=[(1, "<one>")], marked="<one>"), Scale(), drawn, "<t>")
    figure = Picture("<title>", [panel, panel]).plotly()
    assert [trace["showlegend"] for trace in figure["data"]] == [True, False, False, False]
    assert {trace["legendgroup"] for trace in figure["data"]} == {"&lt;b&gt;a&lt;/b&gt;"}
    assert figure["data"][0]["hovertext"] == ["<b>&lt;i&gt;</b><br>b"]
    assert figure["layout"]["xaxis2"]["ticktext"] == ["<b>&lt;one&gt;</b>"]
    assert figure["layout"]["title"]["text"] == "&lt;title&gt;"
    assert figure["layout"]["xaxis"]["domain"][1] < figure["layout"]["xaxis2"]["domain"][0]


def test_labels_of_close_points_lie_over_no_other_and_over_no_point():
    frame, font = np.array((300.0, 200.0)), 8.0
    x = [0.5 + 0.004 * n for n in range(12)]
    y = [0.5 - 0.01 * n for n in range(12)]
    close = Series("s", x, y, RED, labels=[f"{n:04d}" for n in range(12)])
    outside = Series("o", [2.0], [2.0], RED, labels=["none"])
    panel = Panel(Scale(), Scale(), [close, outside])
    found = list(_labels(panel, np.array([(0.0, 1.0), (0.0, 1.0)]), frame, font))
    assert [label.text for label in found] == list(close.labels)
    half = np.array((0.32 * 4, 0.6)) * font
    middles = np.array([np.array(label.at) * frame + label.offset for label in found])
    points = np.array(close.points) * frame
    for number, middle in enumerate(middles):
        assert (np.abs(middle - middles[:number]) >= half * 1.99).any(-1).all()
        assert (np.abs(middle - points) >= half).any(-1).all()
        assert (middle > half).all() and (middle < frame - half).all()
    assert any(label.far for label in found) and not all(label.far for label in found)
