"""The notebook, from top to bottom on a real study, as a reader would run it."""

import csv
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from vgid.deployment.record import read_deployment

NOTEBOOK = Path(__file__).parent.parent.parent / "notebooks" / "pareto_front.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_nothing_was_left_in_it(notebook):
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert not any("/home/" in cell.source or "/tmp/" in cell.source for cell in code(notebook))


def outputs_of(cell, kind):
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def test_it_runs_from_the_study_to_the_deployment(
    notebook, study_folder, tracking_uri, tmp_path, monkeypatch
):
    monkeypatch.setenv("VGID_TRACKING_URI", tracking_uri)
    monkeypatch.setenv("VGID_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("VGID_REQUEST_IDS", "R-17 R-18")
    monkeypatch.delenv("VGID_STUDY", raising=False)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    cells = code(notebook)
    figures = [figure for cell in cells for figure in outputs_of(cell, PLOTLY)]
    assert {trace["name"] for trace in figures[0]["data"]} >= {"front", "base model"}
    assert outputs_of(cells[-3], "application/vnd.jupyter.widget-view+json")
    file = tmp_path / "out" / "deployments" / "tiny-llava.yaml"
    deployment, _ = read_deployment(file)
    assert deployment.requests == ("R-17", "R-18")
    # Accepted is what the paired drop may be, not how far the score's own end is from the base.
    with (study_folder / "front.csv").open(newline="") as table:
        front = sorted(csv.DictReader(table), key=lambda row: float(row["forget_rougeL_reduction"]))
    worst = max(0.0, float(front[-1]["heldout_retain_rougeL_drop_high"]))
    bounds = f"share forgotten ≥ 0.5, retain drop ≤ {worst:g}"
    assert deployment.origin.rule.startswith(f"max-forget, {bounds};")
    (shown,) = outputs_of(cells[-1], "text/plain")
    assert yaml.safe_load(shown)["backbone"] == "tiny-llava"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


PLOTLY = "application/vnd.plotly.v1+json"
