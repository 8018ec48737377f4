"""Picks end to end: a real study, real scores, what is written."""

import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from mlflow import MlflowClient
from safetensors.numpy import load_file

from tests.deployment.conftest import ROOT, contents, pick, run, run_script
from vgid.config import RequestConfig, StudyConfig
from vgid.data.benchmark import Benchmark
from vgid.deployment.record import NOT_RUN, SCHEMA, hash_files, read_deployment
from vgid.errors import InputError
from vgid.study.plan import make_plan
from vgid.trial import TrialSession

WIDE = ("--max-retain-drop", "1", "--max-reverse-rise", "1")
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def rows_of(folder):
    with (folder / "candidates.csv").open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def picked(study_folder, tmp_path_factory):
    """One pick by the script in a process of its own: output folder, and what it said."""
    output = tmp_path_factory.mktemp("picked") / "out"
    done = run_script(
        "pick_deployment.py",
        *("--study", str(study_folder), "--output", str(output), *WIDE, "--no-champion"),
        *("--request-id", "R-17", "--request-id", "R-18"),
    )
    assert done.returncode == 0, done.stderr
    return output, done


@pytest.fixture(scope="module")
def record(picked):
    return read_deployment(picked[0] / "deployments" / "tiny-llava.yaml")[0]


@pytest.fixture(scope="module")
def summary(study_folder):
    return json.loads((study_folder / "study.json").read_text())


def test_the_folder_holds_what_was_promised_and_nothing_else(picked):
    found = set(contents(picked[0] / "deployments")) - {".lock"}
    beside = {"pick.html", "pick.png", "candidates.csv", *(f"adapter/{name}" for name in FILES)}
    assert found == {"tiny-llava.yaml", *(f"tiny-llava/{name}" for name in beside)}
    assert {path.name for path in picked[0].iterdir()} == {"deployments"}


def test_the_record_fits_the_shipped_schema(picked):
    content = yaml.safe_load((picked[0] / "deployments" / "tiny-llava.yaml").read_text())
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))


def test_the_record_tells_of_study_data_and_people(record, summary, study_folder, benchmark_folder):
    assert record.origin.study_id == summary["study_id"]
    assert record.origin.trial_id in summary["front"]
    assert record.origin.git_commit == summary["git_commit"]
    assert record.origin.versions == summary["versions"]
    assert record.data.sha256 == summary["data_sha256"]
    assert record.data.split_seed == summary["seed"] == 3
    assert record.base.revision == summary["base_sha256"]
    assert (record.base.hub_id, record.base.precision) == (None, "float32")
    forgotten = Benchmark.open(benchmark_folder).person_ids("forget_5")
    assert record.subjects == tuple(sorted(forgotten))
    assert record.requests == ("R-17", "R-18")
    # What forgets most is a trial's adapter at more than its own scale.
    trial_id, _, scale = record.origin.trial_id.partition("x")
    assert scale == "1.2"
    trial = json.loads((study_folder / "trials" / f"{trial_id}.json").read_text())
    config = trial["config"] | {"adapter_scale": 1.2}
    assert record.hyperparameters.model_dump(mode="json") == config


def test_the_adapter_is_the_trials(record, picked, study_folder):
    folder = picked[0] / "deployments" / "tiny-llava" / "adapter"
    assert hash_files(folder) == record.adapter.files
    source = study_folder / "adapters" / record.origin.trial_id
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (source / weights).read_bytes()
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (source, folder))
    assert after["base_model_name_or_path"] is None  # no path of this machine
    assert after["r"] == before["r"] == record.adapter.rank
    assert after["lora_alpha"] / after["r"] == record.adapter.scale
    assert all("language_model" in name for name in load_file(folder / weights))


@pytest.fixture(scope="module")
def scored_anew(record, benchmark_folder, study_folder, tmp_path_factory):
    """The adapter on the recorded seeds, from an empty store: plainly and under the prompt."""
    request = RequestConfig(
        data=benchmark_folder,
        store=tmp_path_factory.mktemp("store"),
        seed=record.data.split_seed,
        retain_people=record.data.retain_people,
    )
    session = TrialSession(request)
    adapter = study_folder / "adapters" / record.origin.trial_id
    seeds, part = record.scores.seeds, record.scores.part
    asked = {False: session.rescore, True: session.rescore_attacked}
    return {reverse: [ask(adapter, part, seed) for seed in seeds] for reverse, ask in asked.items()}


def pooled(scores, name):
    found = [by_name[name] for by_name in scores]
    return (
        statistics.fmean(score.value for score in found),
        min(score.low for score in found),
        max(score.high for score in found),
        found[0].n,
    )


