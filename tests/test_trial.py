import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_random_backbone
from tests.small_benchmark import write_small
from vgid.bases.tiny_llava import save
from vgid.config import Method, RequestConfig, TrainWording, TrialConfig, uses
from vgid.data.benchmark import Benchmark, split_questions
from vgid.data.people import comparable
from vgid.data.splits import People, choose_people, count_verbatim, held_out_of_training
from vgid.errors import InputError
from vgid.evaluation import evaluate as scoring
from vgid.evaluation.evaluate import evaluate
from vgid.evaluation.questions import prepare
from vgid.method import distillation
from vgid.method.released import distill_released
from vgid.method.samples import training_samples
from vgid.method.teacher import Intervention
from vgid.models.adapter_files import rescaled
from vgid.models.adapters import loaded
from vgid.results import EpochReport, KeptScores, Score, TrialResult, Verbatim
from vgid.trial import TrialSession, run_trial

TRIAL = TrialConfig(epochs=2, lora_rank=2)


@pytest.fixture(scope="module")
def request_config(tmp_path_factory) -> RequestConfig:
    root = tmp_path_factory.mktemp("trial")
    write_small(root / "data")
    backbone = make_random_backbone()
    save(backbone.spec.name, backbone.model, backbone.processor.tokenizer, root / "model")
    return RequestConfig(
        data=root / "data",
        store=root / "store",
        model_path=str(root / "model"),
        retain_people=4,
        bootstrap_samples=100,
    )


@pytest.fixture(scope="module")
def session(request_config) -> TrialSession:
    return TrialSession(request_config)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def result(session, adapters) -> TrialResult:
    return session.run(TRIAL, "0000", adapters / "0000")


def replaced(request: RequestConfig, **fields: object) -> RequestConfig:
    return request.model_copy(update=fields)


