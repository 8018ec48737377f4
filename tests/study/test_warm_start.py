"""What an earlier study gives a new one: which settings, how carried over, and what is refused."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.pareto_search import main
from tests.study.test_search import run
from vgid.cluster.losses import Losses
from vgid.config import StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.models.backbones import width
from vgid.pareto import hypervolume
from vgid.study.finished import Trial
from vgid.study.ledger import Header, Ledger, recorded
from vgid.study.plan import make_plan
from vgid.study.search import ParetoSearch
from vgid.study.search_space import FOLDER, SearchSpace
from vgid.study.warm_start import SETTINGS, Prior, carried

# Of tiny-llava at 5 %, two trials on its front: noise random and gaussian, learning rate 3e-3.
STORED = Path(__file__).parents[1] / "deployment" / "stored" / "study"
SPACE = """
backbone: tiny-llava
methods:
  vgid:
    parameters:
      alpha: {low: 0.3, high: 3.0, log: true}
      noise_type: {choices: [random, gaussian]}
      sigma: {low: 0.2, high: 1.0, step: 0.2}
      learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
      epochs: {low: 1, high: 4}
      prompt_style: polite
    first_points:
      - {alpha: 1.0, noise_type: random, learning_rate: 2.0e-3, epochs: 3}
      - {alpha: 2.0, noise_type: random, learning_rate: 2.0e-3, epochs: 3}
