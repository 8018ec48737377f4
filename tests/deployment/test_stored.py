"""What an earlier version wrote is read: a study, a deployment and a registered model.

``stored`` was made by commit d7e2de7, before modules moved into rooms, and is reduced: of a study
of 24 trials the tables of three, and of the adapters on its front two configs; a deployment and the
model that was logged for it, with one rank of the first adapter, and made-up scores.
"""

import io
from pathlib import Path

import mlflow
import pandas as pd
from PIL import Image

from vgid.config import TrialConfig
from vgid.deployment.audit import report
from vgid.deployment.record import read_shipped
from vgid.models.adapter_files import read_adapter
from vgid.study.finished import open_source, read_study

STORED = Path(__file__).parent / "stored"

HELD_OUT = {
    "forget_rougeL": 0.009523809523809525,
    "retain_rougeL": 0.9257941176470589,
    "test_rougeL": 0.09000000000000001,
    "forget_cloze": 0.0,
    "celebrity_rougeL": 0.9179903906006849,
}


def test_a_stored_study_is_read_to_pick_from_and_to_compare(tmp_path):
    source = open_source(str(STORED / "study"), None, tmp_path)
    assert source.config.backbone == "tiny-llava" and source.origin["git_commit"][:7] == "d7e2de7"
    assert source.trials[0].config == TrialConfig(
        beta=3.0,
        learning_rate=0.003,
        response_source="mixed",
        train_tasks=("generation", "cloze", "classification"),
        train_wording="both",
        views=8,
        lora_rank=16,
        epochs=5,
        retain_batch_size=24,
        seed=1,
    )
    found = read_study(STORED / "study")
    assert (found.config.method, found.config.seed) == ("vgid", 1)
    assert [trial.trial_id for trial in found.trials] == ["0000", "0001", "0002"]
    assert found.front == list(source.trials) == list(found.trials[1:])
    assert found.front[0].point == (0.9191907874260815, 0.9454960194604157)
    assert found.front[0].held_out == HELD_OUT
    gone = found.base["held_out"]["forget_rougeL"].value - HELD_OUT["forget_rougeL"]
    assert found.held_out_points[0] == (gone, HELD_OUT["retain_rougeL"])


def test_a_stored_deployment_is_read_with_its_adapter():
    shipped = read_shipped(STORED / "deployments" / "tiny-llava.yaml")
    adapter, recorded = read_adapter(shipped.adapter), shipped.deployment.adapter
    assert (adapter.rank, adapter.scale, adapter.targets) == (1, recorded.scale, recorded.targets)
    (found,) = report("0001", [STORED / "deployments"]).suppressions
    assert found.sha256 == shipped.sha256 and found.requests == ("request-17", "request-18")


def test_a_stored_model_is_loaded_by_the_name_that_it_stores():
    assert "loader_module: vgid.serving\n" in (STORED / "model" / "MLmodel").read_text()
    model = mlflow.pyfunc.load_model(str(STORED / "model"), model_config={"device": "cpu"})
    png = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(png, "PNG")
    question = {"image": [png.getvalue()], "question": ["Where does this person live?"]}
    (answer,) = model.predict(pd.DataFrame(question))
    assert isinstance(answer, str) and answer
