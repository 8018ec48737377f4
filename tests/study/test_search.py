"""The searcher over Optuna's ask and tell: states, first points, conditional sigma, reconciling."""

import json

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.experiment import Experiment
from ray.tune.progress_reporter import _get_progress_table_data
from ray.tune.search import Searcher, SearchGenerator

from vgid.cluster.losses import Losses
from vgid.cluster.mailbox import Job
from vgid.cluster.tune import JOB, SlotTrial
from vgid.config import StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.requirement import OBJECTIVES
from vgid.results import TrialResult
from vgid.study.ledger import Header, Ledger, now
from vgid.study.search import ParetoSearch, make_sampler, open_journal
from vgid.study.search_space import SearchSpace

SPACE = """
backbone: tiny-llava
methods:
  vgid:
    parameters:
      alpha: {low: 0.3, high: 3.0, log: true}
      noise_type: {choices: [random, gaussian, white]}
      sigma: {low: 0.2, high: 1.0}
      lora_rank: 8
    first_points:
      - {alpha: 1.0, noise_type: random}
      - {alpha: 0.5, noise_type: gaussian, sigma: 0.8}
"""


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return SearchSpace.load(path)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "study") as ledger:
        config = StudyConfig(output=tmp_path / "study")
        ledger.begin(Header(study_id="s", config=config, search_space_sha256="", started=now()))
        yield ledger


def search(ledger, space, trials=6, sampler="random", seed=0, concurrent=1, **options):
    asked = {"trials": trials, "sampler": sampler, "seed": seed}
    config = ledger.header.config.model_copy(update=asked)
    return ParetoSearch(ledger, space, config, lambda: concurrent, Losses(), **options)


def end(ledger, searcher, tune_id, name, status="completed", **metrics):
    searcher.on_trial_complete(tune_id)
    result = TrialResult(trial_id=name, status=status, metrics=metrics)
    searcher.tell(ledger.end(name, result))


def run(ledger, searcher, score=None, trials=99):
    """Run trials one after the other until the search is over; their configs."""
    configs = []
    while len(configs) < trials:
        asked = searcher.suggest(f"t{len(configs)}")
        if asked == Searcher.FINISHED:
            break
        job = Job.model_validate_json(asked[JOB])
        configs.append(job.trial)
        alpha = job.trial.alpha
        end(
            ledger,
            searcher,
            f"t{len(configs) - 1}",
            job.id,
            forget_rougeL_reduction=alpha / 3,
            retain_rougeL=1 - alpha / 4,
        )
    return configs


def stored(ledger):
    """The trials in Optuna's journal, as Optuna's own loader reads them."""
    return optuna.load_study(study_name="s", storage=open_journal(ledger.output)).trials


def test_first_points_come_first_and_trial_ids_are_optunas_numbers(ledger, space):
    searcher = search(ledger, space)
    configs = run(ledger, searcher)
    searcher.close()
    assert len(configs) == 6
    assert (configs[0].alpha, configs[0].noise_type) == (1.0, "random")
    assert (configs[1].alpha, configs[1].sigma) == (0.5, 0.8)
    assert all(config.lora_rank == 8 for config in configs)
    trials = stored(ledger)
    assert [trial.number for trial in trials] == [int(name) for name in ledger.records]
    for trial, config in zip(trials, configs, strict=True):
        assert trial.params["alpha"] == config.alpha
        assert trial.state == TrialState.COMPLETE
        assert trial.values == [config.alpha / 3, 1 - config.alpha / 4]


