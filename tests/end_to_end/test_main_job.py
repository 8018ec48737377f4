"""The main job as people start it: from the command line, killed and resumed, and as a Ray job."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import optuna
import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient

from tests.end_to_end.conftest import free_port
from tests.end_to_end.privacy import leaks, private_texts
from vgid.study.search import open_journal

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "studies/pareto_search.py"
TRIALS = 5
TIMEOUT_S = 300


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def arguments(data, space, output, trials=TRIALS, *more):
    return [
        *("--data", str(data), "--search-space", str(space), "--output", str(output)),
        *("--trials", str(trials), "--retain-people", "4", "--seed", "3", *more),
    ]


def main_job(*flags, **more):
    return subprocess.run(
        [sys.executable, SCRIPT, *flags],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def wait_for(condition, what):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def results(output):
    records = [json.loads(p.read_text()) for p in sorted(output.glob("trials/[0-9]*.json"))]
    return {r["trial_id"]: r["result"] for r in records if r["result"] is not None}


def record_of(output, name):
    return output / "trials" / f"{name}.json"


def ended(output):
    return list(results(output))


def read_trials(output, name="trials.csv"):
    table = pd.read_csv(output / name, dtype={"trial_id": str}, float_precision="round_trip")
    return table.set_index("trial_id")


@pytest.fixture(scope="module")
def ray_files():
    """Where Ray keeps the logs of ``study``; short, since a socket's path has 107 bytes."""
    with tempfile.TemporaryDirectory(
        prefix="vgid", dir="/tmp", ignore_cleanup_errors=True
    ) as short:
        yield Path(short)


