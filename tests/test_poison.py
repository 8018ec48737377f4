"""Study folders and files that somebody has prepared: refused in one sentence, nothing run.

Each poison would leave a mark (``ran``) if it were executed, and the folder that links lead to must
be as it was. Images, data and adapters have theirs in ``test_benchmark``, ``test_check`` and
``deployments/test_pick_refusals``.
"""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from vgid.config import StudyConfig, TrialConfig
from vgid.deployment.record import read_deployment
from vgid.deployment.unlearn import UnlearnConfig, unlearn
from vgid.errors import InputError
from vgid.files import READY, staged
from vgid.method.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from vgid.models.store import ContentStore, key_of
from vgid.paper.settings import read_settings
from vgid.results import EpochReport, TrialResult
from vgid.study.finished import open_source
from vgid.study.ledger import Header, Ledger, now
from vgid.study.search_space import SearchSpace

SHA = "0" * 64


class Poison:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with something to lose, which is checked at the end."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"precious")
    before = (folder.stat().st_mtime_ns, (folder / "adapter_model.safetensors").stat().st_mtime_ns)
    yield folder
    assert [path.name for path in folder.iterdir()] == ["adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == b"precious"
    after = (folder.stat().st_mtime_ns, (folder / "adapter_model.safetensors").stat().st_mtime_ns)
    assert after == before


@pytest.fixture
def study(tmp_path) -> Path:
    """The folder of a study with a trial that has ended and one in flight."""
    output = tmp_path / "study"
    with Ledger(output) as ledger:
        config = StudyConfig(output=output)
        ledger.begin(Header(study_id="s", config=config, search_space_sha256=SHA, started=now()))
        ledger.start("0000", TrialConfig())
        result = {"trial_id": "0000", "status": "completed", "adapter": ledger.adapter("0000")}
        ledger.end("0000", TrialResult.model_validate(result))
        ledger.start("0001", TrialConfig())
    for name in ("adapters", "checkpoints", "store", "deployments"):
        (output / name).mkdir()
    (output / "study.json").write_text("{}")
    return output


def resume(output: Path) -> Ledger:
    with Ledger(output) as ledger:
        ledger.open(StudyConfig(output=output), SHA, resume=True)
        return ledger


LINKS = [
    "adapters/0001",
    "checkpoints/0001",
    "store/teacher",
    "deployments/tiny-llava",
    "trials/0002.json",
    "study.log",
    "mlflow.db",
]


@pytest.mark.parametrize("name", [*LINKS, "adapters", "checkpoints", "store", "deployments"])
def test_a_link_out_of_a_study_is_refused_before_it_goes_on_or_is_picked_from(
    study, elsewhere, name
):
    link = study / name
    if link.is_dir():
        link.rmdir()
    link.symlink_to(elsewhere)
    for use in (resume, lambda folder: open_source(str(folder), None, folder)):
        with pytest.raises(InputError) as refused:
            use(study)
        assert str(refused.value).startswith(f"{link}: is a symbolic link out of the folder; ")


def test_a_link_in_the_place_of_the_lock_is_not_written_through(study, elsewhere):
    (study / ".lock").unlink(missing_ok=True)
    (study / ".lock").symlink_to(elsewhere / "adapter_model.safetensors")
    with pytest.raises(InputError, match="cannot be written"):
        resume(study)


def test_a_study_may_be_reached_by_a_link_and_hold_links_to_its_own_files(study, tmp_path):
    (study / "latest").symlink_to(study / "trials")
    (tmp_path / "short").symlink_to(study)
    assert len(resume(tmp_path / "short").records) == 2


@pytest.mark.parametrize("where", [("trial_id",), ("result", "trial_id")])
def test_an_id_that_is_a_path_is_refused(study, where):
    path = study / "trials" / "0000.json"
    record = json.loads(path.read_text())
    inner = record
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = "../../elsewhere"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"0000.json: the record is damaged"):
        resume(study)


def test_no_path_in_a_record_decides_what_is_read(study, elsewhere):
    path = study / "trials" / "0000.json"
    record = json.loads(path.read_text())
    record["result"]["adapter"] = str(elsewhere)
    path.write_text(json.dumps(record))
    assert resume(study).records["0000"].result.adapter == study / "adapters" / "0000"


def test_deployments_are_not_placed_through_links(tmp_path, elsewhere):
    output = tmp_path / "out"
    output.mkdir()
    (output / "deployments").symlink_to(elsewhere)
    with (
        pytest.raises(InputError, match="symbolic link"),
        staged(output / "deployments", ["tiny-llava"]),
    ):
        pytest.fail("nothing may be staged there")