def test_scores_are_means_over_the_seeds_with_the_envelope_of_the_intervals(record, scored_anew):
    assert record.scores.part == "held_out"
    assert len(set(record.scores.seeds)) == 3
    attacks = {attack.name: attack.scores for attack in record.scores.attacks}
    tables = [
        (record.scores.deployed, scored_anew[False]),
        (attacks["reverse prompt (paper A.3.7)"], scored_anew[True]),
    ]
    for stated, anew in tables:
        assert {"forget_rougeL_reduction", "forget_rougeL_rise"} & stated.keys()
        for name, score in stated.items():
            found = (score.value, score.low, score.high, score.n)
            assert found == pytest.approx(pooled(anew, name), abs=1e-6)
    assert record.scores.deployed.keys() == scored_anew[False][0].keys()


def test_attacks_are_those_that_were_run_and_those_that_were_not_are_named(record):
    attacks = {attack.name: set(attack.scores) for attack in record.scores.attacks}
    assert list(attacks) == [
        "reverse prompt (paper A.3.7)",
        "new portraits and wording (test set)",
        "questions as they stand, without answer instructions",
        "text-only questions",
        "answer forced (memorisation)",
    ]
    portraits = attacks["new portraits and wording (test set)"]
    assert "test_rougeL" in portraits and not any(name.endswith("_raw") for name in portraits)
    raw = attacks["questions as they stand, without answer instructions"]
    assert {"forget_rougeL_raw", "test_rougeL_raw", "forget_refusal_raw"} <= raw
    assert "retain_refusal_raw" in record.scores.deployed
    assert "forget_rougeL_text" in attacks["text-only questions"]
    assert "forget_memorisation" in attacks["answer forced (memorisation)"]
    # General utility, on held-out questions and under no attack.
    for scores in (record.scores.base, record.scores.deployed):
        assert scores["celebrity_rougeL"].n > 4 * record.data.retain_people
    assert not any("celebrity" in name for names in attacks.values() for name in names)
    assert record.scores.not_run == NOT_RUN


def test_the_choice_forgets_most_of_all_candidates(record, picked, summary):
    rows = rows_of(picked[0] / "deployments" / "tiny-llava")
    assert set(rows) == {"base", *summary["front"]}
    forget = {name: float(row["forget_rougeL"]) for name, row in rows.items() if name != "base"}
    assert forget[record.origin.trial_id] == min(forget.values())
    assert [name for name, row in rows.items() if row["chosen"] == "true"] == [
        record.origin.trial_id
    ]
    bounds = "share forgotten ≥ 0.5, retain drop ≤ 1, reverse rise ≤ 1"
    assert f"constraint, {bounds}" in record.origin.rule
    # The front's other end, which learned next to nothing, is no candidate.
    assert {row["within_bounds"] for row in rows.values()} == {"", "true", "false"}
    for name, row in rows.items():
        if name != "base":
            drop = float(rows["base"]["retain_rougeL"]) - float(row["retain_rougeL"])
            assert float(row["retain_drop"]) == pytest.approx(drop)
            rise = float(row["reverse_forget_rougeL"]) - float(row["forget_rougeL"])
            assert float(row["reverse_rise"]) == pytest.approx(rise)


def test_people_are_told_what_was_chosen_and_how_far_to_trust_it(picked, record, summary):
    text = re.sub(r"\s+", " ", picked[1].stdout)
    assert f"trial {record.origin.trial_id}" in text
    assert "means over 3 seeds" in text
    assert record.scores.verdict("forget", "test") in text
    assert "Suppressed is not erased" in text
    for trial_id in summary["front"]:
        assert trial_id in text
    if len(summary["front"]) > 1:
        assert f"best of {len(summary['front'])} on the very questions" in text
    assert f"n = {record.scores.deployed['forget_rougeL'].n}" in text
    assert "Warning" not in picked[1].stderr


def test_the_page_shows_every_candidates_setting_under_the_mouse(picked, summary):
    page = (picked[0] / "deployments" / "tiny-llava" / "pick.html").read_text()
    payload = re.search(r'<script id="payload" type="application/json">(.*?)</script>', page, re.S)
    traces = json.loads(payload[1])["pictures"]["pick"]["data"]
    hovers = " ".join(text for trace in traces for text in trace["hovertext"])
    for trial_id in summary["front"]:
        assert f"<b>trial {trial_id}</b>" in hovers
    assert "lr 4e-3" in hovers and "lr 2e-4" in hovers
    assert "http://" not in page.split('<script id="library"')[0]