def test_tunes_own_table_has_a_column_for_each_searched_field(ledger, space):
    searcher = search(ledger, space, trials=2, concurrent=2)
    generator = SearchGenerator(searcher)
    generator.add_configurations([Experiment("study", SlotTrial, num_samples=2)])
    trials = [generator.next_trial() for _ in range(2)]
    searcher.close()
    assert [set(trial.config) for trial in trials] == [
        {"alpha", "noise_type", JOB},
        {"alpha", "noise_type", "sigma", JOB},
    ]
    rows, head, _ = _get_progress_table_data(trials, metric_columns=[])
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    columns = ("alpha", "noise_type", "sigma")
    assert [tuple(row[name] for name in columns) for row in shown] == [
        (1.0, "random", None),
        (0.5, "gaussian", 0.8),
    ]


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_sigma_is_asked_for_only_under_gaussian_noise(ledger, space, sampler):
    searcher = search(ledger, space, trials=16, sampler=sampler)
    configs = run(ledger, searcher)
    searcher.close()
    assert {config.noise_type for config in configs} == {"random", "gaussian", "white"}
    for config, trial in zip(configs, stored(ledger), strict=True):
        assert (config.sigma is not None) == (config.noise_type == "gaussian")
        assert ("sigma" in trial.params) == (config.noise_type == "gaussian")


def test_no_more_than_the_slots_and_the_same_job_never_twice(ledger, space):
    searcher = search(ledger, space, trials=3, concurrent=2)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert searcher.suggest("c") is None
    assert json.loads(first[JOB])["id"] == "0000"
    assert json.loads(second[JOB])["id"] == "0001"
    end(ledger, searcher, "a", "0000", forget_rougeL_reduction=0.5, retain_rougeL=0.5)
    assert json.loads(searcher.suggest("c")[JOB])["id"] == "0002"
    end(ledger, searcher, "b", "0001", forget_rougeL_reduction=0.5, retain_rougeL=0.5)
    assert searcher.suggest("d") is None  # the last one may yet be lost, and come back
    end(ledger, searcher, "c", "0002", forget_rougeL_reduction=0.5, retain_rougeL=0.5)
    assert searcher.suggest("d") == Searcher.FINISHED
    searcher.close()


@pytest.mark.parametrize(
    ("status", "metrics", "state"),
    [
        ("completed", {"forget_rougeL_reduction": 0.5, "retain_rougeL": 0.9}, "COMPLETE"),
        ("completed", {"retain_rougeL": 0.9}, "FAIL"),
        ("failed", {}, "FAIL"),
        ("pruned", {"loss": 0.25}, "PRUNED"),
        ("pruned", {"forget_rougeL_reduction": 0.5, "retain_rougeL": 0.9}, "PRUNED"),
    ],
)
def test_every_end_reaches_optuna_and_is_told_again_the_same_after_a_resume(
    ledger, space, status, metrics, state
):
    searcher = search(ledger, space)
    searcher.suggest("a")
    searcher.on_trial_complete("a")
    searcher.tell(ledger.end("0000", TrialResult(trial_id="0000", status=status, metrics=metrics)))
    trial = stored(ledger)[0]
    assert trial.state.name == state
    assert (trial.values is not None) == (state == "COMPLETE")
    searcher.close()

    search(ledger, space).close()
    again = stored(ledger)[0]
    assert again.state.name == state
    assert again.user_attrs["metrics"] == metrics


def test_partial_values_of_a_pruned_trial_are_kept_as_attributes(ledger, space):
    searcher = search(ledger, space)
    searcher.suggest("a")
    end(ledger, searcher, "a", "0000", status="pruned", loss=0.25)
    searcher.close()
    assert stored(ledger)[0].user_attrs["metrics"] == {"loss": 0.25}


def test_a_resumed_search_proposes_what_an_uninterrupted_one_would(tmp_path, space):
    def study(name, stops):
        configs, output = [], tmp_path / name
        for number, trials in enumerate(stops):
            with Ledger(output) as ledger:
                config = StudyConfig(output=output)
                if number == 0:
                    header = Header(
                        study_id="s", config=config, search_space_sha256="", started=now()
                    )
                    ledger.begin(header)
                else:
                    ledger.resume(config, "")
                searcher = search(ledger, space, trials=14, sampler="gp", seed=3)
                configs += run(ledger, searcher, trials=trials)
                if trials < 14:  # killed in mid-trial: in the ledger, never told
                    searcher.suggest("in flight")
                    searcher._thread.shutdown()
                else:
                    searcher.close()
        return configs

    whole = study("whole", [14])
    parts = study("parts", [12, 14])
    assert len(parts) == 14
    assert parts == whole