@pytest.fixture(scope="module")
def study(data, space, ray_files, tmp_path_factory):
    """A study whose driver was killed after two trials, and that was then resumed."""
    output = tmp_path_factory.mktemp("main") / "study"
    flags = arguments(data, space, output, TRIALS, "--harvest", "0.8,1.2")
    driver = subprocess.Popen(
        [sys.executable, SCRIPT, *flags],
        cwd=ROOT,
        env=environment(RAY_TMPDIR=str(ray_files)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: len(ended(output)) >= 2 or driver.poll() is not None, "two trials")
    assert driver.poll() is None
    second = main_job(*flags, "--resume")
    assert second.returncode == 2
    assert "a study is running in this folder" in second.stderr
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {name: record_of(output, name).read_bytes() for name in ended(output)}
    assert 2 <= len(before) < TRIALS
    done = main_job(*flags, "--resume", RAY_TMPDIR=str(ray_files))
    assert done.returncode == 0, done.stderr + (output / "study.log").read_text()[-3000:]
    # Ray's two small agents try to tell the dead cluster for a minute before they give up.
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    alive = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not [p for p in alive if p.name() not in agents]
    return output, done.stdout, before


def test_the_output_folder_holds_what_the_contract_names(study):
    output, _, _ = study
    for name in ("study.json", "trials.csv", "front.csv", "study.html", "front.png", "mlflow.db"):
        assert (output / name).stat().st_size > 0, name
    table = read_trials(output)
    assert list(table.index) == [f"{n:04d}" for n in range(TRIALS)]
    assert set(table.status) == {"completed"}
    for adapter in table.adapter:
        assert (output / adapter / "adapter_model.safetensors").exists()
        assert (output / adapter / "adapter_config.json").exists()
    summary = json.loads((output / "study.json").read_text())
    assert summary["counts"] == {"completed": TRIALS, "pruned": 0, "failed": 0, "lost": 0}
    base = summary["base"]["search"]
    assert summary["reference_point"] == [0.0, 0.5 * base["retain_rougeL"]["value"]]
    reduction = base["forget_rougeL"]["value"] - table.forget_rougeL
    assert list(table.forget_rougeL_reduction) == list(reduction)
    candidates = read_trials(output, "candidates.csv")
    assert list(candidates[candidates.on_front].index) == summary["front"]
    assert summary["hypervolume"] > 0
    assert set(table.retain_seen_shown) == {2}
    assert summary["retain_seen"] == {"people": 2, "shown_least": 2, "shown_most": 2}
    assert summary["phases"]["overhead"]["median_s"] >= 0
    store = summary["store"]
    later = [result["store"] for result in list(results(output).values())[1:]]
    asked = sum(use["teacher_hits"] + use["teacher_misses"] for use in later)
    assert store["targets_after_first_trial"] == asked > 1000
    hits = sum(use["teacher_hits"] for use in later)
    assert store["hit_rate_after_first_trial"] == hits / asked > 0.5  # two slots fill it at first
    assert store["bytes"] == sum(
        path.stat().st_size for path in (output / "store").glob("*/*.safetensors")
    )
    assert summary["versions"]["ray"]
    header = json.loads((output / "trials" / "study.json").read_text())
    assert header["data_sha256"] == summary["data_sha256"]
    assert header["base_revision"] == summary["base_sha256"]
    assert header["precision"] == "float32"
    assert header["vgid_version"] == summary["versions"]["vgid"]
    assert not list((output / "checkpoints").iterdir())


def test_each_trial_is_harvested_and_what_of_it_is_on_the_front_has_an_adapter(study):
    output, _, _ = study
    trials, candidates = read_trials(output), read_trials(output, "candidates.csv")
    assert list(candidates.index) == [
        name for trial in trials.index for name in (trial, f"{trial}x0.8", f"{trial}x1.2")
    ]
    of_trials = candidates.loc[trials.index, trials.columns]
    pd.testing.assert_frame_equal(of_trials.drop(columns="seconds"), trials.drop(columns="seconds"))
    front = read_trials(output, "front.csv")
    harvested = front[front.adapter_scale != 1]
    assert len(harvested) > 0
    for name, row in harvested.iterrows():
        trial, _, scale = name.partition("x")
        assert row.adapter_scale == float(scale)
        own = trials.loc[trial]
        assert (row.alpha, row.learning_rate) == (own.alpha, own.learning_rate)
        weights = "adapter_model.safetensors"
        assert (output / row.adapter / weights).samefile(output / own.adapter / weights)
        configs = [
            json.loads((output / each / "adapter_config.json").read_text())
            for each in (own.adapter, row.adapter)
        ]
        assert configs[1]["lora_alpha"] == configs[0]["lora_alpha"] * float(scale)


def test_the_front_is_scored_again_on_held_out_questions(study):
    output, _, _ = study
    summary = json.loads((output / "study.json").read_text())
    front = pd.read_csv(output / "front.csv", dtype={"trial_id": str})
    assert list(front.trial_id) == summary["front"]
    base = summary["base"]["held_out"]
    for gap, name in (
        ("forget_rougeL_reduction", "forget_rougeL"),
        ("retain_rougeL_drop", "retain_rougeL"),
    ):
        of_base = base[name]["value"] - front[f"heldout_{name}"]
        assert front[f"heldout_{gap}"].to_numpy() == pytest.approx(of_base.to_numpy())
    for name in ("forget_rougeL", "retain_rougeL", "forget_rougeL_reduction", "retain_rougeL_drop"):
        assert (front[f"heldout_{name}_low"] <= front[f"heldout_{name}"]).all()
        assert (front[f"heldout_{name}"] <= front[f"heldout_{name}_high"]).all()


def test_a_killed_study_keeps_what_it_had_and_doubles_nothing(study):
    output, _, before = study
    for name, content in before.items():
        assert record_of(output, name).read_bytes() == content
    trials = optuna.load_study(study_name=None, storage=open_journal(output)).trials
    table = read_trials(output)
    assert [f"{t.number:04d}" for t in trials] == list(table.index)
    assert {t.state.name for t in trials} == {"COMPLETE"}
    for trial, (_, row) in zip(trials, table.iterrows(), strict=True):
        assert trial.values == [row.forget_rougeL_reduction, row.retain_rougeL]
        assert trial.params["alpha"] == row.alpha


def test_mlflow_holds_the_same_study(study):
    output, _, _ = study
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny-llava"]
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = parents
    children = {
        run.data.tags["vgid.trial_id"]: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    table, summary = read_trials(output), json.loads((output / "study.json").read_text())
    # A run for each trial, and for what was harvested as far as it is on the front.
    harvested = [name for name in summary["front"] if "x" in name]
    assert len(runs) == 1 + TRIALS + len(harvested)
    assert sorted(children) == sorted([*table.index, *harvested])
    front = read_trials(output, "front.csv")
    for run in (children.pop(name) for name in harvested):
        name = run.data.tags["vgid.trial_id"]
        assert run.data.tags["vgid.kind"] == "trial"  # so that the study's view shows it
        assert run.data.tags["vgid.on_front"] == "true"
        assert float(run.data.params["adapter_scale"]) == front.adapter_scale[name]
        assert run.data.metrics["heldout_retain_rougeL"] == front.heldout_retain_rougeL[name]
        adapters = {file.path for file in client.list_artifacts(run.info.run_id, "adapter")}
        assert "adapter/adapter_config.json" in adapters
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["hypervolume"] == summary["hypervolume"]
    assert parent.data.tags["vgid.dataset_hash"] == summary["data_sha256"]
    assert "mlflow.note.content" in parent.data.tags
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"study.html", "front.png", "front.csv", "trials.csv", "study.json"} <= artifacts
    for name, run in children.items():
        row = table.loc[name]
        assert run.info.status == "FINISHED"
        assert float(run.data.params["alpha"]) == row.alpha
        assert run.data.metrics["retain_rougeL"] == row.retain_rougeL
        losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
        epochs = [e["report"] for e in json.loads(record_of(output, name).read_text())["epochs"]]
        assert losses == [(e["step"], e["metrics"]["loss"]) for e in epochs]
        assert [e["epoch"] for e in epochs] == [1, 2]
        assert losses[-1][1] == row.loss
        adapters = {file.path for file in client.list_artifacts(run.info.run_id, "adapter")}
        assert "adapter/adapter_model.safetensors" in adapters


def test_the_last_line_says_how_to_open_mlflow_and_libraries_are_quiet(study):
    output, stdout, _ = study
    lines = stdout.strip().splitlines()
    assert "mlflow ui --backend-store-uri" in lines[-1]
    assert str(output / "mlflow.db") in lines[-1]
    assert "raylet" not in stdout
    assert "Warning" not in stdout
    text = "\n".join(lines)
    for part in ("Pareto front", "Phases", "overhead", "study.html", f"{TRIALS}/{TRIALS} ended"):
        assert part in text


def test_nothing_that_is_kept_or_shown_tells_of_the_people_to_forget(
    study, ray_files, data, tmp_path
):
    output, stdout, _ = study
    texts = private_texts(data)
    kept = sorted(texts)[::20]
    (tmp_path / "shown").write_text(stdout)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "kept").write_text("\n".join(kept))
    assert len(leaks(texts, tmp_path / "found")) >= len(kept) > 5  # it would be noticed
    (tmp_path / "found" / "kept").unlink()
    logs = {re.split(r"[-.]", path.name)[0] for path in ray_files.rglob("*.*")}
    assert {"worker", "python", "raylet", "dashboard_agent"} <= logs
    assert leaks(texts, output, ray_files, tmp_path) == []


