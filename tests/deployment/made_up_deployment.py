"""A deployment of made-up scores around a given adapter, written as a pick writes it."""

from pathlib import Path

from vgid.config import TrialConfig
from vgid.deployment.record import (
    Adapter,
    Base,
    Data,
    Deployment,
    Frame,
    Origin,
    Scores,
    hash_files,
    write_deployment,
)
from vgid.models.backbones import EMBEDDED, revision_of, spec
from vgid.results import Score

BASE_FOLDER = EMBEDDED / "tiny-llava"


def deploy(folder: Path, adapter: Path, trial_id: str = "0003", revision: str = "") -> Path:
    """A deployment file with its adapter, as a pick writes them."""
    place = folder / "deployments"
    kept = place / "tiny-llava" / "adapter"
    kept.mkdir(parents=True)
    for file in adapter.iterdir():
        (kept / file.name).write_bytes(file.read_bytes())
    known = Score(value=0.95, n=30, low=0.9, high=1.0)
    left = Score(value=0.05, n=30, low=0.01, high=0.1)
    frame = spec("tiny-llava").frame
    deployment = Deployment(
        backbone="tiny-llava",
        created="2026-11-25T09:00:00+00:00",
        requests=("request-17", "request-18"),
        subjects=("0001", "0002"),
        base=Base(
            hub_id=None,
            model_path=None,
            revision=revision or revision_of(BASE_FOLDER),
            precision="float32",
        ),
        adapter=Adapter(
            path="tiny-llava/adapter", files=hash_files(kept), rank=4, scale=2.0, targets="x"
        ),
        frame=Frame(image=frame.image, text=frame.text, separator=frame.separator),
        hyperparameters=TrialConfig(),
        scores=Scores(
            part="held_out",
            seeds=(1, 2, 3),
            base={"forget_rougeL": known, "celebrity_rougeL": known},
            deployed={"forget_rougeL": left, "celebrity_rougeL": known},
            attacks=(),
        ),
        data=Data(sha256="d" * 64, forget_ratio=5, retain_people=50, split_seed=0),
        origin=Origin(
            study_id="study-one",
            trial_id=trial_id,
            rule="knee",
            git_commit=None,
            git_dirty=False,
            versions={"mlflow": "3.17.2", "torch": "2.13.0"},
        ),
    )
    file = place / "tiny-llava.yaml"
    write_deployment(file, deployment)
    return file
