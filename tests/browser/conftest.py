"""A recorded study on two MLflow servers, and a browser that looks at it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.browser import programs
from tests.browser.made_up_study import Recorded, record_study
from tests.browser.servers import mlflow_server, postgres

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 60_000

QUIET = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
"""MLflow opens its assistant over a third of the first page that somebody visits."""


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: needs Chromium and PostgreSQL")


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if Path(item.path).is_relative_to(Path(__file__).parent)]
    for item in here:
        item.add_marker("browser")
    if here and programs.missing():
        config.get_terminal_writer().line(f"\n{programs.reason()}", red=True)
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


@dataclass(frozen=True)
class Site:
    """An MLflow server with a study, seen in a browser."""

    address: str
    recorded: Recorded
    page: Page

    def open(self, page: str) -> Page:
        self.page.goto(f"{self.address}/{page}")
        return self.page


@pytest.fixture(scope="package")
def servers(tmp_path_factory):
    """A server on SQLite and one on PostgreSQL, started side by side, each with the study."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sqlite", "postgresql")}
    with ExitStack() as stack:
        stores = {
            "sqlite": f"sqlite:///{folders['sqlite'] / 'mlflow.db'}",
            "postgresql": stack.enter_context(postgres()),
        }

        def start(name):
            address = stack.enter_context(mlflow_server(stores[name], folders[name]))
            return address, record_study(address, folders[name] / "study")

        with ThreadPoolExecutor() as pool:
            yield dict(zip(stores, pool.map(start, stores), strict=True))


@pytest.fixture(scope="package")
def window():
    """One page of a headless Chromium; errors of its scripts are collected in ``page.errors``.

    Playwright has an event loop running while it is there, beside which ``asyncio.run`` refuses to:
    so it ends with the package, before other tests of the process.
    """
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=programs.chromium(), args=FLAGS)
        context = browser.new_context(viewport={"width": 1600, "height": 1000})
        context.add_init_script(QUIET)
        context.set_default_timeout(PATIENCE_MS)
        yield context.new_page()
        browser.close()


@pytest.fixture(scope="package", params=["sqlite", "postgresql"])
def site(request, servers, window) -> Site:
    address, recorded = servers[request.param]
    return Site(address, recorded, window)


@pytest.fixture
def picture(request, tmp_path):
    """Where the test's screenshots go, to be looked at."""
    return lambda name: str(tmp_path / f"{name}.png")
