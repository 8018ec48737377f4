"""One small study for all tests of deployments, made as users make it, recorded outside its folder.

``study_folder`` is the study, ``tracking_uri`` the SQLite file that MLflow kept it in, and
``benchmark_folder`` the data. They are shared by the whole session: tests write elsewhere, or put
back what they changed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.small_benchmark import write_small
from vgid import cli
from vgid.data.benchmark import Benchmark
from vgid.deployment.unlearn import UnlearnConfig, unlearn

ROOT = Path(__file__).parent.parent.parent
TRIALS = 4
TIMEOUT_S = 550

SPACE = """
backbone: tiny-llava
methods:
  vgid:
    parameters:
      alpha: {low: 0.5, high: 2.0, log: true}
      noise_type: {choices: [random, white]}
      prompt_style: strict
      learning_rate: {choices: [2.0e-4, 4.0e-3]}
      epochs: 2
    first_points:
      - {alpha: 1.0, noise_type: random, learning_rate: 4.0e-3}
      - {alpha: 0.5, noise_type: white, learning_rate: 2.0e-4}
"""


def run_script(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run ``studies/<name>`` in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, f"studies/{name}", *flags],
        cwd=ROOT,
        env=clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run(*words):
    """Run ``vgid`` in this process; the exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, words)])
    return stopped.value.code


def pick(*flags):
    """Run ``vgid pick`` in this process; the registry is left alone unless a test wants it."""
    return run("pick", *flags, "--no-champion")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deployments-data") / "data"
    write_small(folder)
    return folder


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('deployments-mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory, benchmark_folder, tracking_uri) -> Path:
    root = tmp_path_factory.mktemp("deployments-study")
    (root / "space.yaml").write_text(SPACE)
    done = run_script(
        "pareto_search.py",
        *("--data", str(benchmark_folder), "--search-space", str(root / "space.yaml")),
        *("--output", str(root / "study"), "--tracking-uri", tracking_uri),
        *("--trials", str(TRIALS), "--retain-people", "4", "--seed", "3", "--harvest", "1.2"),
    )
    assert done.returncode == 0, done.stderr
    return root / "study"


@pytest.fixture(scope="session")
def deployment_file(tmp_path_factory, benchmark_folder) -> Path:
    """Two people, forgotten by a short trial of gradient ascent, which needs no teacher."""
    config = UnlearnConfig(
        data=benchmark_folder,
        forget_ids=Benchmark.open(benchmark_folder).person_ids("forget_5")[:2],
        output=tmp_path_factory.mktemp("deployments-first"),
        request_id=("R-1",),
        setting=("method=ga", "epochs=6", "learning_rate=2e-3"),
        min_forget=None,
        retain_people=4,
        seeds=1,
    )
    return unlearn(config).file


@pytest.fixture(scope="session")
def next_deployment_file(tmp_path_factory, benchmark_folder, deployment_file) -> Path:
    """The deployment of a second request, one more person, that starts from the first."""
    config = UnlearnConfig(
        data=benchmark_folder,
        output=tmp_path_factory.mktemp("deployments-next"),
        from_deployment=deployment_file,
        forget_ids=Benchmark.open(benchmark_folder).person_ids("forget_5")[2:3],
        request_id=("R-2",),
        min_forget=None,
        retain_people=4,
        seeds=1,
    )
    return unlearn(config).file


@pytest.fixture(scope="session")
def runs(study_folder, tracking_uri):
    """The parent run's id, and one of a trial."""
    client = MlflowClient(tracking_uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments)
    by_kind = {run.data.tags["vgid.kind"]: run.info.run_id for run in found}
    return by_kind["study"], by_kind["trial"]
