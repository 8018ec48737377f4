"""Search-space files: what they mean, and one sentence for each thing wrong with them."""

import copy
import json
import warnings
from typing import get_args

import optuna
import pytest
import yaml

from vgid.config import Method, TrialConfig, is_paper_default
from vgid.errors import InputError
from vgid.study.search_space import FOLDER, SearchSpace

SHIPPED = sorted(FOLDER.glob("*.yaml"))

BASE = {
    "backbone": "tiny-llava",
    "shared": {"lora_rank": 8},
    "methods": {
        "vgid": {
            "parameters": {
                "alpha": {"low": 0.3, "high": 3.0, "log": True},
                "beta": {"low": 0.3, "high": 10.0, "log": True},
                "noise_type": {"choices": ["random", "gaussian", "white"]},
                "sigma": {"low": 0.2, "high": 1.0},
                "prompt_style": {"choices": ["declarative", "polite", "strict"]},
            },
        },
        "rmu": {"parameters": {"rmu_layer": {"low": 1, "high": 3}}},
    },
}


def write(tmp_path, **parameters):
    """The base file with some parameters changed (None removes one)."""
    content = copy.deepcopy(BASE)
    section = content["methods"]["vgid"]["parameters"]
    for name, value in parameters.items():
        if value is None:
            del section[name]
        else:
            section[name] = value
    return dump(tmp_path, content)


