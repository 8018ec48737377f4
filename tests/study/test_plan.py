"""What is refused before anything is started or written."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vgid.config import StudyConfig
from vgid.errors import InputError
from vgid.study.plan import make_plan
from vgid.study.search_space import FOLDER


def rmu_study(tmp_path: Path, layer: object) -> StudyConfig:
    """A study of RMU whose search space, otherwise the shipped one, asks for ``layer``."""
    shipped = yaml.safe_load((FOLDER / "tiny-llava.yaml").read_text())
    section = shipped["methods"]["rmu"]
    section["parameters"]["rmu_layer"] = layer
    section["first_points"] = []
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(shipped))
    return StudyConfig(
        backbone="tiny-llava",
        method="rmu",
        search_space=path,
        output=tmp_path / "out",
        trials=1,
    )


@pytest.mark.parametrize("layer", [4, {"choices": [1, 4]}, {"low": 1, "high": 4, "step": 1}])
def test_the_deepest_layer_may_be_asked_for(tmp_path, layer):
    assert make_plan(rmu_study(tmp_path, layer)).space.method == "rmu"


@pytest.mark.parametrize("layer", [5, {"choices": [5, 1]}, {"low": 1, "high": 5, "step": 1}])
def test_a_layer_that_the_backbone_lacks_is_refused(tmp_path, layer):
    config = rmu_study(tmp_path, layer)
    with pytest.raises(
        InputError, match=r"space.yaml: methods.rmu: rmu_layer: tiny-llava has 4 layers, got 5"
    ):
        make_plan(config)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("parameters", "more", "sentence"),
    [
        ({"released": True, "views": 2}, {}, "views: the public script's variant has the original"),
        (
            {"released": True, "views": {"low": 2, "high": 4}, "alpha": {"low": 1, "high": 2}},
            {},
            "views: the public script's variant has the original",
        ),
        ({"released": True}, {"workers_per_trial": 2}, "released: .* leave out --workers-per"),
        (
            {"released": {"choices": [True]}},
            {"workers_per_trial": 2},
            "released: .* leave out --workers-per-trial",
        ),
    ],
)
def test_a_space_without_a_single_valid_trial_is_refused(tmp_path, parameters, more, sentence):
    path = tmp_path / "space.yaml"
    section = {"parameters": parameters, "first_points": []}
    path.write_text(yaml.safe_dump({"backbone": "tiny-llava", "methods": {"vgid": section}}))
    config = StudyConfig(search_space=path, output=tmp_path / "out", **more)
    with pytest.raises(InputError, match=rf"space.yaml: methods.vgid: {sentence}"):
        make_plan(config)
    assert not config.output.exists()


def test_a_space_with_some_valid_trials_is_taken(tmp_path):
    path = tmp_path / "space.yaml"
    parameters = {"released": {"choices": [True, False]}, "views": 2}
    section = {"parameters": parameters, "first_points": []}
    path.write_text(yaml.safe_dump({"backbone": "tiny-llava", "methods": {"vgid": section}}))
    config = StudyConfig(search_space=path, output=tmp_path / "out", workers_per_trial=2)
    assert make_plan(config).space.searched


def test_a_plan_on_an_embedded_backbone_loads_nothing_heavy(tmp_path):
    # Torch alone keeps a study from starting for two seconds.
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vgid.config import StudyConfig\n"
        "from vgid.study.plan import make_plan\n"
        f"make_plan(StudyConfig(output=Path({str(tmp_path)!r}) / 'study'))\n"
        "print(sorted({'torch', 'transformers', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