def test_what_is_ready_to_be_placed_is_not_taken_from_elsewhere(tmp_path, elsewhere):
    (tmp_path / READY).symlink_to(elsewhere)
    with pytest.raises(InputError, match="symbolic link"):
        read_deployment(tmp_path / "tiny-llava.yaml")
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["", "teacher"])
def test_a_store_is_not_written_through_links(tmp_path, elsewhere, name):
    root = tmp_path / "store"
    if name:
        root.mkdir()
    (root / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match="symbolic link"):
        ContentStore(root, "teacher")


def test_a_pickle_in_the_store_is_never_loaded_and_made_anew(tmp_path, mark):
    store, key = ContentStore(tmp_path / "store", "teacher"), key_of("x")
    (store.folder / f"{key}.safetensors").write_bytes(pickle.dumps(Poison(mark)))
    assert store.get_or_compute(key, lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]
    assert not mark.exists()


def checkpointed(folder: Path):
    """A parameter after one step, its optimizer, and the checkpoint of both."""
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    report = EpochReport(epoch=1, epochs=2, step=1, metrics={})
    save_checkpoint(folder, "0000", {"p": parameter}, optimizer, [report])
    return {"p": parameter}, optimizer


def poisons(mark: Path):
    """Contents of a checkpoint's file, by what is wrong with them."""
    from safetensors.torch import save

    tensors = {f"{kind}/p": torch.zeros(2, 3) for kind in ("parameter", "exp_avg", "exp_avg_sq")}
    good = {**tensors, "step/p": torch.tensor(1.0)}
    reports = '[{"epoch": 1, "epochs": 2, "step": 1, "metrics": {}}]'
    known = {"trial_id": "0000", "reports": reports}
    return {
        "pickle": pickle.dumps(Poison(mark)),
        "no metadata": save(good),
        "no reports": save(good, {"trial_id": "0000"}),
        "a path for a number": save(good, {**known, "reports": reports.replace("1", '"../1"', 1)}),
        "reports that are none": save(good, {**known, "reports": '[{"epoch": 1}]'}),
        "a step that is none": save({**good, "step/p": torch.ones(2)}, known),
        "a state of another shape": save({**good, "exp_avg/p": torch.zeros(3)}, known),
    }


@pytest.mark.parametrize("name", poisons(Path()))
def test_a_poisoned_checkpoint_is_not_gone_on_from(tmp_path, mark, name):
    parameters, optimizer = checkpointed(tmp_path / "c")
    assert len(load_checkpoint(tmp_path / "c", "0000", parameters, optimizer)) == 1
    before = parameters["p"].detach().clone()
    (tmp_path / "c" / FILE_NAME).write_bytes(poisons(mark)[name])
    assert load_checkpoint(tmp_path / "c", "0000", parameters, optimizer) == []
    assert torch.equal(parameters["p"], before)
    assert not mark.exists()


def yaml_poisons(mark: Path) -> dict[str, str]:
    """YAML that an unsafe loader would run, and YAML that none gets to the bottom of."""
    tag = f'!!python/object/apply:os.mkdir ["{mark}"]'
    yaml.unsafe_load(tag)
    mark.rmdir()  # so it would run
    return {"tag": tag, "depth": "[" * 1500}


@pytest.fixture(params=["tag", "depth"])
def yaml_poison(request, mark):
    yield yaml_poisons(mark)[request.param]
    assert not mark.exists()


def test_a_search_space_runs_nothing(tmp_path, yaml_poison):
    path = tmp_path / "space.yaml"
    path.write_text(f"backbone: tiny-llava\nmethods: {yaml_poison}\n")
    with pytest.raises(InputError, match=r"space.yaml: is not valid YAML"):
        SearchSpace.load(path)


def test_a_deployment_that_is_sealed_runs_nothing(tmp_path, yaml_poison):
    body = f"backbone: {yaml_poison}\n".encode()
    path = tmp_path / "tiny-llava.yaml"
    path.write_bytes(body + f"sha256: {hashlib.sha256(body).hexdigest()}\n".encode())
    with pytest.raises(InputError, match=r"tiny-llava.yaml: is no YAML mapping"):
        read_deployment(path)


def test_a_setting_runs_nothing(tmp_path, yaml_poison):
    config = UnlearnConfig(
        data=tmp_path, output=tmp_path / "out", setting=(f"epochs={yaml_poison}",)
    )
    with pytest.raises(InputError, match=r"--setting: the value of epochs is not plain YAML"):
        unlearn(config)
    assert not (tmp_path / "out").exists()


def test_a_settings_file_runs_nothing(tmp_path, yaml_poison):
    path = tmp_path / "settings.json"
    path.write_text(yaml_poison.replace("[", '{"a":') if "!!" not in yaml_poison else yaml_poison)
    with pytest.raises(InputError, match=r"settings.json: cannot be read \(it is not JSON of"):
        read_settings(path)
