"""The deployment file: what is written is read, any changed byte is found."""

import json
import random

import jsonschema
import pytest
import yaml

from vgid.config import TrialConfig
from vgid.deployment.record import (
    SCHEMA,
    Adapter,
    Base,
    Data,
    Deployment,
    Frame,
    Origin,
    Scores,
    json_schema,
    read_deployment,
    write_deployment,
)
from vgid.errors import InputError
from vgid.results import Score

SCORE = {"forget_rougeL": Score(value=0.1, n=30, low=0.0, high=0.2)}


@pytest.fixture
def deployment():
    return Deployment(
        backbone="tiny-llava",
        created="2030-01-01T00:00:00+00:00",
        requests=("R-1",),
        subjects=("0001", "0002"),
        base=Base(hub_id=None, model_path=None, revision="0" * 64, precision="float32"),
        adapter=Adapter(
            path="tiny-llava/adapter",
            files={"adapter_config.json": "a" * 64, "adapter_model.safetensors": "b" * 64},
            rank=8,
            scale=2.0,
            targets=".*proj",
        ),
        frame=Frame(image="<image>{text}", text="{text}", separator=" "),
        hyperparameters=TrialConfig(noise_type="gaussian", sigma=0.8),
        scores=Scores(part="held_out", seeds=(1, 2, 3), base=SCORE, deployed=SCORE, attacks=()),
        data=Data(sha256="c" * 64, forget_ratio=5, retain_people=50, split_seed=0),
        origin=Origin(
            study_id="s",
            trial_id="0001",
            rule="knee",
            git_commit=None,
            git_dirty=False,
            versions={},
        ),
    )


@pytest.fixture
def file(deployment, tmp_path):
    write_deployment(tmp_path / "tiny-llava.yaml", deployment)
    return tmp_path / "tiny-llava.yaml"


def test_what_is_written_is_read(deployment, file):
    assert read_deployment(file)[0] == deployment


def test_ids_are_text_whichever_yaml_reads_them(file):
    assert "- '0001'\n" in file.read_text()


def test_any_changed_byte_is_found(file):
    content = file.read_bytes()
    draw = random.Random(0)
    places = [*range(len(content) - 80, len(content)), *draw.sample(range(len(content)), 300)]
    for place in places:
        other = draw.choice([b for b in range(256) if b != content[place]])
        file.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
        with pytest.raises(InputError):
            read_deployment(file)
    for damaged in (content[:-1], content + b"\n", b"", content[10:]):
        file.write_bytes(damaged)
        with pytest.raises(InputError):
            read_deployment(file)


def test_the_shipped_schema_is_current_and_accepts_the_file(file):
    assert SCHEMA.read_text() == json_schema()
    content = yaml.safe_load(file.read_text())
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"names": ["x"]}, json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("path", ["/etc", "../up", "a/../../b", ""])
def test_an_adapter_outside_the_deployment_is_refused(deployment, path):
    with pytest.raises(ValueError, match="below the deployment file"):
        Adapter(**deployment.adapter.model_dump() | {"path": path})


@pytest.mark.parametrize("subject", ["Fay Moss", "../x", "", "a/b", "x" * 65])
def test_a_subject_is_a_pseudonym(deployment, subject):
    with pytest.raises(ValueError, match="subjects"):
        Deployment(**deployment.model_dump() | {"subjects": (subject,)})