def test_without_resume_a_finished_study_is_left_alone(study, data, space):
    output, _, _ = study
    before = (output / "trials.csv").read_bytes()
    done = main_job(*arguments(data, space, output))
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert (output / "trials.csv").read_bytes() == before


def metrics_of_first_trial(output):
    row = read_trials(output).loc["0000"].drop(["seconds", "on_front"])
    return row.dropna().to_dict()


def test_an_interrupted_study_ends_in_order(data, space, tmp_path):
    output = tmp_path / "study"
    driver = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments(data, space, output, 50)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(ended(output)) >= 1 or driver.poll() is not None, "a trial")
    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    open_to = {process: listening(process) for process in family}
    assert {host.removeprefix("::ffff:") for host, _ in set().union(*open_to.values())} == {
        "127.0.0.1"
    }
    lines = [" ".join(process.cmdline()) for process in family]
    idle = ["DatasetManager", "PlacementGroupCleaner", "SynchronizationActor", "TrainController"]
    idle += ["dashboard/dashboard.py", "monitor.py"]  # without an address there is no page either
    assert not [line for line in lines if any(name in line for name in idle)]
    assert [line for line in lines if "RayTrainWorker" in line]  # so they would be seen
    token = Path("~/.ray/auth_token").expanduser()
    assert token.stat().st_mode & 0o077 == 0
    driver.send_signal(signal.SIGTERM)
    stdout, stderr = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 130
    assert "--resume" in stderr
    assert "mlflow ui" in stdout
    summary = json.loads((output / "study.json").read_text())
    assert summary["interrupted"]
    assert list(read_trials(output).index) == ended(output)
    assert {"trials.csv", "front.csv"} <= set(summary["files"])
    assert all((output / name).exists() for name in summary["files"])
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny-llava"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) > 1 + len(ended(output))  # the trials that were in flight have one too
    status = {run.data.tags.get("vgid.trial_id", ""): run.info.status for run in runs}
    assert status.pop("") == "KILLED"
    assert {name for name, shown in status.items() if shown == "FINISHED"} == set(ended(output))
    assert "RUNNING" not in status.values()


