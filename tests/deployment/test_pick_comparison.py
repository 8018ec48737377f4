"""The page over several backbones, drawn from scores written by hand."""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from vgid.config import TrialConfig
from vgid.deployment.pick_page import (
    COMPARISON,
    PickReport,
    comparison_grid,
    pick_picture,
    report_grid,
    shares,
    write_comparison,
)
from vgid.deployment.rules import Bounds, choose
from vgid.deployment.scores import Scored, attacks_of, marks_of, pooled, score_base
from vgid.errors import InputError
from vgid.results import Score
from vgid.study.finished import Trial


def score(value, n=30, reach=0.05):
    return Score(value=value, n=n, low=max(0.0, value - reach), high=min(1.0, value + reach))


def gap(value, n, reach):
    return Score(value=value, n=n, low=value - reach, high=value + reach)


def scored(forget, retain, reverse, cloze=None, base=(0.8, 1.0)):
    plain = {
        "forget_rougeL": score(forget),
        "retain_rougeL": score(retain, 300, 0.01),
        "forget_rougeL_reduction": gap(base[0] - forget, 30, 0.04),
        "retain_rougeL_drop": gap(base[1] - retain, 300, 0.02),
    }
    if cloze is not None:
        plain["forget_cloze"] = score(cloze, 10, 0.3)
    rise = gap(reverse - forget, 30, 0.03)
    return Scored(plain, {"forget_rougeL": score(reverse), "forget_rougeL_rise": rise})


def report(backbone, base, *candidates):
    names = [f"{i:04d}" for i in range(len(candidates))]
    found = {
        name: (Trial(name, TrialConfig(beta=1.0 + i), (0.0, 0.0), Path("nowhere")), candidates[i])
        for i, name in enumerate(names)
    }
    marks = [marks_of(name, base, candidates[i]) for i, name in enumerate(names)]
    choice = choose(marks, "constraint", Bounds())
    return PickReport(backbone, f"study of {backbone}", (1, 2, 3), base, found, choice)


@pytest.fixture(scope="module")
def reports():
    return [
        report(
            "tiny-llava",
            scored(0.8, 1.0, 0.9, cloze=1.0),
            scored(0.2, 0.98, 0.21, cloze=0.4),
            scored(0.1, 0.9, 0.1, cloze=0.3),
        ),
        report(
            "tiny-qwen2.5-vl",
            scored(0.5, 0.9, 0.5),
            scored(0.1, 0.88, 0.12, base=(0.5, 0.9)),
        ),
    ]


def test_shares_are_of_each_backbones_own_base(reports):
    assert [name for name, _, _ in shares(reports[0])] == ["0000", "0001"]
    assert shares(reports[0])[0][1:] == pytest.approx((0.75, 0.98))
    assert shares(reports[1])[0][1:] == pytest.approx((0.8, 0.88 / 0.9))


def test_page_picture_and_table_show_every_backbone(reports, tmp_path):
    write_comparison(tmp_path, reports)
    assert {path.name for path in tmp_path.iterdir()} == set(COMPARISON)
    page = (tmp_path / "comparison.html").read_text()
    payload = re.search(r'<script id="payload" type="application/json">(.*?)</script>', page, re.S)
    data = json.loads(payload[1])["pictures"]["comparison"]["data"]
    for number, found in enumerate(reports):
        others, deployed = data[2 * number : 2 * number + 2]
        assert deployed["name"] == others["name"] == f"{found.backbone}, trial 0000"
        assert deployed["x"] + others["x"] == [x for _, x, _ in shares(found)]
        assert "α1 β1" in deployed["hovertext"][0]
        assert f"<h2>{found.backbone}</h2>" in page
    assert "retain drop 0.100 where 0.05 is allowed (0.050 too much)" in page
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 800
    with (tmp_path / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["backbone"] for row in rows] == ["tiny-llava", "tiny-qwen2.5-vl"]
    assert float(rows[0]["base_forget"]) == 0.8
    assert float(rows[0]["deployed_retain"]) == 0.98
    assert rows[1]["deployed_cloze"] == ""
    assert len(comparison_grid(reports).rows) == 2