CLASHING = """
backbone: tiny-llava
methods:
  vgid:
    parameters:
      alpha: {low: 0.3, high: 3.0, log: true}
      released: {choices: [false, true]}
      views: {choices: [1, 2]}
    first_points:
      - {alpha: 1.0, released: true, views: 1}
"""


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_proposal_that_is_no_trial_costs_none_and_shifts_no_id(tmp_path, sampler, monkeypatch):
    path = tmp_path / "space.yaml"
    path.write_text(CLASHING)
    clashing = SearchSpace.load(path)
    refused = []
    tell = optuna.Study.tell

    def told(study, trial, values=None, state=None, **more):
        refused.extend([trial] * (state == TrialState.FAIL))
        return tell(study, trial, values, state, **more)

    monkeypatch.setattr(optuna.Study, "tell", told)

    def study(name, stops):
        configs = []
        for trials in stops:
            with Ledger(tmp_path / name) as ledger:
                config = StudyConfig(output=tmp_path / name)
                if not configs:
                    header = Header(
                        study_id="s", config=config, search_space_sha256="", started=now()
                    )
                    ledger.begin(header)
                else:
                    ledger.resume(config, "")
                searcher = search(ledger, clashing, trials=12, sampler=sampler)
                configs += run(ledger, searcher, trials=trials)
                searcher.close()
                found = stored(ledger)
                assert [trial.state for trial in found] == [TrialState.COMPLETE] * len(configs)
                assert [trial.params["alpha"] for trial in found] == [c.alpha for c in configs]
        return configs

    whole = study("whole", [12])
    assert len(whole) == 12
    assert refused
    assert {(c.released, c.views) for c in whole} == {(False, 1), (False, 2), (True, 1)}
    assert study("parts", [5, 7]) == whole  # a resume proposes what a whole study does


def test_proposals_that_are_refused_for_ever_end_the_study(ledger, space, monkeypatch):
    def refuse(space, params, seed):
        raise InputError("space.yaml: views: leave it 1.")

    monkeypatch.setattr("vgid.study.search.MAX_REFUSED", 5)
    monkeypatch.setattr(SearchSpace, "trial_config", refuse)
    searcher = search(ledger, space)
    with pytest.raises(InputError, match=r"leave it 1\. 5 proposals in a row were refused"):
        searcher.suggest("a")
    searcher._thread.shutdown()
    assert not ledger.records


def test_trials_in_flight_run_again_under_their_ids_before_anything_new(ledger, space):
    searcher = search(ledger, space, concurrent=2)
    jobs = [json.loads(searcher.suggest(name)[JOB]) for name in ("a", "b")]
    searcher._thread.shutdown()
    again = search(ledger, space, concurrent=2)
    assert [t.state for t in stored(ledger)[:2]] == [TrialState.RUNNING] * 2
    assert [json.loads(again.suggest(name)[JOB]) for name in ("c", "d")] == jobs
    end(ledger, again, "c", "0000", forget_rougeL_reduction=0.5, retain_rougeL=0.5)
    assert json.loads(again.suggest("e")[JOB])["id"] == "0002"
    again.close()


def test_a_lost_trial_comes_back_with_its_id_and_config_and_optuna_hears_nothing(ledger, space):
    def asked(tune_id):
        return Job.model_validate_json(searcher.suggest(tune_id)[JOB])

    scores = {"forget_rougeL_reduction": 0.5, "retain_rougeL": 0.5}
    searcher = search(ledger, space, trials=2)
    first = asked("a")
    searcher.on_trial_complete("a", error=True)
    searcher.try_again("0000")
    searcher.try_again("0000")  # told of twice, it comes back once
    assert asked("b").id == "0001"  # another trial tells whether the fault is in the first
    assert [t.state for t in stored(ledger)] == [TrialState.RUNNING] * 2
    end(ledger, searcher, "b", "0001", **scores)
    again = asked("c")
    assert again == first.model_copy(update={"attempt": 2})
    searcher.on_trial_complete("c")
    searcher.try_again("0000")
    assert asked("d").attempt == 3
    end(ledger, searcher, "d", "0000", **scores)
    assert searcher.suggest("e") == Searcher.FINISHED
    searcher.close()
    assert [t.state for t in stored(ledger)] == [TrialState.COMPLETE] * 2


