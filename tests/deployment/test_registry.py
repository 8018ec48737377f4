"""MLflow's registry: versions and aliases in a real store, and a model loaded back from it."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.deployment.made_up_deployment import BASE_FOLDER, deploy
from vgid.deployment.record import read_deployment
from vgid.deployment.registry import DeployedModel, register, rollback
from vgid.errors import InputError
from vgid.models.backbones import LLAVA_FRAME, load, spec
from vgid.prompts import generation_text
from vgid.study.mlflow_client import connect

NAME = "vgid-tiny-llava"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForImageTextToText.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=spec("tiny-llava").lora_targets)
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A store in which the deployed trial has its run."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    connection = connect(uri, folder, "tiny-llava")
    tags = {"vgid.study_id": "study-one", "vgid.trial_id": "0003"}
    connection.client.create_run(connection.experiment_id, tags=tags)
    return uri


def aliases(uri: str) -> dict[str, int]:
    held = MlflowClient(uri, uri).get_registered_model(NAME).aliases
    return {alias: int(version) for alias, version in held.items()}


@pytest.fixture(scope="module")
def versions(store, adapter, tmp_path_factory) -> list[int]:
    """Two picks, registered one after the other, the first of them twice."""
    files = [deploy(tmp_path_factory.mktemp("pick"), adapter, trial) for trial in ("0003", "0004")]
    first = register(files[0], store)
    assert aliases(store) == {"champion": first}
    assert register(files[0], store) == first
    assert aliases(store) == {"champion": first}
    return [first, register(files[1], store)]


def test_a_pick_becomes_champion_and_the_one_before_is_kept(store, versions):
    assert versions == [1, 2]
    assert aliases(store) == {"champion": 2, "previous": 1}
    client = MlflowClient(store, store)
    version = client.get_model_version(NAME, "1")
    assert version.tags["vgid.study_id"] == "study-one"
    assert version.tags["vgid.trial_id"] == "0003"
    assert version.tags["vgid.requests"] == "request-17 request-18"
    assert len(version.tags["vgid.deployment_sha256"]) == 64
    run = client.get_run(version.run_id)
    assert run.data.tags["vgid.trial_id"] == "0003"
    elsewhere = client.get_run(client.get_model_version(NAME, "2").run_id)
    assert elsewhere.data.tags["vgid.kind"] == "deployment"  # trial 0004 has no run here
    assert (
        "ROUGE-L is gone, by the intervals' unfavourable ends: forget_rougeL."
        in version.description
    )
    assert "not erased" in version.description
    assert "celebrity_rougeL" in version.description


def test_rolling_back_swaps_the_two_and_back_again(store, versions):
    command = [sys.executable, "-m", "vgid.cli", "rollback", "--backbone", "tiny-llava"]
    command += ["--tracking-uri", store, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"backbone": "tiny-llava", "champion": 1, "previous": 2}
    assert aliases(store) == {"champion": 1, "previous": 2}
    assert rollback("tiny-llava", store) == (2, 1)
    assert aliases(store) == {"champion": 2, "previous": 1}


def test_the_champion_answers_as_plain_transformers_and_peft_do(store, versions, adapter):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image, png = Image.fromarray(pixels), io.BytesIO()
    image.save(png, "PNG")
    questions = ["What is the name of the person?", "Where does this person live?"]
    frame = pd.DataFrame({"image": [png.getvalue()] * 2, "question": questions})
    mlflow.set_tracking_uri(store)
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@champion", model_config={"device": "cpu"})
    answers = loaded.predict(frame)

    base = AutoModelForImageTextToText.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, adapter).eval()
    processor = AutoProcessor.from_pretrained(BASE_FOLDER)
    row = spec("tiny-llava")
    expected = []
    for question in questions:
        text = row.frame.image.format(text=generation_text(question, "image"))
        inputs = processor(images=image, text=text, return_tensors="pt")
        tokens = plain.generate(**inputs, max_new_tokens=50, do_sample=False)
        reply = tokens[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(reply, skip_special_tokens=True).strip())
    assert answers == expected
    assert all(answers)


def test_open_questions_are_asked_in_the_turn_that_was_measured(adapter, tmp_path):
    asked = replace(LLAVA_FRAME, asked={"generation/image": "USER: <image>\nQ: {text}\nA:"})
    backbone = load("tiny-llava", device="cpu")
    backbone.spec = replace(backbone.spec, frame=asked)
    deployment, _ = read_deployment(deploy(tmp_path, adapter))
    image, png = Image.linear_gradient("L").resize((64, 64)).convert("RGB"), io.BytesIO()
    image.save(png, "PNG")
    question = "What is the name of the person?"
    frame = pd.DataFrame({"image": [png.getvalue()], "question": [question]})
    (answer,) = DeployedModel(deployment, backbone, None).predict(frame)
    text = f"USER: <image>\nQ: {generation_text(question, 'image')}\nA:"
    inputs = backbone.processor(images=image, text=text, return_tensors="pt")
    tokens = backbone.model.generate(**inputs, max_new_tokens=50, do_sample=False)
    reply = tokens[0, inputs["input_ids"].shape[1] :]
    expected = backbone.processor.tokenizer.decode(reply, skip_special_tokens=True).strip()
    assert answer == expected
    backbone.spec = replace(backbone.spec, frame=LLAVA_FRAME)
    assert DeployedModel(deployment, backbone, None).predict(frame) != [answer]


def test_nothing_in_the_registry_is_pickle_or_code(store, versions, tmp_path):
    local = mlflow.artifacts.download_artifacts(
        f"models:/{NAME}/2", dst_path=str(tmp_path), tracking_uri=store
    )
    suffixes = {path.suffix for path in Path(local).rglob("*") if path.is_file()}
    assert suffixes <= {"", ".json", ".safetensors", ".yaml", ".txt"}


def test_what_changed_is_not_registered(store, adapter, tmp_path):
    file = deploy(tmp_path, adapter)
    weights = tmp_path / "deployments/tiny-llava/adapter/adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(InputError, match="is not the adapter of"):
        register(file, store)


def test_another_base_is_not_served(adapter, tmp_path):
    from vgid.deployment.registry import load_deployed

    file = deploy(tmp_path, adapter, revision="0" * 64)
    with pytest.raises(InputError, match="and the deployment's base at 000000000000"):
        load_deployed(file)


def test_without_a_previous_champion_there_is_no_way_back(store, tmp_path):
    with pytest.raises(InputError, match="no previous champion to go back to"):
        rollback("llava-1.5-7b", store)
    with pytest.raises(InputError, match="no database is there"):
        rollback("tiny-llava", f"sqlite:///{tmp_path / 'other.db'}")
    assert not (tmp_path / "other.db").exists()
    with pytest.raises(InputError, match="unknown name"):
        rollback("no-such", store)