def same_adapter(a: Path, b: Path) -> bool:
    left, right = (load_file(p / "adapter_model.safetensors") for p in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_completed_trial_has_scores_times_and_a_peft_adapter(session, result, adapters):
    assert result.status == "completed"
    assert set(result.seconds) == {"load", "teacher", "train", "evaluate", "save"}
    base = session.base_scores("search")["forget_rougeL"].value
    reduction = base - result.scores["forget_rougeL"].value
    assert result.metrics["forget_rougeL_reduction"] == reduction
    for name in ("retain_rougeL", "test_rougeL", "forget_cloze", "forget_memorisation"):
        assert result.metrics[name] == result.scores[name].value
        assert result.scores[name].low <= result.scores[name].value <= result.scores[name].high
    config = json.loads((adapters / "0000" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2
    names = load_file(adapters / "0000" / "adapter_model.safetensors").keys()
    assert names and all("language_model" in name for name in names)
    assert sorted(p.name for p in adapters.iterdir()) == ["0000"]


@contextmanager
def asking(session, **fields):
    """The session with other fields of its request in the block."""
    before = session.request
    session.request = replaced(before, **fields)
    try:
        yield
    finally:
        session.request = before


def test_a_trial_tells_by_how_much_it_misses_what_is_required(session, result, tmp_path):
    bounds = ("retain_rougeL>=2*base", "forget_rougeL<=1", "forget_rougeL_reduction>=0.9")
    with asking(session, require=bounds):
        asked = session.run(TRIAL, "0000", tmp_path / "0000")
    never = r"--require: .* no score is called forget_rouge; there"
    with asking(session, require=("forget_rouge<=1",)), pytest.raises(InputError, match=never):
        session.run(TRIAL, "0001", tmp_path / "0001")
    assert not (tmp_path / "0001").exists()
    base = session.base_scores("search")["retain_rougeL"].value
    own = asked.metrics
    assert asked.missed == {
        "retain_rougeL>=2*base": 2 * base - own["retain_rougeL"],
        "forget_rougeL<=1": own["forget_rougeL"] - 1,
        "forget_rougeL_reduction>=0.9": 0.9 - own["forget_rougeL_reduction"],
    }
    assert asked.scores == result.scores
    assert result.missed == {}


def test_an_objective_that_is_never_scored_is_named_with_those_that_there_are(session, tmp_path):
    objectives = ("retain_rougeL", "celebrity_rouge")
    never = r"--objectives: .* celebrity_rouge; there are .*forget"
    with asking(session, objectives=objectives), pytest.raises(InputError, match=never):
        session.run(TRIAL, "0001", tmp_path / "0001")
    assert not (tmp_path / "0001").exists()


def test_what_is_harvested_of_a_trial_is_what_that_scale_gives_alone(
    session, result, adapters, request_config, tmp_path
):
    bounds = ("forget_cloze<=1",)
    objectives = ("forget_rougeL_reduction", "retain_rougeL_text")
    with asking(session, harvest=(0.5, 1.5), require=bounds, objectives=objectives):
        harvested = session.run(TRIAL, "0000", tmp_path / "0000")
    # The trial itself is what it is without a harvest, its adapter too.
    assert harvested.scores == result.scores
    assert same_adapter(tmp_path / "0000", adapters / "0000")
    assert [each.scale for each in harvested.harvest] == [0.5, 1.5]
    for each in harvested.harvest:
        alone = TRIAL.model_copy(update={"adapter_scale": each.scale})
        fresh = run_trial(alone, request_config, tmp_path / "alone", "0000")
        for name in ("forget_rougeL", "retain_rougeL", "forget_cloze", "retain_rougeL_text"):
            assert each.scores[name] == fresh.scores[name]
        gone = each.metrics["forget_rougeL_reduction"]
        assert gone == fresh.metrics["forget_rougeL_reduction"]
        assert each.missed == {"forget_cloze<=1": each.metrics["forget_cloze"] - 1}
        assert len(each.scores) < len(fresh.scores) / 2
        rescaled(adapters / "0000", tmp_path / "made", each.scale)
        assert same_adapter(tmp_path / "made", tmp_path / "alone")
        saved = [(tmp_path / n / "adapter_config.json").read_text() for n in ("made", "alone")]
        assert json.loads(saved[0]) == json.loads(saved[1])
        kept = session.scorer.kept("search", 0, adapter_dir=tmp_path / "made").scores
        assert kept["retain_rougeL"] == each.scores["retain_rougeL"]
    assert result.harvest == ()


def test_a_trial_in_a_used_session_equals_one_in_a_fresh_session(
    session, result, request_config, adapters, tmp_path
):
    session.run(TRIAL.model_copy(update={"alpha": 2.0, "seed": 5}), "0001", tmp_path / "0001")
    again = session.run(TRIAL, "0000", tmp_path / "again")
    fresh = run_trial(TRIAL, request_config, tmp_path / "fresh", "0000")
    assert again.metrics == result.metrics == fresh.metrics
    assert again.scores == result.scores == fresh.scores
    assert same_adapter(adapters / "0000", tmp_path / "again")
    assert same_adapter(adapters / "0000", tmp_path / "fresh")


def test_views_of_the_portraits_change_the_training_and_nothing_behind_it(
    session, result, request_config, adapters, tmp_path
):
    varied = TRIAL.model_copy(update={"views": 3})
    found = session.run(varied, "0009", tmp_path / "0009")
    assert found.status == "completed"
    assert not same_adapter(adapters / "0000", tmp_path / "0009")
    run_trial(varied, request_config, tmp_path / "fresh", "0009")
    assert same_adapter(tmp_path / "0009", tmp_path / "fresh")
    again = session.run(TRIAL, "0000", tmp_path / "again")
    assert again.metrics == result.metrics
    assert same_adapter(adapters / "0000", tmp_path / "again")


def test_on_epoch_sees_each_epoch_and_can_stop_the_trial(session, tmp_path):
    seen: list[EpochReport] = []

    def stop_after_first(report: EpochReport) -> bool:
        seen.append(report)
        return False

    result = session.run(TRIAL, "0002", tmp_path / "0002", stop_after_first)
    assert result.status == "pruned"
    assert [(r.epoch, r.epochs) for r in seen] == [(1, 2)]
    assert result.adapter is None and not (tmp_path / "0002").exists()
    assert result.metrics == seen[0].metrics


def test_at_a_rung_a_trial_tells_its_objectives_and_stays_what_it_is(
    session, result, adapters, tmp_path
):
    seen: list[EpochReport] = []
    whole: list[float] = []

    def look(report: EpochReport) -> bool:
        seen.append(report)
        if report.epoch == 1:
            whole.append(session.scorer.evaluate("search", 0).scores["retain_rougeL"].value)
        return True

    with asking(session, halving=2):
        compared = session.run(TRIAL, "0000", tmp_path / "0000", look)
        session.run(TRIAL, "0000", tmp_path / "x", lambda r: r.epoch < 1, tmp_path / "checkpoint")
        session.run(TRIAL, "0000", tmp_path / "y", look, tmp_path / "checkpoint")
    assert [report.epoch for report in seen] == [1, 2, 1, 2]
    assert seen[0] == seen[2]  # told again from the checkpoint
    assert seen[0].metrics["retain_rougeL"] == whole[0] != result.metrics["retain_rougeL"]
    assert "forget_rougeL_reduction" in seen[0].metrics
    assert "retain_rougeL" not in seen[1].metrics
    assert compared.metrics == result.metrics and compared.scores == result.scores
    assert same_adapter(tmp_path / "0000", adapters / "0000")


def test_a_loss_that_is_not_finite_fails_the_trial_and_not_the_session(session, result, tmp_path):
    wild = TRIAL.model_copy(update={"learning_rate": 1e20, "epochs": 30})
    failed = session.run(wild, "0003", tmp_path / "0003")
    assert failed.status == "failed"
    assert failed.error is not None and "not finite" in failed.error
    assert not (tmp_path / "0003").exists()
    assert session.run(TRIAL, "0000", tmp_path / "after").metrics == result.metrics


def test_without_evaluation_the_adapter_is_the_same_and_nothing_is_asked(
    result, request_config, adapters, tmp_path
):
    session = TrialSession(request_config.model_copy(update={"store": tmp_path / "store"}))
    trained = session.run(TRIAL, "0000", tmp_path / "0000", evaluate=False)
    assert trained.status == "completed" and trained.adapter == tmp_path / "0000"
    assert same_adapter(adapters / "0000", tmp_path / "0000")
    assert trained.scores == {} and trained.option_scoring is None
    of_training = {"forget_loss", "retain_loss", "loss", "learning_rate", "grad_norm"}
    of_training.add("retain_seen_shown")
    assert trained.metrics == {name: result.metrics[name] for name in of_training}
    assert not list((tmp_path / "store").glob("base-*.json"))
    wild = TRIAL.model_copy(update={"learning_rate": 1e20, "epochs": 30})
    failed = session.run(wild, "0003", tmp_path / "0003", evaluate=False)
    assert failed.status == "failed" and "not finite" in (failed.error or "")
    assert failed.adapter is None and not (tmp_path / "0003").exists()
    evaluated = session.run(TRIAL, "0000", tmp_path / "evaluated")
    assert evaluated.scores == result.scores and evaluated.metrics == result.metrics


@pytest.mark.parametrize("trained", [1, 2])
def test_a_trial_continues_from_its_checkpoint(session, result, tmp_path, trained):
    """Also from that of its last epoch, which nobody has heard of: killed while it was scored."""
    checkpoint = tmp_path / "checkpoint"
    session.run(TRIAL, "0000", tmp_path / "x", lambda r: r.epoch < trained, checkpoint)
    seen: list[int] = []
    continued = session.run(
        TRIAL, "0000", tmp_path / "y", lambda r: bool(seen.append(r.epoch)) or True, checkpoint
    )
    assert seen == [1, 2]
    assert continued.metrics == result.metrics


def test_rescoring_the_saved_adapter_gives_the_trial_s_scores(session, result, adapters):
    seed = session.request.seed
    scores = session.rescore(adapters / "0000", "search", seed)
    assert {name: scores[name] for name in result.scores} == result.scores
    assert scores.keys() - result.scores.keys() == {"forget_rougeL_reduction", "retain_rougeL_drop"}
    held_out = session.rescore(adapters / "0000")
    assert {name for name in held_out if not name.startswith("celebrity_")} == scores.keys()
    assert held_out.keys() > scores.keys()  # celebrities are asked on held-out questions only
    assert {name: held_out[name] for name in scores} != scores


def test_drops_and_rises_pair_the_people_and_take_no_score_as_known(
    session, request_config, result, adapters
):
    own, seed = adapters / "0000", request_config.seed
    base, scores = session.base_scores("search"), session.rescore(own, "search", seed)
    attacked = session.rescore_attacked(own, "search", seed)
    for gap, first, second in (
        (scores["forget_rougeL_reduction"], base["forget_rougeL"], scores["forget_rougeL"]),
        (scores["retain_rougeL_drop"], base["retain_rougeL"], scores["retain_rougeL"]),
        (attacked["forget_rougeL_rise"], attacked["forget_rougeL"], scores["forget_rougeL"]),
    ):
        assert gap.value == pytest.approx(first.value - second.value, abs=1e-12)
        assert gap.n == first.n == second.n
        assert gap.low <= gap.value <= gap.high
        assert gap.high - gap.low != pytest.approx(second.high - second.low)  # not mirrored
    kept = [json.loads(path.read_text()) for path in request_config.store.glob("adapter-*.json")]
    assert kept and all(found["people"].keys() == found["scores"].keys() for found in kept)
    people = session.people.forget + session.people.retain_pool
    text = "".join(path.read_text() for path in request_config.store.glob("*.json"))
    assert not [person.id for person in people if f'"{person.id}"' in text]


def test_base_scores_are_computed_once_and_shared(session, request_config):
    first = session.base_scores("search")
    stored = list(request_config.store.glob("base-*.json"))
    before = {path: path.stat().st_mtime_ns for path in stored}
    assert TrialSession(request_config).base_scores("search") == first
    assert {p: p.stat().st_mtime_ns for p in request_config.store.glob("base-*.json")} == before


@pytest.mark.parametrize("method", [m for m in get_args(Method) if m != "vgid"])
def test_every_method_is_a_trial_that_lowers_its_forget_loss(
    session, result, adapters, tmp_path, method
):
    own = {"rmu_layer": 2} if method == "rmu" else {}
    if uses(method, "response_source"):
        own = {"response_source": "reference"}  # two sources in turn are two losses in turn
    # A step an epoch: each loss is that of the whole forget set.
    trial = TrialConfig(method=method, epochs=3, batch_size=100, lora_rank=2, **own)
    losses: list[float] = []
    found = session.run(
        trial,
        "0007",
        tmp_path / "0007",
        lambda report: bool(losses.append(report.metrics["forget_loss"])) or True,
    )
    assert found.status == "completed"
    assert losses[0] > losses[1] > losses[2]
    assert found.scores.keys() == result.scores.keys()
    assert ("retain_loss" in found.metrics) == uses(method, "beta")
    assert not same_adapter(adapters / "0000", tmp_path / "0007")
    again = session.run(trial, "0007", tmp_path / "again")
    assert again.metrics == found.metrics
    assert same_adapter(tmp_path / "0007", tmp_path / "again")


def test_a_layer_that_the_backbone_lacks_is_one_sentence(session, tmp_path):
    with pytest.raises(InputError, match="rmu_layer: tiny-llava has 4 layers, got 5"):
        session.run(TrialConfig(method="rmu", rmu_layer=5), "0008", tmp_path / "0008")


def test_scores_under_an_intervention_and_the_reverse_prompt(
    session, request_config, result, adapters
):
    def plainly(**how):
        people = replace(session.people, celebrities=())
        whom = (session.backbone, people, request_config, "search", request_config.seed)
        exam = prepare(*whom, **how)
        return evaluate(session.backbone, exam, request_config).scores

    base = session.base_scores("search")
    assert session.scores_under("search") == base == plainly()
    strict = Intervention(style="strict")
    dual = Intervention("random", style="strict", seed=3)
    assert session.scores_under("search", intervention=strict) == plainly(intervention=strict)
    assert session.scores_under("search", intervention=dual) == plainly(intervention=dual)
    reverse = session.scores_under("search", intervention=strict, reverse=True)
    assert reverse == plainly(intervention=strict, reverse=True)
    own = adapters / "0000"
    assert session.scores_under("search", adapter_dir=own) == result.scores
    attacked = session.scores_under("search", reverse=True, adapter_dir=own)
    with loaded(session.backbone, own):
        assert attacked == plainly(reverse=True)
    everything = [base, strict, dual, reverse, result.scores, attacked]
    assert len({str(scores) for scores in everything}) == len(everything)
    other = session.scores_under("search", seed=9)
    assert other["forget_rougeL"].n == base["forget_rougeL"].n and other != base


def test_scores_under_are_computed_once_and_shared(session, request_config, result, adapters):
    how = {"intervention": Intervention(style="polite"), "adapter_dir": adapters / "0000"}
    first = session.scores_under("search", **how)
    stored = {p: p.stat().st_mtime_ns for p in request_config.store.glob("adapter-*.json")}
    copy = adapters.parent / "copy"
    shutil.copytree(adapters / "0000", copy)
    how["adapter_dir"] = copy  # the same weights, whatever the folder is called
    assert TrialSession(request_config).scores_under("search", **how) == first
    assert {p: p.stat().st_mtime_ns for p in request_config.store.glob("adapter-*.json")} == stored
    with pytest.raises(InputError, match=r"adapter_config\.json: is missing; name a PEFT"):
        session.scores_under("search", adapter_dir=adapters / "none")


@pytest.fixture
def ask(session, monkeypatch) -> Callable[[], int]:
    """Asks for scores that are made up in no time; tells how often they were made until now."""
    made: list[float] = []

    def evaluate(*_: object) -> object:
        made.append(0.1 + 0.2)
        scores = {"x": Score(value=made[-1], n=1, low=0.0, high=1 / 3)}
        return SimpleNamespace(kept=KeptScores(scores=scores, people={}))

    def scores() -> int:
        with monkeypatch.context() as patch:
            patch.setattr(scoring.Scorer, "evaluate", evaluate)
            found = session.scores_under("search", seed=18)
        assert found == {"x": Score(value=0.1 + 0.2, n=1, low=0.0, high=1 / 3)}
        return len(made)

    for path in session.request.store.glob("base-*.json"):
        if "0.30000000000000004" in path.read_text():
            path.unlink()
    return scores


def test_kept_scores_that_were_torn_are_made_again(session, ask):
    assert (ask(), ask()) == (1, 1)
    (path,) = (p for p in session.request.store.glob("base-*.json") if len(p.read_bytes()) < 120)
    content = path.read_bytes()
    for number, torn in enumerate((b"", content[:-9], bytes(len(content)), b"[]", b'{"x": 1}'), 2):
        path.write_bytes(torn)
        assert (ask(), ask()) == (number, number)
        assert path.read_bytes() == content


def test_kept_scores_are_of_one_precision_processor_frame_and_format(session, monkeypatch, ask):
    assert (ask(), ask()) == (1, 1)
    images, spec = session.backbone.processor.image_processor, session.backbone.spec
    frame = replace(spec.frame, separator="")
    changes: list[tuple[object, str, object]] = [
        (session.backbone, "model", SimpleNamespace(dtype=torch.bfloat16)),
        (images, "resample", 0),
        (session.backbone, "spec", replace(spec, frame=frame)),
        (session.backbone, "spec", replace(spec, option_scoring="letter")),
        (scoring, "SCORES_FORMAT", scoring.SCORES_FORMAT + 1),
    ]
    for number, (target, name, value) in enumerate(changes, 2):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert (ask(), ask()) == (number, number)
    assert ask() == len(changes) + 1


@pytest.mark.parametrize("source", ["reference", "teacher"])
def test_response_sources_differ(session, result, adapters, tmp_path, source):
    other = session.run(
        TRIAL.model_copy(update={"response_source": source}), "0004", tmp_path / "0004"
    )
    assert other.status == "completed"
    assert not same_adapter(adapters / "0000", tmp_path / "0004")


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"retain_batch_size": 2}, 2), ({"retain_batch_size": 1}, 1), ({"method": "ga"}, 0)],
)
def test_the_people_scored_as_seen_are_shown_first_and_those_shown_are_counted(
    session, tmp_path, monkeypatch, settings, count
):
    """A single step, and what it hands to the student."""
    shown: set[str] = set()

    def spy(backbone, data, indices, *arguments):
        shown.update(data.prompts[i].id.split("/")[1] for i in indices)
        return share(backbone, data, indices, *arguments)

    share = distillation.share
    monkeypatch.setattr(distillation, "share", spy)
    trial = TRIAL.model_copy(update={"epochs": 1, "batch_size": 1000, **settings})
    found = session.run(trial, "0010", tmp_path / "0010", evaluate=False)
    seen = {person.id for person in session.people.retain_seen}
    assert len(seen) == 2
    assert found.metrics["retain_seen_shown"] == len(shown & seen) == count
    assert not shown & {person.id for person in session.people.retain_unseen}