def test_failed_trials_that_are_retried_run_again_under_their_ids(ledger, space):
    scores = {"forget_rougeL_reduction": 0.5, "retain_rougeL": 0.5}
    searcher = search(ledger, space, trials=3)
    jobs = {}
    for name, status in (("0000", "completed"), ("0001", "failed"), ("0002", "failed")):
        jobs[name] = searcher.suggest(name)
        result = TrialResult(trial_id=name, status=status, metrics=scores, error="NaN")
        searcher.on_trial_complete(name)
        searcher.tell(ledger.end(name, result))
    searcher.close()
    ledger.retry_failed()
    again = search(ledger, space, trials=3)
    assert [t.state.name for t in stored(ledger)] == ["COMPLETE", "RUNNING", "RUNNING"]
    for name in ("0001", "0002"):
        assert again.suggest(name) == jobs[name]
        end(ledger, again, name, name, **scores)
    assert again.suggest("x") == Searcher.FINISHED
    again.close()
    assert [t.state for t in stored(ledger)] == [TrialState.COMPLETE] * 3


def test_the_journal_is_rebuilt_when_it_is_lost_or_behind(ledger, space):
    searcher = search(ledger, space)
    run(ledger, searcher, trials=3)
    searcher._thread.shutdown()
    before = [(t.params, t.values) for t in stored(ledger)[:3]]
    for path in ledger.output.glob("optuna.log*"):
        path.unlink()
    search(ledger, space).close()
    assert [(t.params, t.values) for t in stored(ledger)[:3]] == before


def test_out_of_time_asks_for_nothing_new_and_leaves_no_running_trial(ledger, space):
    over = []
    searcher = search(ledger, space, enough=lambda: bool(over))
    run(ledger, searcher, trials=2)
    over.append(True)
    assert searcher.suggest("late") == Searcher.FINISHED
    searcher.close()
    assert [t.state for t in stored(ledger)] == [TrialState.COMPLETE] * 2


def test_optuna_knows_by_how_much_a_trial_misses_a_bound_and_a_resumed_one_too(ledger, space):
    searcher = search(ledger, space, trials=2)
    missed = {"forget_cloze<=0.3": 0.25}
    job = Job.model_validate_json(searcher.suggest("t0")[JOB])
    metrics = dict.fromkeys(OBJECTIVES, 0.5)
    result = TrialResult(trial_id=job.id, status="completed", metrics=metrics, missed=missed)
    searcher.on_trial_complete("t0")
    searcher.tell(ledger.end(job.id, result))
    searcher.close()
    assert stored(ledger)[0].constraints == missed
    search(ledger, space, trials=2).close()
    assert stored(ledger)[0].constraints == missed


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_optuna_is_told_of_each_objective_and_which_way_it_is_better(tmp_path, space, sampler):
    names = ("retain_rougeL", "forget_cloze", "forget_rougeL_reduction")
    config = StudyConfig(output=tmp_path / "s", objectives=names)
    with Ledger(tmp_path / "s") as ledger:
        ledger.begin(Header(study_id="s", config=config, search_space_sha256="", started=now()))
        searcher = search(ledger, space, trials=12, sampler=sampler)
        for number in range(12):
            job = Job.model_validate_json(searcher.suggest(f"t{number}")[JOB])
            scores = dict(zip(names, (0.9, job.trial.alpha / 9, 0.5), strict=True))
            end(ledger, searcher, f"t{number}", job.id, **scores)
        searcher.close()
        study = optuna.load_study(study_name="s", storage=open_journal(ledger.output))
        assert [way.name for way in study.directions] == ["MAXIMIZE", "MINIMIZE", "MAXIMIZE"]
        assert study.metric_names == list(names)
        told = [trial.values for trial in study.trials]
        assert told == [[0.9, trial.params["alpha"] / 9, 0.5] for trial in study.trials]
        # Only alpha matters, and only little of it is good.
        alphas = [trial.params["alpha"] for trial in study.trials]
        assert min(alphas[2:]) < min(alphas[:2]) / 1.5


