"""What a person sees of a study in MLflow's own pages, in a real browser on real servers."""

import json
import urllib.error
import urllib.request

import psutil
import pytest

from tests.deployment.made_up_deployment import deploy
from vgid.deployment.registry import register, rollback
from vgid.report.note import COLUMNS, Place, run_page
from vgid.report.records import run_name
from vgid.requirement import OBJECTIVES

POINT = """(trial) => {
  const plot = document.getElementById("front");
  plot.scrollIntoView();
  const { xaxis, yaxis } = plot._fullLayout;
  const trace = plot._fullData.find((t) => t.name === "front");
  const index = trace.customdata.indexOf(trial);
  const box = plot.getBoundingClientRect();
  return [box.left + xaxis._offset + xaxis.d2p(trace.x[index]),
          box.top + yaxis._offset + yaxis.d2p(trace.y[index])];
}"""


def names_of(site):
    return {
        record.result.trial_id: run_name(record.config, record.result.trial_id)
        for record in site.recorded.front.records
    }


def place_of(recorded):
    return Place(recorded.experiment, recorded.study_id, recorded.study)


def heading(page, name):
    page.get_by_role("heading", name=name).wait_for()


def test_the_study_says_its_result_and_leads_to_its_runs(site, picture):
    page = site.open(run_page(site.recorded.experiment, site.recorded.study))
    page.get_by_text("Result.").wait_for()
    best = site.recorded.front.front[-1].result.trial_id
    page.get_by_text("Show more").first.click()
    drawn = page.locator('img[src*="front-small.png"]')
    drawn.wait_for()
    loaded = "async (image) => { await image.decode(); return image.naturalWidth; }"
    assert drawn.evaluate(loaded) == 720
    page.screenshot(path=picture("study"))
    with page.context.expect_page() as opened:
        page.get_by_role("link", name=best, exact=True).first.click()
    heading(opened.value, names_of(site)[best])
    opened.value.screenshot(path=picture("run"))
    opened.value.close()


def test_the_front_can_be_hovered_and_followed(site, picture):
    page = site.open(place_of(site.recorded).page)
    frame = page.frame_locator("iframe.mlflow-html-iframe")
    frame.locator("#front .scatterlayer .point").first.wait_for()
    front = site.recorded.front
    # every completed trial once, the held-out scores, the base model; no trial is chosen yet
    expected = len(front.drawn) + len(front.held_out()) + len(front.default) + 1
    assert frame.locator("#front .scatterlayer .point").count() == expected
    trial = front.front[len(front.front) // 2].result.trial_id
    inner = page.locator("iframe.mlflow-html-iframe").element_handle().content_frame()
    x, y = inner.evaluate(POINT, trial)
    box = page.locator("iframe.mlflow-html-iframe").bounding_box()
    at = (box["x"] + x, box["y"] + y)
    page.mouse.move(at[0] + 40, at[1] - 40)
    page.mouse.move(*at, steps=4)
    said = frame.locator("#front .hoverlayer .hovertext")
    said.wait_for()
    name = names_of(site)[trial]
    for part in (f"trial {trial}", name.removeprefix(f"{trial} · ")):
        assert part in said.text_content()
    page.screenshot(path=picture("hover"))

    page.mouse.click(*at)
    assert frame.locator("#run").inner_text() == name
    assert "copied" in frame.locator("#chosen").inner_text()
    link = frame.locator("#address").inner_text()
    assert link == f"{site.address}/{site.recorded.pages[trial]}"
    page.screenshot(path=picture("chosen"))
    page.goto(link)
    heading(page, name)


def test_trials_are_listed_by_what_matters_and_compared(site, picture):
    recorded = site.recorded
    page = site.open(place_of(recorded).table)
    front = [record.result.trial_id for record in recorded.front.front]
    names = names_of(site)
    page.get_by_role("link", name=names[front[-1]]).wait_for()
    titles = page.locator(".ag-header-cell .ag-header-cell-text, .ag-header-cell [data-testid]")
    shown = [title.split("`")[1] for title in COLUMNS]
    page.get_by_text(OBJECTIVES[1], exact=True).first.wait_for()
    seen = [text for text in titles.all_inner_texts() if text in shown]
    assert seen == shown[: len(seen)] and len(seen) >= 4
    page.screenshot(path=picture("table"))

    chosen = front[-2:]
    for trial in chosen:
        row = page.locator(".ag-pinned-left-cols-container .ag-row", has_text=names[trial])
        row.locator(".ag-checkbox-input").check()
    page.get_by_role("button", name="Compare").click()
    heading(page, "Comparing 2 Runs from 1 Experiment")
    for trial in chosen:
        page.get_by_text(names[trial]).first.wait_for()
    page.screenshot(path=picture("compared"))


def test_mlflow_draws_the_trials_as_charts(site, picture):
    page = site.open(place_of(site.recorded).charts)
    points = page.locator(".js-plotly-plot .scatterlayer .point")
    points.first.wait_for()
    page.wait_for_timeout(300)
    assert points.count() >= len(site.recorded.front.drawn)
    page.screenshot(path=picture("chart"))


def test_a_pick_is_the_champion_in_the_registry(site, picture, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes(b"{}")
    versions = [
        register(deploy(tmp_path / trial, adapter, trial), site.address)
        for trial in ("0010", "0005")
    ]
    assert versions == [1, 2]
    page = site.open("#/models/vgid-tiny-llava")
    heading(page, "vgid-tiny-llava")
    for version, alias in (("Version 1", "previous"), ("Version 2", "champion")):
        row = page.get_by_role("row").filter(has_text=version)
        row.get_by_text(alias).wait_for()
    page.screenshot(path=picture("registry"))
    site.open("#/models/vgid-tiny-llava/versions/2")
    page.get_by_text("Suppressed under these tests").wait_for()
    page.screenshot(path=picture("version"))
    assert rollback("tiny-llava", site.address) == (1, 2)


def status_of(address, path, body=None, **header):
    """What a server answers to a request with headers of one's own."""
    header["Content-Type"] = "application/json"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{address}/{path}", data, header)) as a:
            return a.status
    except urllib.error.HTTPError as refused:
        return refused.code


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_mlflow_listens_on_loopback_and_answers_to_no_foreign_name(servers, name):
    """A page elsewhere whose name is made to lead here must not read or write what is here."""
    address, recorded = servers[name]
    port = int(address.rsplit(":", 1)[1])
    connections = psutil.net_connections("tcp")
    listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    assert {where.ip for where in listening if where.port == port} == {"127.0.0.1"}
    run = f"run_id={recorded.study}"
    asked = {
        "api/2.0/mlflow/experiments/search": {"max_results": 1},
        "ajax-api/2.0/mlflow/runs/search": {"experiment_ids": [recorded.experiment]},
        f"api/2.0/mlflow/runs/get?{run}": None,
        f"get-artifact?{run}&path=study.json": None,
        "graphql": {"query": "{ __typename }"},
        "": None,
    }
    for path, body in asked.items():
        assert status_of(address, path, body) == 200, path
        assert status_of(address, path, body, Host="foreign.example") == 403, path
        assert status_of(address, path, body, Host=f"foreign.example:{port}") == 403, path
        if body is not None and "mlflow" in path:
            assert status_of(address, path, body, Origin="http://foreign.example") == 403, path