def test_released_variant_trains_on_the_script_s_samples(session, tmp_path, monkeypatch):
    handed: list = []

    def spy(backbone, model, *arguments):
        handed.extend(arguments)
        return distill_released(backbone, model, *arguments)

    monkeypatch.setattr("vgid.method.preparation.distill_released", spy)
    script = TrialConfig(released=True, epochs=1, lora_rank=2)
    released = session.run(script, "0005", tmp_path / "0005", evaluate=False)
    assert released.status == "completed"
    assert released.metrics["forget_loss"] > 0
    assert released.metrics["retain_seen_shown"] <= 2
    config = json.loads((tmp_path / "0005" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    forget, retain, _ = handed
    tokenizer = session.backbone.processor.tokenizer
    raw = {
        f"{pair.question}\nASSISTANT: {pair.answer}"
        for person in session.people.forget
        for pair in session.benchmark.training_pairs()[person.id]
    }
    texts = [tokenizer.decode(e.prompt_ids + answer) for e, answer in forget]
    assert texts and {text.split("<image>\n")[-1] for text in texts} <= raw
    assert len(retain) > len(forget)


def test_training_asks_each_pair_in_the_wordings_that_the_trial_names(session, request_config):
    benchmark, people = session.benchmark, session.people
    pairs = benchmark.training_pairs()[people.forget[0].id]
    texts = {}
    for wording in get_args(TrainWording):
        trial = TrialConfig(train_tasks=("generation",), train_wording=wording)
        samples = training_samples(benchmark, people.forget[:1], trial, True, 0)
        assert len({s.query.id for s in samples}) == len(samples)
        assert len({s.portrait for s in samples}) == 1
        texts[wording] = [(s.query.text, s.answer) for s in samples]
    assert texts["raw"] == [(pair.question, pair.answer) for pair in pairs]
    assert all("in one sentence accurately in ENGLISH." in text for text, _ in texts["wrapped"])
    assert texts["both"] == texts["wrapped"] + texts["raw"]


def test_what_training_sees_word_for_word_is_counted(session, request_config):
    tasks = ("generation",)

    def counts(method: Method = "vgid", people: People = session.people, **update: str) -> Verbatim:
        request = request_config.model_copy(update=update)
        return count_verbatim(session.benchmark, people, request, method, tasks)

    unheld = counts()
    assert unheld["held_out"]["forget"] == {"scored": 18, "seen": 0}
    assert unheld["search"]["forget"] == {"scored": 18, "seen": 18}
    assert unheld["search"]["test"] == {"scored": 18, "seen": 0}
    assert unheld["search"]["retain"] == {"scored": 24, "seen": 12}
    assert unheld["search"]["forget_text"]["seen"] == 0
    everything = counts(train_pairs="all")
    assert everything["held_out"]["forget"] == {"scored": 18, "seen": 18}
    assert everything["held_out"]["retain"] == {"scored": 24, "seen": 12}
    assert counts("npo")["search"]["retain"] == {"scored": 24, "seen": 0}
    # However a question is typed, it is the same one.
    shouted = tuple(
        replace(
            p,
            questions=tuple(replace(q, text=f" {q.text.upper()}  ") for q in p.questions),
        )
        for p in session.people.forget
    )
    people = replace(session.people, forget=shouted)
    assert counts(people=people, train_pairs="all")["search"]["forget"]["seen"] == 18
    assert counts(people=people)["held_out"]["forget"]["seen"] == 0


def test_a_benchmark_without_a_question_left_to_train_on_is_an_input_error(session, request_config):
    left_out = {
        (pair.person_id, comparable(pair.question))
        for pairs in session.benchmark.training_pairs().values()
        for pair in pairs
    }
    trial = TrialConfig(train_tasks=("generation",))
    with pytest.raises(InputError, match=r"the 3 people is scored as held-out.*--train-pairs all"):
        training_samples(session.benchmark, session.people.forget, trial, True, 0, left_out)


def test_scores_hold_no_text_and_responses_are_kept_on_request_only(
    request_config, result, adapters, tmp_path
):
    texts = [q.text for p in Benchmark.open(request_config.data).forget(5) for q in p.questions]
    dumped = result.model_dump_json()
    assert not any(text in dumped for text in texts)
    assert not list(adapters.rglob("*responses*"))
    asked = request_config.model_copy(update={"log_responses": True})
    run_trial(TRIAL, asked, tmp_path / "0006", "0006")
    lines = (tmp_path / "0006.responses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {"question_id", "question", "answer", "response"} <= rows[0].keys()
    assert any(row["question"] in texts for row in rows)
    assert not list((tmp_path / "0006").glob("*responses*"))


def test_training_never_sees_unseen_or_held_out(session, request_config):
    benchmark = Benchmark.open(request_config.data)
    people = choose_people(benchmark, request_config)
    ids = {p.id for p in people.retain_pool}
    assert {p.id for p in people.retain_seen} <= ids
    assert not {p.id for p in people.retain_unseen} & ids
    assert not {p.id for p in people.forget} & ids
    assert not {p.id for p in people.few_shot} & {p.id for p in people.retain}
    assert {p.id for p in people.test} == {p.id for p in people.forget}
    every = TRIAL.model_copy(update={"train_tasks": ("generation", "cloze", "classification")})
    for members in (people.forget, people.retain_seen):
        samples = training_samples(
            benchmark,
            members,
            every,
            True,
            request_config.seed,
            held_out_of_training(people, request_config),
        )
        trained = {(s.query.id.split("/")[1], s.query.text.split("\n")[0]) for s in samples}
        for person in members:
            held_out = split_questions(person, "held_out", request_config.seed)
            assert not trained & {(person.id, q.text) for q in held_out}
            open_ones = [
                q
                for q in split_questions(person, "search", request_config.seed)
                if (q.task, q.form) == ("generation", "image")
            ]
            assert len(open_ones) == 6 and trained >= {(person.id, q.text) for q in open_ones}
        assert {s.task for s in samples} == {"generation", "cloze", "classification"}
    assert people == choose_people(benchmark, request_config)
    other = choose_people(benchmark, request_config.model_copy(update={"seed": 1}))
    assert {p.id for p in other.retain} != {p.id for p in people.retain}
    assert {p.id for p in other.forget} == {p.id for p in people.forget}


def test_celebrities_are_scored_where_the_data_has_them(session, request_config, tmp_path):
    """Plainly, on the held-out part: no trial is chosen by them, and no attack is on them."""
    benchmark = Benchmark.open(request_config.data)
    people = choose_people(benchmark, request_config)
    ids = {person.id for person in people.celebrities}
    assert len(ids) == request_config.retain_people
    assert ids < set(benchmark.person_ids("Retain_Set"))
    other = choose_people(benchmark, request_config.model_copy(update={"seed": 1}))
    assert {person.id for person in other.celebrities} != ids
    asked = sum(
        (q.task, q.form) == ("cloze", "image") for p in people.celebrities for q in p.questions
    )
    scores = session.scores_under("held_out")
    assert scores["celebrity_cloze"].n == asked  # all, and not the held-out half
    assert {"celebrity_rougeL", "celebrity_classification"} <= scores.keys()
    for without in (
        session.scores_under("search"),
        session.scores_under("held_out", reverse=True),
    ):
        assert not any("celebrity" in name for name in without)

    for name in ("absent", "empty"):
        folder = tmp_path / name
        folder.mkdir()
        for config in request_config.data.iterdir():
            if config.name != "Retain_Set":
                (folder / config.name).symlink_to(config)
        if name == "empty":
            (shard,) = (request_config.data / "Retain_Set").iterdir()
            (folder / "Retain_Set").mkdir()
            pq.write_table(pq.read_table(shard).slice(0, 0), folder / "Retain_Set" / shard.name)
        assert choose_people(Benchmark.open(folder), request_config).celebrities == ()
