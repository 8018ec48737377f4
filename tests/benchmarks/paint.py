"""How soon a study's page is painted, and its size: ``python -m tests.benchmarks.paint``.

``--trials 600``, each with what is harvested at five scales, and ``--rounds 5`` pages of a new
window in a headless Chromium. Painted is when all pictures are drawn and the frame is on screen;
CPU seconds are of all of the browser's processes until then, which other work slows less.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.machine import emit, machine, machine_line
from tests.browser import programs
from tests.browser.conftest import FLAGS
from tests.browser.made_up_study import BASE, draw_trials, growth_of
from vgid.report.front import Front
from vgid.report.study_page import write_study_page
from vgid.study.outcome import said_of_growth

SCALES = (0.5, 0.7, 0.85, 1.2, 1.4)
SPACE = {"alpha": {"low": 0.5, "high": 4.0, "log": True}}
PAINTED = """() => new Promise((done) => {
  const look = () => {
    const pictures = [...document.querySelectorAll(".picture")];
    const ready = pictures.every((picture) => picture.querySelector(".main-svg")) &&
      document.querySelector("#candidates th button");
    requestAnimationFrame(ready ? () => requestAnimationFrame(done) : look);
  };
  look();
})"""


def page_of(trials: int, folder: Path) -> Path:
    """The page of a made-up study."""
    records = draw_trials(folder, trials, SCALES)
    growth = growth_of(records)
    shown = [record for record in records if not record.is_harvested or record.on_front]
    pages = {r.result.trial_id: f"#/experiments/1/runs/{n:032x}" for n, r in enumerate(shown)}
    title, server = f"tiny-llava, {trials} trials", "http://127.0.0.1:5000/"
    outlook = said_of_growth([volume for _, volume in growth])
    front = Front(title, records, BASE, BASE, pages, server, growth, outlook, space=SPACE)
    write_study_page(folder / "study.html", front)
    return folder / "study.html"


def painted(window: Any, page: Path) -> float:
    """Seconds from a call for a page to its paint."""
    began = time.perf_counter()
    window.goto(page.as_uri())
    window.evaluate(PAINTED)
    return time.perf_counter() - began


def main() -> None:
    """Run the command."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        page = page_of(options.trials, Path(folder))
        browser = play.chromium.launch(executable_path=programs.chromium(), args=FLAGS)
        seconds, spent = [], []
        for _ in range(options.rounds):
            window = browser.new_page(viewport={"width": 1400, "height": 1000})
            before = _cpu_s()
            seconds.append(painted(window, page))
            spent.append(_cpu_s() - before)
            window.close()
        browser.close()
        size = page.stat().st_size
    found = {"painted_s": statistics.median(seconds), "cpu_s": statistics.median(spent)}
    emit({"machine": machine_line(machine()), "bytes": size, **found}, as_json=False)


def _cpu_s() -> float:
    times = (child.cpu_times() for child in psutil.Process().children(recursive=True))
    return sum(time.user + time.system for time in times)


if __name__ == "__main__":
    main()
