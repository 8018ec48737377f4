"""The page of a study: that it stands on its own, and says what the study is."""

import base64
import copy
import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape

import plotly.graph_objects as go
import pytest

from tests.browser.made_up_study import BASE, draw_trials, growth_of
from tests.report.test_tables import Cells
from vgid.report.front import Front, corner, page_picture
from vgid.report.result import result
from vgid.report.study_page import candidates, growth_picture, write_study_page


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """Thirty trials with a harvest each; one failed, some were stopped, some miss a bound."""
    records = draw_trials(tmp_path_factory.mktemp("study"), 30, (0.7, 1.4))
    growth = growth_of(records)
    return Front("tiny <llava>", records, BASE, BASE, {"0001": "#/run"}, growth=growth)


def written(front, folder):
    write_study_page(folder / "study.html", front)
    return (folder / "study.html").read_text()


def element(page, name):
    return re.search(rf'<script id="{name}"[^>]*>(.*?)</script>', page, re.DOTALL)[1]


def test_the_page_needs_no_network_and_carries_its_pictures(front, tmp_path):
    page = written(front, tmp_path)
    assert len(page) < 5_000_000
    assert not re.search(r"(src|href)\s*=", page)
    assert "tiny &lt;llava&gt;" in page and "<llava>" not in page
    assert "Plotly" in gzip.decompress(base64.b64decode(element(page, "library"))).decode()
    payload = json.loads(element(page, "payload"))
    assert list(payload["pictures"]) == ["front", "growth", "insights"]
    for name, figure in payload["pictures"].items():
        assert page.count(f'<div id="{name}" class="picture') == 1
        go.Figure(copy.deepcopy(figure))  # plotly's own validation of every attribute
    assert payload["pictures"]["front"] == json.loads(json.dumps(page_picture(front).plotly()))
    assert payload["near"]["xaxis.range"] == list(corner(front).ends("x"))
    assert written(front, tmp_path) == page


def test_result_warnings_and_checks_are_sentences_in_their_order(front, tmp_path):
    told = replace(front, warnings=["It was <cut> short."], outlook="The front is flat.")
    page = written(told, tmp_path)
    places = [page.index("It was &lt;cut&gt; short.")]
    assert len(result(told)) == 3 and result(told)[-1].endswith(" The front is flat.")
    places += [unescape(page).index(sentence) for sentence in result(told)]
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "The front",
        "How it grew",
        "What made the difference",
        "Health checks",
        "All candidates",
    ]
    places += [page.index(f"<h2>{heading}") for heading in headings]
    assert places == sorted(places)
    assert "Nothing was found. Looked for" in page
    ignorant = replace(
        told, base=BASE | {"forget_rougeL": BASE["forget_rougeL"].model_copy(update={"value": 0.2})}
    )
    assert page.count("may never have known") == 0
    assert written(ignorant, tmp_path).count('class="warning">The base may never have known') == 1


def test_the_table_has_every_candidate_once_and_the_front_first(front):
    grid = candidates(front)
    front_ids = [record.result.trial_id for record in reversed(front.front)]
    ids = [row[0] for row in grid.rows]
    assert ids[: len(front_ids)] == front_ids and set(grid.marks) == set(range(len(front_ids)))
    assert sorted(ids) == sorted(record.result.trial_id for record in front.records)
    states = {row[0]: row[1] for row in grid.rows}
    assert (states["0007"], states["0009"], states["0004"]) == (
        "failed",
        "stopped early",
        "out of bounds",
    )
    assert set(states.values()) == {
        "front",
        "dominated",
        "failed",
        "stopped early",
        "out of bounds",
    }
    cells = Cells(grid.html())
    head, first, *_ = cells.rows
    held_out = [text for _, text in head].index("held-out forget reduction")
    assert first[held_out] == ("number", str(front.front[-1].held_out["forget_rougeL_reduction"]))
    assert [kind for kind, _ in head][:3] == [None, None, None]  # words are sorted as words


def test_the_hypervolume_grows_in_steps_over_trials_and_over_seconds(front):
    grown = replace(front, growth=[(3.0, 0.1), (5.0, 0.1), (9.0, 0.4)])
    trials, seconds = (panel.drawn[0] for panel in growth_picture(grown).panels)
    assert list(zip(trials.x, trials.y, strict=True)) == [
        (1, 0.1),
        (1, 0.1),
        (2, 0.1),
        (2, 0.1),
        (3, 0.1),
        (3, 0.4),
    ]
    assert seconds.x == [3.0, 3.0, 5.0, 5.0, 9.0, 9.0] and seconds.y == trials.y
    assert trials.hover[-1] == "3 trials, 9 s\nhypervolume 0.4000"


@pytest.mark.parametrize("kept", ["nothing", "failed", "one", "out of bounds"])
def test_a_study_with_next_to_nothing_has_its_page(front, kept, tmp_path):
    trials = {record.result.trial_id: record for record in front.records}
    records = {
        "nothing": [],
        "failed": [trials["0007"]],
        "one": [replace(trials["0001"], on_front=True)],
        "out of bounds": [trials["0004"], trials["0014"]],
    }[kept]
    small = Front("t", records, BASE, growth=[(1.0, 0.0)] if records else [])
    page = written(small, tmp_path)
    drawn = ["front", "insights"] if kept == "out of bounds" else ["front"]
    assert list(json.loads(element(page, "payload"))["pictures"]) == drawn
    said = "1 trial, and no front yet" if kept == "failed" else "no front yet"
    assert (said in page) == (kept != "one")
    assert ('<button id="near"' in page) == (kept == "one")
    assert f"A front of {int(kept == 'one')}" in page
    assert len(re.findall("<tr", page)) == 1 + len(records)


def test_600_harvested_trials_fit_on_a_page(tmp_path, monkeypatch):
    """How soon it is painted, ``tests.benchmarks.paint`` measures."""
    monkeypatch.setattr("vgid.report.study_page.importances", lambda trials: {})
    records = draw_trials(tmp_path, 600, (0.5, 0.7, 0.85, 1.2, 1.4))
    pages = {record.result.trial_id: "#/experiments/1/runs/" + 32 * "0" for record in records}
    growth = [(float(number), 0.4) for number in range(600)]
    page = written(Front("t", records, BASE, BASE, pages, growth=growth), tmp_path)
    assert len(records) > 3000 and len(page.encode()) < 5_000_000
    assert len(re.findall("<tr", page)) == 1 + len(records)


def test_importing_is_light():
    code = (
        "import sys, vgid.report.study_page\n"
        "heavy = ('matplotlib', 'plotly', 'torch', 'pandas', 'optuna', 'mlflow', 'sklearn')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