def test_every_trial_has_the_studys_seed(ledger, space):
    searcher = search(ledger, space, seed=7)
    assert {config.seed for config in run(ledger, searcher)} == {7}
    searcher.close()


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_sigma_is_searched_and_not_drawn_at_random(space, sampler):
    # Of 30 random trials those are best that have Gaussian noise with a sigma near 0.9.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    random = optuna.create_study(directions=["maximize"] * 2, sampler=make_sampler("random", 1, 0))
    for _ in range(30):
        trial = random.ask()
        point = space.suggest(trial)
        far = abs(point.get("sigma", 1.9) - 0.9)
        random.tell(trial, [1 - far - 0.01 * point["alpha"], 1 - far + 0.01 * point["alpha"]])
    # Neither sampler draws sigma with the others once a trial lacks it: this is what they call.
    asked, sigma = random.ask(), space.distributions({"noise_type": "gaussian"})["sigma"]
    proposed = [
        make_sampler(sampler, 0, number).sample_independent(
            random, random.trials[asked.number], "sigma", sigma
        )
        for number in range(16)
    ]
    assert sum(abs(value - 0.9) for value in proposed) / 16 < 0.15  # by chance 0.31


def test_different_values_at_points_that_look_equal_to_the_gaussian_process_are_noise(space):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seen = optuna.create_study(directions=["maximize"] * 2, sampler=make_sampler("random", 1, 0))
    for number in range(12):
        seen.enqueue_trial({"alpha": 0.5 * (1 + number // 2), "noise_type": "gaussian"})
        trial = seen.ask()
        sigma = space.suggest(trial)["sigma"]
        # Best in the middle of alpha, or every proposal would be the same end of it.
        peak = 1 - (trial.params["alpha"] - 1.5) ** 2
        seen.tell(trial, [peak + sigma, peak - sigma])
    settings = {"seed": 7, "warn_independent_sampling": False}
    noisy, exact = (
        optuna.samplers.GPSampler(deterministic_objective=known, **settings)
        for known in (False, True)
    )
    proposed = []
    for sampler in (make_sampler("gp", 0, 7), noisy, exact):
        study = optuna.create_study(directions=["maximize"] * 2, sampler=sampler)
        study.add_trials(seen.trials)
        point = space.suggest(study.ask())
        proposed.append((point["alpha"], point["noise_type"]))
    assert proposed[0] == proposed[1] != proposed[2]


def test_a_longer_study_begins_as_a_shorter_one(tmp_path, space):
    begun = []
    for trials in (12, 240):
        with Ledger(tmp_path / str(trials)) as ledger:
            ledger.open(StudyConfig(output=ledger.output), space.sha256, resume=False)
            begun.append(run(ledger, search(ledger, space, trials, "auto"), trials=12))
    assert begun[0] == begun[1]


def test_the_automatic_sampler_is_a_gaussian_process_for_the_first_hundred_trials():
    assert type(make_sampler("auto", 0, 99)).__name__ == "GPSampler"
    assert type(make_sampler("auto", 0, 100)).__name__ == "TPESampler"


def test_a_config_travels_through_tune_bit_for_bit(ledger, space):
    searcher = search(ledger, space)
    job = Job.model_validate_json(searcher.suggest("a")[JOB])
    assert job.trial == ledger.records["0000"].config
    assert isinstance(job.trial, TrialConfig)
    assert job.checkpoints == ledger.checkpoints("0000")
    searcher.close()