def test_no_name_question_or_answer_is_in_any_output(picked, benchmark_folder):
    benchmark = Benchmark.open(benchmark_folder)
    people = [*benchmark.full(), *benchmark.test()]
    texts = {q.text for person in people for q in person.questions}
    texts |= {q.answer for person in people for q in person.questions}
    texts |= {option for p in people for q in p.questions for option in (q.options or {}).values()}
    private = {text for text in texts if len(text) >= 8}
    assert len(private) > 500
    output, done = picked
    files = {
        name: c for name, c in contents(output).items() if not name.endswith(("png", "tensors"))
    }
    said = {name: content.decode() for name, content in files.items()}
    for name, content in {**said, "stdout": done.stdout, "stderr": done.stderr}.items():
        assert not [text for text in private if text in content], name


def test_another_pick_replaces_the_first_and_a_failed_one_changes_nothing(
    study_folder, picked, tmp_path, capsys
):
    output = tmp_path / "out"
    shutil.copytree(picked[0], output)
    deployments = output / "deployments"
    (deployments / ".999999.new").mkdir()  # of a killed pick
    (deployments / "tiny-llava" / "old").touch()
    before = contents(deployments)
    assert pick("--study", study_folder, "--output", output, "--max-retain-drop", "0",
                "--max-cloze", "0", "--max-reverse-rise", "0") == 2  # fmt: skip
    assert contents(deployments) == before
    assert pick("--study", study_folder, "--output", output, "--rule", "knee", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["deployments"][0]["rule"] == "knee, share forgotten ≥ 0.5"
    now, sha256 = read_deployment(deployments / "tiny-llava.yaml")
    assert now.requests == ()
    assert sha256 == said["deployments"][0]["sha256"]
    assert hash_files(now.adapter_folder(deployments / "tiny-llava.yaml")) == now.adapter.files
    assert not (deployments / "tiny-llava" / "old").exists()
    assert {p.name for p in deployments.iterdir()} == {"tiny-llava", "tiny-llava.yaml", ".lock"}


def test_mlflow_alone_is_enough_when_the_folder_is_gone(
    study_folder, tracking_uri, runs, record, tmp_path
):
    output = tmp_path / "out"
    # Scores are found by the adapter's bytes, so those of the study's own adapters fit.
    scores = shutil.ignore_patterns("vision", "teachers", "*.lock")
    shutil.copytree(study_folder / "store", output / "store", ignore=scores)
    hidden = study_folder.with_name("gone")
    study_folder.rename(hidden)
    try:
        flags = ("--study", f"mlflow:{runs[0]}", "--tracking-uri", tracking_uri, *WIDE)
        assert pick(*flags) == 2  # no folder, so nowhere to write
        assert pick(*flags, "--output", output) == 0
    finally:
        hidden.rename(study_folder)
    found = read_deployment(output / "deployments" / "tiny-llava.yaml")[0]
    assert found.origin == record.origin
    assert found.adapter == record.adapter
    assert found.hyperparameters == record.hyperparameters
    assert found.scores == record.scores


def test_a_next_study_starts_from_the_folder_or_from_mlflow_alike(
    study_folder, tracking_uri, runs, tmp_path
):
    space = yaml.safe_load((study_folder.parent / "space.yaml").read_text())
    space["methods"]["vgid"]["first_points"] = []
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))

    def prior(name):
        asked = {"output": tmp_path / "next", "search_space": tmp_path / "space.yaml"}
        config = StudyConfig(warm_start=name, tracking_uri=tracking_uri, forget_ratio=10, **asked)
        return make_plan(config).prior

    found = prior(str(study_folder))
    assert found == prior(f"mlflow:{runs[0]}")
    assert found.study_id == json.loads((study_folder / "study.json").read_text())["study_id"]
    assert found.points and found.rate_factor == 1
    with pytest.raises(InputError, match=f"--warm-start mlflow:.*name its study, mlflow:{runs[0]}"):
        prior(f"mlflow:{runs[1]}")


def test_the_pick_is_the_champion_of_its_backbone_afterwards(study_folder, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    flags = ["--study", str(study_folder), "--output", str(tmp_path / "out"), *WIDE]
    assert run("pick", *flags, "--tracking-uri", uri) == 0
    client = MlflowClient(uri, registry_uri=uri)
    version = client.get_model_version_by_alias("vgid-tiny-llava", "champion")
    deployment = read_deployment(tmp_path / "out" / "deployments" / "tiny-llava.yaml")
    assert version.tags["vgid.deployment_sha256"] == deployment[1]


def test_the_console_command_has_the_same_flags_and_code(tmp_path):
    def vgid(*flags):
        command = [str(Path(sys.executable).parent / "vgid"), "pick", *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    script = run_script("pick_deployment.py", "--help").stdout
    flags = set(re.findall(r"--[a-z-]+", script))
    assert {"--study", "--rule", "--max-cloze", "--json"} <= flags
    assert set(re.findall(r"--[a-z-]+", vgid("--help").stdout)) == flags
    done = vgid("--study", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