"""


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    return SearchSpace.load(tmp_path / "space.yaml")


def trial(name, point=(0.5, 0.9), **setting):
    return Trial(name, TrialConfig(**setting), point, Path())


def study(tmp_path, **options):
    return StudyConfig(**{"output": tmp_path / "new", "warm_start": str(STORED)} | options)


def test_numbers_move_to_the_nearest_what_is_fixed_stays_and_a_missing_choice_is_left_out(space):
    gaussian = {"noise_type": "gaussian", "sigma": 1.5}
    front = [
        trial("0003", (0.6, 0.8), alpha=9, learning_rate=3e-4, epochs=9, **gaussian),
        trial("0004", noise_type="white"),
        trial("0004x0.9", noise_type="white", adapter_scale=0.9),  # the same setting once more
        trial("0005", (0.4, 0.95), learning_rate=0.04, epochs=3),
        trial("0006", (0.7, 0.7), learning_rate=0.02, epochs=3),  # what the space starts with
    ]
    points, left_out = carried(front, (0, 0), space, rate_factor=0.1)
    assert left_out == 1
    assert points == (
        {"alpha": 3, "noise_type": "gaussian", "sigma": 1, "learning_rate": 1e-4, "epochs": 4},
        {"alpha": 1, "noise_type": "random", "learning_rate": 4e-3, "epochs": 3},
    )
    assert carried(front[-1:], (0, 0), space, rate_factor=0.1) == ((), 0)
    first, *others = space.first_points
    begun = space.started_from(points).first_points
    assert begun[0] == first and begun[3:] == tuple(others)
    assert {point["prompt_style"] for point in begun} == {"polite"}
    # Kept as JSON they are the same, and what the space has itself comes once.
    again = json.loads(json.dumps([*points, {**others[0], "prompt_style": "polite"}]))
    assert space.started_from(again).first_points == (*begun[:3], *others)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0.01, 1)] * 2), min_size=1, max_size=9, unique=True))
def test_the_choice_is_spread_out_against_every_other_choice(reached):
    space = SearchSpace.load(FOLDER / "tiny-llava.yaml")
    alphas = [0.5 + n / 10 for n in range(len(reached))]
    of = dict(zip(alphas, reached, strict=True))
    front = [trial(f"{n:04d}", of[a], alpha=a) for n, a in enumerate(alphas)]
    chosen = [point["alpha"] for point in carried(front, (0, 0), space)[0]]

    def volume(some):
        return hypervolume([of[alpha] for alpha in some], (0, 0)) if some else 0.0

    count = min(SETTINGS, len(reached))
    best = max(volume(some) for some in combinations(alphas, count))
    assert volume(chosen) >= (1 - 1 / 2.718282) * best
    assert volume(chosen[:1]) == max(map(volume, combinations(alphas, 1)))
    # It ends early only where no other would add anything.
    assert len(chosen) == count or volume(alphas) == pytest.approx(volume(chosen))


def test_what_keeps_less_than_the_reference_is_of_no_use(space):
    assert carried([trial("0000", (0.9, 0.3), alpha=2)], (0, 0.45), space) == ((), 0)


def test_learning_rates_go_by_width_which_the_configurations_alone_tell(tmp_path):
    # As the public LLaVA-1.5 has it: a language model of the library's own size, and no weights.
    model = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "processor_config.json").write_text("{}")
    assert width("llava-1.5-7b", str(tmp_path)) == 4096
    assert width("tiny-llava") == width("tiny-qwen2.5-vl") == 128
    earlier = tmp_path / "earlier"
    shutil.copytree(STORED, earlier)
    told = json.loads((earlier / "study.json").read_text())
    told["config"] |= {"backbone": "llava-1.5-7b", "model_path": str(tmp_path)}
    (earlier / "study.json").write_text(json.dumps(told))
    table = (earlier / "front.csv").read_text().replace(",0.003,", ",7.5e-05,")
    (earlier / "front.csv").write_text(table)
    shutil.rmtree(earlier / "adapters")  # nobody needs them
    prior = make_plan(study(tmp_path, warm_start=str(earlier))).prior
    assert prior is not None and prior.rate_factor == 32
    assert [point["learning_rate"] for point in prior.points] == pytest.approx([2.4e-3] * 2)


def test_the_plan_names_it_and_its_points_come_second(tmp_path, capsys):
    flags = ["--warm-start", str(STORED), "--forget-ratio", "10", "--trials", "4", "--dry-run"]
    assert main([*flags, "--output", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "Warm start from tiny-llava-2026-11-29T012219-1-d81ae6, tiny-llava, 5 %" in printed
    plan = make_plan(study(tmp_path, backbone="tiny-qwen2.5-vl"))
    assert plan.prior is not None and plan.prior.left_out == 0
    # This backbone's noise is fixed, its beta bounded; the two trials differ in alpha and style.
    alphas = [(point["alpha"], point["prompt_style"]) for point in plan.prior.points]
    assert sorted(alphas) == [(0.5, "polite"), (1.0, "strict")]
    plain = make_plan(study(tmp_path, backbone="tiny-qwen2.5-vl", warm_start=None))
    assert plain.prior is None
    expected = plain.space.started_from(plan.prior.points).first_points
    assert plan.space.first_points == expected and len(expected) == 6
    assert plan.space.first_points[0] == plain.space.first_points[0]


@pytest.mark.parametrize(
    ("options", "edit", "sentence"),
    [
        ({"warm_start": "gone"}, {}, "gone: holds no study.json"),
        ({"warm_start": "mlflow:1"}, {}, "--warm-start mlflow:1: a run id has 32"),
        ({"warm_start": f"mlflow:{'0' * 32}"}, {}, "--warm-start .*: name its MLflow server"),
        ({"method": "ga"}, {}, "is a study of 'vgid' and this one runs 'ga'; name a study"),
        ({}, {"front.csv": "trial_id,status\n"}, "no setting .* name another study or leave"),
        ({}, {"front.csv": None}, "front.csv cannot be read"),
        ({}, {"study.json": "{"}, "study.json is damaged"),
    ],
)
def test_what_is_no_prior_is_refused_in_the_plan(tmp_path, monkeypatch, options, edit, sentence):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STORED, tmp_path / "earlier")
    for name, content in edit.items():
        (tmp_path / "earlier" / name).unlink()
        if content is not None:
            (tmp_path / "earlier" / name).write_text(content)
    with pytest.raises(InputError, match=sentence):
        make_plan(study(tmp_path, **{"warm_start": "earlier"} | options))
    assert not (tmp_path / "new").exists()


def test_a_resume_needs_no_earlier_study_and_proposes_the_same(tmp_path):
    def trials(name, stops, gone=None):
        configs = []
        for number, count in enumerate(stops):
            resume = number > 0
            if resume and gone is not None:
                shutil.rmtree(gone)
            asked = study(tmp_path, output=tmp_path / name, warm_start=str(earlier), trials=8)
            plan = make_plan(asked, resume=resume)
            with Ledger(asked.output) as ledger:
                ledger.open(plan.config, plan.space.sha256, resume, plan.prior)
                search = ParetoSearch(ledger, plan.space, asked, lambda: 1, Losses())
                configs += run(ledger, search, trials=count)
                search.close()
            assert recorded(asked.output).warm_start == plan.prior
        return configs

    earlier = tmp_path / "earlier"
    shutil.copytree(STORED, earlier)
    whole = trials("whole", [8])
    space = SearchSpace.load(FOLDER / "tiny-llava.yaml")
    prior = recorded(tmp_path / "whole").warm_start
    # Both trials of the front are first points of the space itself, which come once, but earlier.
    begun = space.started_from(prior.points).first_points
    assert [space.trial_config(point, 0) for point in begun] == whole[:4]
    assert whole[1] != space.trial_config(space.first_points[1], 0)
    assert trials("parts", [2, 3, 3], gone=None) == whole
    assert trials("without", [2, 6], gone=earlier) == whole
    other = study(tmp_path, output=tmp_path / "whole", warm_start=None)
    with Ledger(other.output) as ledger, pytest.raises(InputError, match=r"warm-start .* repeat"):
        ledger.resume(other, space.sha256)
    with pytest.raises(InputError, match="holds no study to resume"):
        make_plan(study(tmp_path, output=tmp_path / "none"), resume=True)


def test_an_older_record_has_no_prior(tmp_path):
    header = Header(
        study_id="s", config=StudyConfig(output=tmp_path), search_space_sha256="", started=""
    )
    old = header.model_dump(mode="json")
    del old["warm_start"]
    assert Header.model_validate(old).warm_start is None
    prior = Prior(study_id="s", backbone="b", forget_ratio=5, rate_factor=1, points=(), left_out=2)
    assert prior.told.endswith("times 1, 2 outside the search space left out")
