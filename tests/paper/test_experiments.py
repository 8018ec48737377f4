"""Experiments run once: shared adapters, content keys, failures, and going on after a kill."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from tests.small_benchmark import write_small
from vgid.config import TrialConfig
from vgid.data.synthetic import write_benchmark
from vgid.errors import InputError
from vgid.models.backbones import load
from vgid.paper.experiments import Arm, Bench, Cache, Experiment, run_experiments
from vgid.paper.settings import (
    default_trials,
    prepare_data,
    read_settings,
    write_settings,
)
from vgid.trial import TrialSession

TRIAL = TrialConfig(epochs=1, lora_rank=2, train_tasks=("cloze",), learning_rate=2e-3)
QUIET = Console(quiet=True)


def experiment(arm: Arm, seed: int = 0, forget_ratio: int = 5) -> Experiment:
    return Experiment(backbone="tiny-llava", forget_ratio=forget_ratio, seed=seed, arm=arm)


BASE = experiment(Arm())
TRAINED = experiment(Arm(trial=TRIAL))
REVERSED = experiment(Arm(trial=TRIAL, reverse=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "benchmark"
    write_small(root)
    return root


@pytest.fixture(scope="module")
def bench(tmp_path_factory, data) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    return Bench(folder=folder, data=data, retain_people=2, bootstrap_samples=100)


@pytest.fixture(scope="module")
def outcomes(bench):
    return run_experiments([REVERSED, BASE, TRAINED, BASE], bench, 1, QUIET)


def test_outcomes_are_those_of_a_trial_session(outcomes, bench, tmp_path):
    assert list(outcomes) == [REVERSED, BASE, TRAINED]
    request = bench.request("tiny-llava", 5, 0)
    session = TrialSession(request.model_copy(update={"store": tmp_path / "store"}))
    session.run(TRIAL, "again", tmp_path / "again")
    assert outcomes[BASE].scores == session.scores_under("held_out", 1)
    trained = session.scores_under("held_out", 1, adapter_dir=tmp_path / "again")
    assert outcomes[TRAINED].scores == trained
    reverse = session.scores_under("held_out", 1, reverse=True, adapter_dir=tmp_path / "again")
    assert outcomes[REVERSED].scores == reverse
    assert outcomes[BASE].provenance == session.provenance
    assert all(outcome.error is None and outcome.seconds > 0 for outcome in outcomes.values())


def test_rows_that_differ_after_training_share_the_adapter(outcomes, bench):
    assert len(list((bench.folder / "adapters").iterdir())) == 1
    cache = Cache(bench, ["tiny-llava"])
    assert cache.adapter(TRAINED) == cache.adapter(REVERSED)
    assert cache.path(TRAINED) != cache.path(REVERSED)


def test_search_questions_which_no_table_shows_are_not_asked(outcomes, bench):
    kept = sorted(path.name.split("-")[0] for path in (bench.folder / "store").glob("*-*.json"))
    assert kept == ["adapter", "adapter", "base"]  # one a row, all on held-out questions


def test_one_process_computes_with_one_thread_as_several_do(bench, tmp_path, monkeypatch):
    threads: list[int] = []

    class Watched(TrialSession):
        def scores_under(self, *args, **how):
            threads.append(torch.get_num_threads())
            return super().scores_under(*args, **how)

    monkeypatch.setattr("vgid.trial.TrialSession", Watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_experiments([BASE], bench.model_copy(update={"folder": tmp_path}), 1, QUIET)
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_is_known_is_not_run_again(outcomes, bench):
    aside = bench.folder.with_name("aside")
    for name in ("adapters", "store"):
        shutil.move(bench.folder / name, aside / name)
    before = {p: p.stat().st_mtime_ns for p in (bench.folder / "outcomes").iterdir()}
    again = run_experiments([BASE, TRAINED, REVERSED], bench, 2, QUIET)
    assert again == outcomes
    assert {p: p.stat().st_mtime_ns for p in (bench.folder / "outcomes").iterdir()} == before
    assert sorted(p.name for p in bench.folder.iterdir()) == ["outcomes"]
    for name in ("adapters", "store"):
        shutil.move(aside / name, bench.folder / name)


def test_the_key_is_the_content_and_not_the_place(bench, data, tmp_path):
    cache = Cache(bench, ["tiny-llava"])
    keys = {
        cache.path(experiment(arm, seed, ratio)).name
        for arm in (Arm(), Arm(style="strict"), Arm(reverse=True), Arm(trial=TRIAL))
        for seed in (0, 1)
        for ratio in (5, 10)
    }
    assert len(keys) == 16
    shutil.copytree(data, tmp_path / "copy")
    elsewhere = bench.model_copy(update={"folder": tmp_path, "data": tmp_path / "copy"})
    assert Cache(elsewhere, ["tiny-llava"]).path(BASE).name == cache.path(BASE).name
    more = bench.model_copy(update={"retain_people": 3})
    assert Cache(more, ["tiny-llava"]).path(BASE).name != cache.path(BASE).name
    write_benchmark(tmp_path / "other", seed=1)
    other = bench.model_copy(update={"data": tmp_path / "other"})
    assert Cache(other, ["tiny-llava"]).path(BASE).name != cache.path(BASE).name


def test_a_training_that_fails_is_an_outcome_too(bench):
    wild = TRIAL.model_copy(update={"learning_rate": 1e20, "epochs": 30})
    failing = experiment(Arm(trial=wild))
    found = run_experiments([failing, BASE], bench, 1, QUIET)
    assert "not finite" in (found[failing].error or "") and not found[failing].scores
    assert found[BASE].scores


def test_first_tokens_show_the_interventions(bench):
    arms = {
        "base": Arm(probe="first_tokens"),
        "dual": Arm(style="strict", noise_type="random", probe="first_tokens"),
    }
    found = run_experiments([experiment(arm) for arm in arms.values()], bench, 1, QUIET)
    base, dual = (found[experiment(arm)].scores for arm in arms.values())
    assert base["sensitive_probability"].value > 0.5 > dual["sensitive_probability"].value
    assert base["safe_probability"].value < 0.1 < dual["safe_probability"].value
    for scores in (base, dual):
        total = scores["sensitive_probability"].value + scores["safe_probability"].value
        assert 0 < total <= 1
        assert scores["safe_logit"].n == scores["sensitive_logit"].n == 12


def test_torn_outcomes_and_adapters_are_made_again(outcomes, bench, tmp_path):
    moved = bench.model_copy(update={"folder": tmp_path})
    cache = Cache(moved, ["tiny-llava"])
    path = cache.path(BASE)
    path.parent.mkdir()
    for text in ("", "[]", json.dumps({"seconds": 1})):
        path.write_text(text)
        assert cache.get(BASE) is None
    shutil.copytree(bench.folder / "store", tmp_path / "store")
    shutil.copytree(bench.folder / "adapters", tmp_path / "adapters")
    weights = cache.adapter(TRAINED) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    found = run_experiments([BASE, TRAINED], moved, 1, QUIET)
    assert {e: o.scores for e, o in found.items()} == {e: outcomes[e].scores for e in found}
    assert weights.read_bytes() == whole
    assert cache.get(BASE) == found[BASE]


def test_the_key_names_all_of_the_backbone(bench, monkeypatch):
    cache = Cache(bench, ["tiny-llava"])
    assert cache.backbones == {"tiny-llava": load("tiny-llava").identity}
    before = cache.path(BASE).name
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Cache(bench, ["tiny-llava"]).path(BASE).name != before, "a GPU computes in bf16"


def test_bad_input_of_an_experiment_reaches_the_caller(bench, tmp_path):
    many = bench.model_copy(update={"retain_people": 99, "folder": tmp_path})
    with pytest.raises(InputError, match="lower retain_people"):
        run_experiments([BASE], many, 2, QUIET)
    missing = bench.model_copy(update={"data": tmp_path / "nowhere"})
    with pytest.raises(InputError, match="no such benchmark folder"):
        run_experiments([BASE], missing, 1, QUIET)


KILLED = """
import sys
from pathlib import Path
from tests.paper.test_experiments import BASE, REVERSED, TRAINED, experiment, Arm
from vgid.paper.experiments import Bench, run_experiments
folder, data = map(Path, sys.argv[1:])
bench = Bench(folder=folder, data=data, retain_people=2, bootstrap_samples=100)
more = [experiment(Arm(style=style)) for style in ("declarative", "polite", "strict")]
run_experiments([BASE, TRAINED, REVERSED, *more], bench, 2)
"""


def test_a_killed_run_goes_on(outcomes, bench, tmp_path):
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(bench.data)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not list(folder.glob("outcomes/*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert gone and not alive
    before = {p: p.stat().st_mtime_ns for p in folder.glob("outcomes/*.json")}
    assert 1 <= len(before) < 6
    moved = bench.model_copy(update={"folder": folder})
    found = run_experiments([BASE, TRAINED, REVERSED], moved, 1, QUIET)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {e: o.scores for e, o in found.items()} == {
        e: outcomes[e].scores for e in (BASE, TRAINED, REVERSED)
    }


def test_settings_travel_from_a_comparison_to_the_tables(tmp_path):
    trials = {
        "vgid": TrialConfig(beta=3.0, noise_type="gaussian", sigma=0.8),
        "npo": TrialConfig(method="npo", preference_beta=0.3),
    }
    write_settings(tmp_path / "settings.json", "tiny-llava", trials)
    assert read_settings(tmp_path / "settings.json") == ("tiny-llava", trials)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "backbone: "),
        ("7", "not JSON of backbone and methods"),
        ('{"methods": {}}', "backbone"),
        ('{"backbone": "tiny-llava", "methods": {"duet": {}}}', "duet"),
        ('{"backbone": "tiny-llava", "methods": {"ga": {"beta": 2}}}', "does not use it"),
        ('{"backbone": "tiny-llava", "methods": {"ga": {"learning_rate": 2}}}', "learning_rate"),
    ],
)
def test_a_settings_file_that_is_wrong_is_named(tmp_path, text, match):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError, match=match):
        read_settings(tmp_path / "settings.json")


def test_defaults_are_the_first_points_of_the_sections():
    found = default_trials("tiny-llava", ["vgid", "ga", "rmu"])
    assert [trial.method for trial in found.values()] == ["vgid", "ga", "rmu"]
    assert (found["vgid"].noise_type, found["vgid"].prompt_style) == ("random", "strict")
    with pytest.raises(InputError, match=r"no-such\.yaml: cannot be read"):
        default_trials("no-such", ["vgid"])


def test_data_is_needed_for_a_real_backbone(tmp_path):
    with pytest.raises(InputError, match="--data"):
        prepare_data(["llava-1.5-7b"], None, tmp_path)
    assert prepare_data(["llava-1.5-7b"], tmp_path / "own", tmp_path) == tmp_path / "own"