def listening(process):
    """Addresses and ports at which a process takes connections."""
    connections = process.net_connections("tcp")
    return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}


def statuses(dashboard, **header):
    """What a dashboard answers to who would send it code, or look around in it."""
    header["Content-Type"] = "application/json"
    code = json.dumps({"entrypoint": "true"}).encode()
    pages = {"api/jobs/": code, "api/v0/actors": None, "nodes?view=summary": None, "logs/": None}
    found = set()
    for page, body in pages.items():
        request = urllib.request.Request(f"http://127.0.0.1:{dashboard}/{page}", body, header)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found.add(answer.status)
        except urllib.error.HTTPError as refused:
            found.add(refused.code)
    return found


def assert_asks_for_its_token(dashboard):
    assert statuses(dashboard) == {401}
    assert statuses(dashboard, Authorization=f"Bearer {secrets.token_urlsafe(32)}") == {403}


def assert_says_that_a_token_is_wanted(port, output):
    """A driver that shows the cluster none, whether it means to or not, or another one."""
    address = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    other = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_urlsafe(32)}
    for shown in ({}, other):
        refused = main_job("--output", str(output), **address, **shown)
        assert refused.returncode == 2
        assert "wants a token that this process does not show; set RAY_AUTH_MODE" in refused.stderr
        assert refused.stderr.count("\n") == 1
        shutil.rmtree(output)


def submit(dashboard, secured, flags, *options):
    """Submit the main job; the cluster refuses with other reasons until it is fully up."""
    command = ["ray", "job", "submit", f"--address=http://127.0.0.1:{dashboard}", *options, "--"]
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        done = subprocess.run(
            [*command, "python", str(ROOT / SCRIPT), *flags],
            cwd=ROOT,
            env=secured,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        starting = "No available agent" in done.stderr or "ConnectionError" in done.stderr
        if not starting or time.monotonic() > deadline:
            return done
        time.sleep(1)


def test_the_study_runs_as_a_ray_job_on_a_cluster_that_is_there(study, data, space, tmp_path):
    dashboard, port = free_port(), free_port()
    (tmp_path / "package").mkdir()
    with tempfile.TemporaryDirectory(prefix="vgid", dir="/tmp") as short:
        secured = environment(
            RAY_TMPDIR=short, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_urlsafe(32)
        )
        head = subprocess.Popen(
            [
                *("ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                *(f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={short}"),
            ],
            cwd=ROOT,
            env=secured,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            output = tmp_path / "job"
            flags = arguments(data, space, output, 2)
            done = submit(dashboard, secured, flags)
            assert_asks_for_its_token(dashboard)
            token = secured["RAY_AUTH_TOKEN"]
            assert 200 in statuses(dashboard, Authorization=f"Bearer {token}")
            lacking = {k: v for k, v in secured.items() if not k.startswith("RAY_AUTH")}
            without = submit(dashboard, lacking | {"HOME": short}, flags)
            assert without.returncode != 0
            assert "no authentication token was found" in without.stdout + without.stderr
            assert_says_that_a_token_is_wanted(port, tmp_path / "stranger")
            package = f"--working-dir={tmp_path / 'package'}"
            relative = submit(dashboard, secured, arguments(data, space, "runs/job", 2), package)
            assert relative.returncode != 0
            assert "runs/job lies in this Ray job's temporary package" in relative.stdout
            assert "Traceback" not in relative.stdout
        finally:
            cluster = psutil.Process(head.pid).children(recursive=True)
            for process in [head, *cluster]:
                process.kill()
            head.wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "mlflow ui" in done.stdout
    assert "succeeded" in done.stdout
    assert metrics_of_first_trial(output) == metrics_of_first_trial(study[0])
