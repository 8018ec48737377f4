"""A study that starts from a deployment: what it asks for, and what its pick ships."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from studies.pareto_search import read_flags
from vgid.config import StudyConfig
from vgid.data.benchmark import Benchmark
from vgid.deployment.pick import PickConfig, pick_deployment
from vgid.deployment.record import read_deployment, read_shipped
from vgid.errors import InputError
from vgid.models.adapter_files import read_adapter
from vgid.models.backbones import EMBEDDED, revision_of
from vgid.provenance import provenance
from vgid.report.records import TrialRecord, write_front
from vgid.results import TrialResult
from vgid.study.plan import Plan, make_plan


def planned(config: StudyConfig) -> Plan:
    assert config.from_deployment is not None
    return make_plan(*read_shipped(config.from_deployment).followed_by(config))


@pytest.fixture
def config(deployment_file: Path, benchmark_folder: Path, tmp_path: Path) -> StudyConfig:
    """As the command line makes it and the plan pins it."""
    flags = ["--from-deployment", str(deployment_file), "--data", str(benchmark_folder)]
    flags += ["--retain-people", "4", "--output", str(tmp_path / "next")]
    return planned(read_flags(flags)[0]).config


@pytest.fixture
def study(config: StudyConfig, deployment_file: Path) -> Path:
    """What such a study leaves, its one trial being the parent's adapter once more."""
    folder = config.output
    parent, _ = read_deployment(deployment_file)
    shutil.copytree(deployment_file.parent / "tiny-llava" / "adapter", folder / "adapters" / "0000")
    metrics = {"forget_rougeL_reduction": 0.9, "retain_rougeL": 0.9}
    result = TrialResult(trial_id="0000", status="completed", metrics=metrics)
    write_front(folder / "front.csv", [TrialRecord(parent.hyperparameters, result, on_front=True)])
    assert config.data is not None
    summary = {
        "study_id": "a-study",
        "config": config.model_dump(mode="json"),
        "data_sha256": Benchmark.open(config.data).sha256,
        "base_sha256": revision_of(EMBEDDED / "tiny-llava"),
        **provenance(),
    }
    (folder / "study.json").write_text(json.dumps(summary))
    return folder


def test_every_trial_is_asked_to_start_from_the_deployment(config, deployment_file):
    parent, sha256 = read_deployment(deployment_file)
    assert config.from_deployment_sha256 == sha256
    request = planned(config).request
    assert request.earlier_ids == parent.subjects
    assert request.deployed_adapter == deployment_file.parent / "tiny-llava" / "adapter"
    with pytest.raises(InputError, match="--backbone: the deployment is of tiny-llava"):
        planned(config.model_copy(update={"backbone": "tiny-qwen2.5-vl"}))


def test_a_pick_ships_both_requests_in_one_adapter(study, deployment_file):
    parent, sha256 = read_deployment(deployment_file)
    pick = PickConfig(
        study=(str(study),),
        rule="max-forget",
        min_forget=None,  # the parent's adapter once more has nothing against the new people
        request_id=("R-2",),
        champion=False,
    )
    (picked,) = pick_deployment(pick).backbones
    record = picked.deployment
    assert record.parent is not None
    assert record.parent.sha256 == sha256 and record.parent.subjects == parent.subjects
    assert record.parent.requests == ("R-1",) and record.requests == ("R-2",)
    assert len(record.subjects) == 1 and not set(record.subjects) & set(parent.subjects)
    assert record.base == parent.base
    known = record.scores.base["earlier_rougeL"]
    assert record.scores.deployed["earlier_rougeL"].value < known.value
    reverse = next(a for a in record.scores.attacks if a.name.startswith("reverse prompt"))
    assert "earlier_rougeL" in reverse.scores
    warning = read_shipped(deployment_file).warning(record.scores.deployed)
    assert picked.report.warning == warning and warning in [None, *picked.report.sentences]
    shipped = read_adapter(picked.file.parent / "tiny-llava" / "adapter")
    before = read_adapter(deployment_file.parent / "tiny-llava" / "adapter")
    assert shipped.rank == record.adapter.rank == 16
    for module, (a_rI, b_Or) in before.modules.items():
        a_sI, b_Os = shipped.modules[module]
        twice = 2 * before.scale * b_Or @ a_rI
        torch.testing.assert_close(shipped.scale * b_Os @ a_sI, twice, atol=1e-6, rtol=1e-5)


def test_another_parent_than_the_studys_is_refused(study, config, deployment_file, tmp_path):
    def edit(**values) -> None:
        summary = json.loads((study / "study.json").read_text())
        summary["config"] |= values
        (study / "study.json").write_text(json.dumps(summary))

    edit(from_deployment_sha256="0" * 64)
    with pytest.raises(InputError, match="is not what the study started from any more"):
        pick_deployment(PickConfig(study=(str(study),), champion=False))
    edit(from_deployment_sha256=config.from_deployment_sha256)
    with pytest.raises(InputError, match="would be replaced"):
        output = deployment_file.parent.parent
        pick_deployment(PickConfig(study=(str(study),), output=output, champion=False))
    edit(from_deployment=str(tmp_path / "gone.yaml"))
    with pytest.raises(InputError, match=r"gone\.yaml: cannot be read"):
        pick_deployment(PickConfig(study=(str(study),), champion=False))
    assert not (study / "deployments").exists()
