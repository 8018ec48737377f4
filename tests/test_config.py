from typing import get_args

import pytest
from pydantic import ValidationError

from vgid.config import USED_BY, Method, RequestConfig, StudyConfig, TrialConfig, parse, uses
from vgid.errors import InputError


def refused(values: dict, model=TrialConfig) -> str:
    with pytest.raises(InputError) as caught:
        parse(model, values, "space.yaml")
    message = str(caught.value)
    assert message.startswith("space.yaml: ")
    assert message.count("\n") == 0
    assert message.endswith(".")
    return message


def test_defaults_are_the_paper_s_setting():
    trial = TrialConfig()
    assert (trial.alpha, trial.beta) == (1.0, 1.0)
    assert (trial.noise_type, trial.prompt_style, trial.sigma) == ("random", "strict", None)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"beta": -1}, "beta"),
        ({"noise_type": "salt"}, "noise_type"),
        ({"noise_type": "gaussian"}, "sigma"),
        ({"noise_type": "gaussian", "sigma": 0}, "sigma"),
        ({"noise_type": "gaussian", "sigma": 9.0}, "sigma"),
        ({"noise_type": "white", "sigma": 0.5}, "sigma"),
        ({"prompt_style": "rude"}, "prompt_style"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"alpha": float("inf")}, "alpha"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"views": 0}, "views"),
        ({"released": True, "views": 2}, "views"),
        ({"method": "magic"}, "method"),
        ({"method": "rmu", "rmu_layer": 0}, "rmu_layer"),
        ({"method": "rmu", "rmu_steering": 0}, "rmu_steering"),
        ({"method": "npo", "preference_beta": 0}, "preference_beta"),
        ({"train_tasks": []}, "train_tasks"),
        ({"train_tasks": ["poetry"]}, "train_tasks"),
        ({"alhpa": 1.0}, "alhpa"),
    ],
)
def test_bad_trial_is_one_sentence_that_names_the_field(values, field):
    assert field in refused(values)


@pytest.mark.parametrize("method", get_args(Method))
def test_a_field_that_the_method_does_not_use_keeps_its_default(method):
    others = {
        "beta": 2.0,
        "retain_batch_size": 3,
        "noise_type": "white",
        "prompt_style": "polite",
        "response_source": "teacher",
        "released": True,
        "preference_beta": 0.5,
        "rmu_layer": 2,
        "rmu_steering": 2.0,
    }
    assert others.keys() | {"sigma"} == USED_BY.keys()
    for name, value in others.items():
        given = {"method": method, name: value}
        if uses(method, name):
            assert getattr(parse(TrialConfig, given, "a"), name) == value
        else:
            message = refused(given)
            assert name in message
            assert f"method '{method}' does not use it; leave it out" in message
            default = TrialConfig.model_fields[name].default
            assert parse(TrialConfig, {**given, name: default}, "a").method == method
    assert "sigma" in refused({"method": method, "sigma": 0.5})


def test_methods_without_a_retain_term():
    without = {method for method in get_args(Method) if not uses(method, "beta")}
    assert without == {"ga", "po_idk", "po_dpo", "npo"}
    assert all(uses(method, "learning_rate") for method in get_args(Method))


def test_unknown_key_lists_the_known_ones():
    assert "alpha" in refused({"alhpa": 1.0})


@pytest.mark.parametrize("field", ["trials", "workers_per_trial", "max_concurrent"])
def test_a_study_of_nothing_is_refused(tmp_path, field):
    assert field in refused({"output": tmp_path, field: 0}, StudyConfig)


def test_forget_ratio_is_one_of_the_benchmark_s(tmp_path):
    message = refused({"output": tmp_path, "forget_ratio": 7}, StudyConfig)
    assert "5, 10 or 15" in message


def test_configs_are_frozen(tmp_path):
    request = RequestConfig(data=tmp_path, store=tmp_path)
    with pytest.raises(ValidationError):
        request.seed = 3  # type: ignore[misc]


def test_configs_travel_as_json():
    trial = TrialConfig(noise_type="gaussian", sigma=0.3, beta=0.1)
    assert TrialConfig.model_validate_json(trial.model_dump_json()) == trial
