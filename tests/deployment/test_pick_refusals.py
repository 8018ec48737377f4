"""Picks that are refused: bad flags, damaged studies, bounds that no trial keeps."""

import pickle
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.deployment.conftest import pick


def copied(study_folder, tmp_path):
    """The study without what a bad input never comes to read."""
    folder = tmp_path / "study"
    shutil.copytree(study_folder, folder, ignore=shutil.ignore_patterns("store", "ml*"))
    return folder


def refused(capsys, *flags):
    """The sentence with which a pick is refused."""
    assert pick(*flags) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    sentence = shown.err.strip().splitlines()[-1]
    assert sentence.endswith(".")
    return sentence


def test_bad_input_is_one_sentence_and_leaves_nothing(
    study_folder, tracking_uri, runs, tmp_path, capsys
):
    output = tmp_path / "out"
    to = ("--output", output)
    study = ("--study", study_folder)
    uri = ("--tracking-uri", tracking_uri)
    run, trial = runs
    (tmp_path / "empty").mkdir()
    cases = [
        ((), "--study"),
        (("--study", tmp_path / "nowhere"), "no study.json"),
        (("--study", tmp_path / "empty"), "no study.json"),
        (("--study", "mlflow:../../etc", *uri), "32 hexadecimal"),
        (("--study", f"mlflow:{'0' * 32}", *uri), "no such run"),
        (("--study", f"mlflow:{trial}", *uri), f"name its study, mlflow:{run}"),
        (("--study", f"mlflow:{run}", "--tracking-uri", f"sqlite:///{tmp_path}/no.db"), "no.db"),
        ((*study, "--request-id", "../../etc/passwd"), "request_id"),
        ((*study, "--request-id", "two words"), "request_id"),
        ((*study, "--seeds", "2"), "seeds"),
        ((*study, "--max-cloze", "1.5"), "max_cloze"),
        ((*study, "--max-retain-drop", "nan"), "max_retain_drop"),
        ((*study, "--min-forget", "1.5"), "min_forget"),
        ((*study, "--min-forget", "nan"), "min_forget"),
        ((*study, "--rule", "best"), "--rule"),
        ((*study, *study), "two studies are of tiny-llava"),
        ((*study, "--data", tmp_path / "nowhere"), "name it with --data"),
    ]
    for flags, part in cases:
        assert part in refused(capsys, *flags, *to), flags
    assert not output.exists()
    assert not (tmp_path / "no.db").exists()
    (tmp_path / "file").touch()
    assert "is a file" in refused(capsys, *study, "--output", tmp_path / "file")


def test_without_mlflows_address_a_run_cannot_be_found(runs, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "--tracking-uri" in refused(capsys, "--study", f"mlflow:{runs[0]}")


def test_when_no_trial_keeps_the_bounds_the_nearest_is_named(study_folder, tmp_path, capsys):
    flags = ("--study", study_folder, "--output", tmp_path / "out")
    bounds = ("--max-retain-drop", "0", "--max-reverse-rise", "0", "--max-cloze", "0")
    sentence = refused(capsys, *flags, *bounds)
    assert re.search(r"the nearest, trial \d{4}(x1\.2)?, has .* \(\d\.\d{3} too much\)", sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["max-forget", "knee", "constraint"])
def test_a_front_that_forgets_less_than_the_floor_is_refused_by_every_rule(
    study_folder, tmp_path, capsys, rule
):
    wide = ("--max-retain-drop", "1", "--max-reverse-rise", "1")
    flags = ("--study", study_folder, "--output", tmp_path / "out", "--rule", rule, *wide)
    sentence = refused(capsys, *flags, "--min-forget", "1")
    assert re.search(r"share forgotten 0\.\d{3}, by its interval perhaps 0\.\d{3}", sentence)
    assert not (tmp_path / "out").exists()


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, change):
    def do(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return do


def in_adapters(change):
    def do(folder):
        for adapter in sorted((folder / "adapters").iterdir()):
            change(adapter)

    return do


def pickle_weights(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(pickle.dumps(dict(load_file(path))))


def lead_out(adapter):
    moved = adapter.parent.parent.parent / f"moved-{adapter.name}"
    adapter.rename(moved)
    adapter.symlink_to(moved)


def add_vision(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    vision = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    rank = next(t.shape[0] for name, t in tensors.items() if "lora_A" in name)
    tensors[f"{vision}.lora_A.weight"] = np.zeros((rank, 128), np.float32)
    tensors[f"{vision}.lora_B.weight"] = np.zeros((128, rank), np.float32)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (remove("study.json"), "study.json"),
        (edit("study.json", lambda text: text[:100]), "study.json"),
        (edit("study.json", lambda text: "{}"), "finish it with --resume"),
        (edit("study.json", lambda t: t.replace('"seed": 3', '"seed": "x"')), "seed"),
        (
            edit("study.json", lambda t: re.sub(r'"data_sha256": "\w+"', '"data_sha256": ""', t)),
            "is not the benchmark",
        ),
        (remove("front.csv"), "front.csv"),
        (edit("front.csv", lambda text: text.splitlines()[0] + "\n"), "no trial to pick"),
        (edit("front.csv", lambda text: re.sub(r"(?m)^\d{4}", "../x", text)), "trial_id"),
        (edit("front.csv", lambda text: text.replace("strict", "loud")), "prompt_style"),
        (in_adapters(shutil.rmtree), "is missing"),
        (in_adapters(lambda a: (a / "adapter_model.safetensors").unlink()), "safetensors"),
        (in_adapters(lambda a: (a / "adapter_model.bin").write_bytes(b"pickle")), "bin"),
        (in_adapters(pickle_weights), "safetensors"),
        (in_adapters(lead_out), "is a symbolic link out of the folder"),
        (in_adapters(add_vision), "vision_tower"),
        (
            in_adapters(
                edit("adapter_config.json", lambda text: re.sub(r'"r": \d+', '"r": 3', text))
            ),
            "rank",
        ),
    ],
)
def test_a_damaged_study_is_refused_before_anything_is_scored(
    study_folder, tmp_path, capsys, damage, part
):
    folder = copied(study_folder, tmp_path)
    damage(folder)
    assert part in refused(capsys, "--study", folder)
    assert not (folder / "deployments").exists()
    assert not (folder / "store").exists()