def dump(tmp_path, content):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def sampled(space, trials=60, seed=3):
    """Points proposed by a seeded random Optuna study, with what Optuna recorded."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=["maximize", "maximize"], sampler=optuna.samplers.RandomSampler(seed=seed)
    )
    points = []
    for _ in range(trials):
        trial = study.ask()
        points.append(space.suggest(trial))
        study.tell(trial, [0.0, 0.0])
    return points, study


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_has_a_section_for_every_method(path, method):
    space = SearchSpace.load(path, path.stem, method)
    assert space.method == method
    trials = [space.trial_config(point, seed=1) for point in space.first_points]
    assert len(trials) >= 2
    assert all(trial.method == method for trial in trials)
    # The paper's Table 7 is for real backbones; the embedded ones need larger steps.
    if method in ("vgid", "icu_t", "noise_t") or not path.stem.startswith("tiny"):
        assert [is_paper_default(trial) for trial in trials[:2]] == [True, False]
    points, _ = sampled(space, trials=5)
    for point in points:
        space.trial_config(point, seed=0)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spaces_load_and_start_with_the_papers_default(path):
    space = SearchSpace.load(path, backbone=path.stem)
    trials = [space.trial_config(point, seed=1) for point in space.first_points]
    assert len(trials) == 4
    assert [is_paper_default(trial) for trial in trials] == [True, False, False, False]
    noise_types = {"random", "gaussian", "white"} if "noise_type" in space.searched else {"random"}
    assert {trial.noise_type for trial in trials} == noise_types


def test_the_embedded_space_is_the_one_that_was_agreed():
    space = SearchSpace.load(FOLDER / "tiny-llava.yaml")
    assert list(space.searched) == [
        "alpha",
        "beta",
        "noise_type",
        "sigma",
        "prompt_style",
        "learning_rate",
    ]
    assert set(space.fixed) == {
        "response_source",
        "lora_rank",
        "epochs",
        "views",
        "train_tasks",
        "retain_batch_size",
    }


def test_proposals_lie_in_the_space_and_sigma_comes_with_gaussian_noise_only(tmp_path):
    space = SearchSpace.load(write(tmp_path, epochs={"low": 2, "high": 8, "step": 3}))
    points, _ = sampled(space)
    assert {point["noise_type"] for point in points} == {"random", "gaussian", "white"}
    for point in points:
        assert ("sigma" in point) == (point["noise_type"] == "gaussian")
        assert 0.3 <= point["alpha"] <= 3.0
        assert 0.3 <= point["beta"] <= 10.0
        assert point["epochs"] in (2, 5, 8)
        trial = space.trial_config(point, seed=5)
        assert (trial.seed, trial.lora_rank) == (5, 8)
        assert trial.sigma == point.get("sigma")


def test_distributions_are_those_that_optuna_recorded(tmp_path):
    space = SearchSpace.load(write(tmp_path, epochs={"low": 2, "high": 8}))
    points, study = sampled(space)
    for point, trial in zip(points, study.trials, strict=True):
        assert space.distributions(point) == trial.distributions


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_first_points_are_proposed_unchanged_when_enqueued(path):
    space = SearchSpace.load(path, path.stem)
    study = optuna.create_study(directions=["maximize", "maximize"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for point in space.first_points:
            study.enqueue_trial({k: v for k, v in point.items() if k in space.searched})
        assert [space.suggest(study.ask()) for _ in range(4)] == list(space.first_points)


def test_a_fixed_sigma_is_used_for_gaussian_noise_only(tmp_path):
    space = SearchSpace.load(write(tmp_path, sigma=0.5))
    points, _ = sampled(space)
    assert {(p["noise_type"], p.get("sigma")) for p in points} == {
        ("random", None),
        ("gaussian", 0.5),
        ("white", None),
    }


def test_a_list_is_one_fixed_value(tmp_path):
    space = SearchSpace.load(write(tmp_path, train_tasks=["cloze"]))
    assert space.trial_config(space.first_points[0], seed=0).train_tasks == ("cloze",)


def test_without_first_points_the_papers_default_comes_first(tmp_path):
    space = SearchSpace.load(write(tmp_path, lora_rank={"low": 10, "high": 16, "step": 2}))
    (point,) = space.first_points
    assert is_paper_default(space.trial_config(point, seed=0))
    assert point["lora_rank"] == 10  # the default, 8, moved into the range


def test_a_space_without_the_papers_default_has_no_first_point(tmp_path):
    space = SearchSpace.load(write(tmp_path, alpha=2.0))
    assert space.first_points == ()


def test_numbers_without_a_decimal_point_are_numbers(tmp_path):
    # YAML 1.1 reads 1e-4 as text.
    path = tmp_path / "space.yaml"
    path.write_text(
        "backbone: tiny-llava\n"
        "methods: {vgid: {parameters: {learning_rate: {low: 1e-4, high: 1e-3, log: true}}}}\n"
    )
    assert SearchSpace.load(path).searched["learning_rate"].low == 1e-4


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"noise_type": {"choices": ["random", "grey"]}}, ["noise_type", "'gaussian'", "'grey'"]),
        ({"noise_type": "grey"}, ["noise_type", "'grey'"]),
        ({"sigma": {"low": 0.0, "high": 1.0}}, ["sigma", "greater than 0"]),
        ({"sigma": {"low": 0.2, "high": 9.0}}, ["sigma", "less than or equal to 2", "9"]),
        ({"sigma": 2.5}, ["sigma", "2.5"]),
        ({"sigma": None}, ["sigma", "add for example"]),
        ({"alpha": -1.0}, ["alpha", "-1"]),
        ({"alpha": {"low": -1.0, "high": 1.0}}, ["alpha", "-1"]),
        ({"beta": {"low": -0.5, "high": 1.0}}, ["beta", "-0.5"]),
        ({"alpha": {"low": 3.0, "high": 0.3}}, ["alpha", "empty", "swap"]),
        ({"alpha": {"low": 0.0, "high": 1.0, "log": True}}, ["alpha", "above 0", "leave out"]),
        ({"alpha": {"low": 0.5, "high": 2, "log": True, "step": 0.5}}, ["alpha", "exclude"]),
        ({"alpha": {"low": 0.5, "high": 2, "step": 0.4}}, ["alpha", "do not reach"]),
        ({"alpha": {"low": 0.5, "high": 2, "step": 0}}, ["alpha", "step", "greater than 0"]),
        ({"alpha": {"low": 0.5, "high": 2, "step": 1e-300}}, ["alpha", "step", "leave it out"]),
        ({"alpha": {3: 0.5}}, ["alpha", "low"]),
        ({"alpha": {"low": 0.5}}, ["alpha", "high", "required"]),
        ({"alpha": {"low": 0.5, "hgih": 2}}, ["alpha", "high"]),
        ({"alpha": {"low": 0.5, "high": 2, "q": 2}}, ["alpha", "q", "unknown key"]),
        ({"alpha": {"low": 0.5, "high": float("nan")}}, ["alpha", "finite"]),
        ({"alpha": "high"}, ["alpha", "number"]),
        ({"alpha": [1.0, 2.0]}, ["alpha", "number"]),
        ({"alpha": {"choices": []}}, ["alpha", "choices"]),
        ({"alpha": {"choices": [1.0, 1]}}, ["alpha", "twice"]),
        ({"lora_rank": {"low": 4.5, "high": 8}}, ["lora_rank", "4.5"]),
        ({"lora_rank": {"low": 4, "high": 8, "step": 0.5}}, ["lora_rank", "whole"]),
        ({"lora_rank": 0}, ["lora_rank", "0"]),
        ({"noise_type": {"low": 0, "high": 1}}, ["noise_type", "choices"]),
        ({"released": {"low": 0, "high": 1}}, ["released", "choices"]),
        ({"train_tasks": {"choices": [["cloze"], ["generation"]]}}, ["train_tasks", "fixed"]),
        ({"train_tasks": ["singing"]}, ["train_tasks", "singing"]),
        ({"gamma": 1.0}, ["gamma", "no such parameter", "alpha, batch_size"]),
        ({"seed": 3}, ["seed", "no such parameter"]),
        ({"method": "vgid"}, ["method", "no such parameter"]),
        ({"rmu_layer": 2}, ["rmu_layer", "'vgid' has no such parameter"]),
    ],
)
def test_bad_parameters_get_one_sentence(tmp_path, parameters, said):
    path = write(tmp_path, **parameters)
    with pytest.raises(InputError) as caught:
        SearchSpace.load(path)
    check_sentence(str(caught.value), [str(path), *said])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backbone": "llava-9000"}, ["backbone", "llava-9000"]),
        ({"methods": {"magic": {}}}, ["methods", "magic"]),
        ({"methods": {}}, ["methods"]),
        ({"methods": {"rmu": {"parameters": {}}}}, ["methods", "no section 'vgid'", "rmu"]),
        ({"method": "vgid"}, ["method", "unknown key", "methods"]),
        ({"parameters": {"alpha": 1.0}}, ["parameters", "unknown key", "methods"]),
        ({"first_points": []}, ["first_points", "unknown key", "methods"]),
        ({"shared": {"rmu_layer": 2}}, ["shared", "rmu_layer", "'vgid' has no such parameter"]),
        ({"shared": {"lora_rank": 0}}, ["shared", "lora_rank", "0"]),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, change, said):
    path = dump(tmp_path, {**copy.deepcopy(BASE), **change})
    with pytest.raises(InputError) as caught:
        SearchSpace.load(path)
    check_sentence(str(caught.value), [str(path), *said])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parametres": {}}, ["parametres", "unknown key"]),
        ({"parameters": [1]}, ["parameters", "dictionary"]),
        ({"first_points": [{"alpha": 9.0}]}, ["first_points, number 1", "alpha", "outside"]),
        ({"first_points": [{}, {"lora_rank": 4}]}, ["number 2", "lora_rank", "outside"]),
        ({"first_points": [{"gamma": 4}]}, ["number 1", "gamma", "no such parameter"]),
        ({"first_points": [{"alpha": -4}]}, ["number 1", "alpha", "-4"]),
        ({"first_points": [{"noise_type": "white", "sigma": 0.5}]}, ["number 1", "sigma"]),
        ({"first_points": [{"rmu_steering": 5.0}]}, ["number 1", "rmu_steering", "'vgid'"]),
        ({"first_points": {"alpha": 1}}, ["first_points", "list"]),
    ],
)
def test_bad_sections_get_one_sentence(tmp_path, change, said):
    content = copy.deepcopy(BASE)
    content["methods"]["vgid"] |= change
    path = dump(tmp_path, content)
    with pytest.raises(InputError) as caught:
        SearchSpace.load(path)
    check_sentence(str(caught.value), [str(path), "vgid", *said])


def test_a_section_s_own_value_takes_precedence_over_the_shared_one(tmp_path):
    assert SearchSpace.load(write(tmp_path, lora_rank=4)).fixed["lora_rank"] == 4
    rmu = SearchSpace.load(write(tmp_path, lora_rank=4), method="rmu")
    assert rmu.fixed == {"lora_rank": 8}


def test_a_method_s_own_fields_are_proposed_and_others_are_refused(tmp_path):
    content = copy.deepcopy(BASE)
    space = SearchSpace.load(dump(tmp_path, content), method="rmu")
    points, _ = sampled(space, trials=20)
    assert {point["rmu_layer"] for point in points} == {1, 2, 3}
    assert space.first_points == ()  # the paper's Table 7 has other optimiser settings
    for name, value in (("noise_type", "white"), ("sigma", 0.5), ("preference_beta", 0.2)):
        content["methods"]["rmu"]["parameters"] = {name: value}
        with pytest.raises(InputError, match=f"rmu.*{name}: method 'rmu' has no such parameter"):
            SearchSpace.load(dump(tmp_path, content), method="rmu")


def test_baselines_start_with_the_papers_table_7(tmp_path):
    content = copy.deepcopy(BASE)
    fixed = {"learning_rate": 2e-5, "epochs": 1, "batch_size": 4}
    content["methods"]["rmu"]["parameters"] |= fixed
    space = SearchSpace.load(dump(tmp_path, content), method="rmu")
    (point,) = space.first_points
    trial = space.trial_config(point, seed=0)
    assert is_paper_default(trial)
    assert (trial.learning_rate, trial.epochs, trial.batch_size) == (2e-5, 1, 4)


@pytest.mark.parametrize("text", ["alpha: [1, 2", "- a\n- b", "", "12: 3", "a: &x !!python/foo 1"])
def test_unreadable_yaml_gets_one_sentence(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        SearchSpace.load(path)
    check_sentence(str(caught.value), [str(path)])


def test_missing_binary_and_foreign_files_get_one_sentence(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "none.yaml", tmp_path, binary):
        with pytest.raises(InputError) as caught:
            SearchSpace.load(path)
        check_sentence(str(caught.value), [str(path)])
    with pytest.raises(InputError, match="meant for 'tiny-llava' and the study runs"):
        SearchSpace.load(FOLDER / "tiny-llava.yaml", backbone="llava-1.5-7b")


def extending(folder, name="child.yaml", **content):
    path = folder / name
    path.write_text(yaml.safe_dump({"backbone": "tiny-llava", **content}))
    return path


def test_a_file_that_extends_another_replaces_what_it_says_by_key_and_inherits_the_rest(tmp_path):
    content = copy.deepcopy(BASE)
    content["shared"]["epochs"] = 2
    content["methods"]["vgid"]["first_points"] = [{"alpha": 2.0}, {"alpha": 1.5}]
    middle = dump(tmp_path, content)
    own = {"alpha": {"choices": [1.0, 2.0]}, "noise_type": "white", "sigma": None}
    section = {"parameters": own, "first_points": [{"alpha": 1.0}]}
    path = extending(
        tmp_path, extends=middle.name, shared={"lora_rank": 4}, methods={"vgid": section}
    )
    space = SearchSpace.load(path)
    whole = copy.deepcopy(content)
    whole["shared"]["lora_rank"] = 4
    inherited = whole["methods"]["vgid"]["parameters"]
    del inherited["sigma"]
    inherited |= {"alpha": own["alpha"], "noise_type": "white"}
    whole["methods"]["vgid"]["first_points"] = [{"alpha": 1.0}]
    alone = SearchSpace.load(extending(tmp_path, "whole.yaml", **whole))
    assert space.section == alone.section
    assert space.fixed == {"noise_type": "white", "lora_rank": 4, "epochs": 2}
    # A section that is not mentioned, and first points that are not.
    assert SearchSpace.load(path, method="rmu").fixed == {"lora_rank": 4, "epochs": 2}
    less = extending(tmp_path, "less.yaml", extends=middle.name)
    assert len(SearchSpace.load(less).first_points) == 2
    # A chain, and what a study compares when it is resumed.
    (tmp_path / "below").mkdir()
    last = extending(tmp_path / "below", extends="../child.yaml")
    before = SearchSpace.load(last)
    assert before.section == space.section
    middle.write_text(f"# changed\n{middle.read_text()}")
    assert SearchSpace.load(last).sha256 != before.sha256


def test_a_section_that_is_recorded_is_a_file_of_its_own(tmp_path):
    space = SearchSpace.load(FOLDER / "tiny-qwen2.5-vl.yaml", "tiny-qwen2.5-vl")
    section = json.loads(json.dumps(space.section))
    again = SearchSpace.load(
        extending(tmp_path, backbone=space.backbone, methods={"vgid": section}), space.backbone
    )
    assert (again.searched, again.fixed) == (space.searched, space.fixed)
    assert again.first_points == space.first_points


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("none.yaml", ["extends", "there is no file", "none.yaml", "llava-1.5-7b"]),
        ("child.yaml", ["extends", "in turn"]),
        ("circle.yaml", ["circle.yaml", "extends", "in turn"]),
        ("unknown.yaml", ["unknown.yaml", "gamma", "unknown key"]),
        ("bad.yaml", ["bad.yaml: methods.vgid.parameters.alpha", "swap them"]),
        (["tiny-llava"], ["extends", "string"]),
    ],
)
def test_bad_extensions_get_one_sentence(tmp_path, extends, said):
    extending(tmp_path, "circle.yaml", extends="child.yaml")
    extending(tmp_path, "unknown.yaml", gamma=1)
    bad = {"vgid": {"parameters": {"alpha": {"low": 2.0, "high": 1.0}}}}
    extending(tmp_path, "bad.yaml", extends="tiny-llava", methods=bad)
    with pytest.raises(InputError) as caught:
        SearchSpace.load(extending(tmp_path, extends=extends))
    check_sentence(str(caught.value), [str(tmp_path), *said])


def test_an_invalid_point_is_refused(tmp_path):
    space = SearchSpace.load(write(tmp_path))
    with pytest.raises(InputError, match="alpha"):
        space.trial_config({"alpha": -1.0}, seed=0)
    assert isinstance(space.trial_config({"alpha": 1.0}, seed=0), TrialConfig)


def check_sentence(message, parts):
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message.replace("example '", "")