def test_celebrities_have_their_column_where_a_base_was_asked_of_them(reports):
    def asked(forget, retain, reverse):
        found = scored(forget, retain, reverse)
        return Scored(found.plain | {"celebrity_rougeL": score(retain - 0.1)}, found.reverse)

    mine = report("tiny-llava", asked(0.8, 1.0, 0.9), asked(0.2, 0.98, 0.21))
    grid = report_grid(mine)
    assert grid.header[-3:] == ("retain", "celebrities", "why")
    assert list(grid.rich().columns[-2].cells) == ["0.880", "0.900"]
    assert '<td class="number">0.880</td>' in grid.html()
    assert "celebrities" not in report_grid(reports[0]).header
    both = comparison_grid([mine, reports[1]])
    column = both.header.index("celebrities")
    assert [row[column] for row in both.rows] == ["0.900 → 0.880", ""]


def test_the_pictures_intervals_of_what_is_forgotten_pair_the_people(reports):
    """Of the candidate alone, as if the base were known, they would reach 0.05 either way."""
    left, _ = pick_picture(reports[0]).panels
    drawn = {label: one for one in left.drawn for label in one.labels}
    for name, gone in (("0000", 0.6), ("0001", 0.7)):
        assert drawn[name].x == pytest.approx([gone])
        assert drawn[name].x_bounds == [pytest.approx((gone - 0.04, gone + 0.04))]


def test_a_base_that_may_never_have_known_is_told_of_as_soon_as_it_is_scored():
    class Session:
        """Scores by hand; a real session would need a base that saw nobody."""

        def __init__(self, known):
            self.known = {"forget_rougeL": score(known)}

        def base_scores(self, part, seed):
            return self.known

        def rescore_attacked(self, adapter, part, seed):
            return self.known

    said = []
    for known in (0.9, 0.2):
        score_base(Session(known), (1, 2), said.append)
    assert [line.startswith("Scoring the base") for line in said] == [True, True, False]
    assert said[2].startswith("Warning: The base may never have known the forget people: its")


def test_what_is_sure_and_what_is_not_is_said(reports):
    text = " ".join(reports[0].sentences)
    assert "0.800 to 0.200 [0.150, 0.250], n = 30" in text
    assert "reverse rise up to 0.040 where 0.03 is allowed" in text
    assert "retain drop up to" not in text
    assert "It is the best of 2" in text
    assert "best of" not in " ".join(reports[1].sentences)


def test_marks_by_hand():
    marks = marks_of("0001", scored(0.8, 1.0, 0.9), scored(0.2, 0.95, 0.3))
    assert marks.reduction == pytest.approx((0.6, 0.56))
    assert marks.retain == pytest.approx((0.95, 0.94))
    assert marks.retain_drop == pytest.approx((0.05, 0.07))
    assert marks.reverse_rise == pytest.approx((0.1, 0.13))
    assert marks.cloze is None


def test_pooling_by_hand():
    runs = [{"a": score(0.2, 7, 0.1)}, {"a": score(0.6, 7, 0.2)}, {"a": score(0.1, 7, 0.05)}]
    found = pooled(runs)["a"]
    assert found.value == pytest.approx(0.3)
    assert (found.n, found.low, found.high) == (7, pytest.approx(0.05), pytest.approx(0.8))


def test_an_attack_without_questions_counts_as_not_run():
    attacks, not_run = attacks_of(scored(0.1, 0.9, 0.1))
    assert [attack.name for attack in attacks] == ["reverse prompt (paper A.3.7)"]
    assert not_run[0] == "new portraits and wording (test set): the data has no such questions"
    assert any("membership inference" in name for name in not_run)


def test_without_generation_questions_there_is_nothing_to_choose_by():
    bare = Scored({}, {})
    with pytest.raises(InputError, match="forget_rougeL"):
        marks_of("0001", bare, bare)
