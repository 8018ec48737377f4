"""What a study makes of its trials' ends, without a cluster: the driver's own part."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from studies.pareto_search import main
from vgid.cluster.losses import IN_A_ROW, RETRIES, Losses
from vgid.cluster.mailbox import Outcome
from vgid.command_line import exit_code
from vgid.config import StudyConfig, TrialConfig
from vgid.data.benchmark import Benchmark
from vgid.errors import InputError
from vgid.interrupts import StudyInterruptedError
from vgid.report.records import TrialRecord
from vgid.report.study_page import FIGURES
from vgid.results import Harvested, Score, TrialResult
from vgid.study.console import Standing, StudyConsole
from vgid.study.ending import Ending
from vgid.study.ledger import Ledger
from vgid.study.outcome import TABLES, shortfall
from vgid.study.plan import make_plan
from vgid.study.run import Study, base_unscored
from vgid.study.trials import Listener


class Told:
    """Stands for what a study tells of a trial: the search and the tracker; may fail."""

    def __init__(self, error=None):
        self.error = error
        self.trials = []
        self.again = []
        self.finished = []

    def try_again(self, name):
        self.again.append(name)

    def tell(self, record):
        if self.error is not None:
            raise self.error
        self.trials.append(record.trial_id)

    def log_trial(self, record):
        self.trials.append(record.trial_id)

    pages, server = {}, ""

    def finish_study(self, front, summary, status, tell):
        self.finished.append((status, list(summary["files"])))


class Running:
    """A study with one trial in flight; its search, tracker and mailbox are stood in for."""

    def __init__(self, study):
        self.study, self.ledger, self.ending = study, study.ledger, study.ending
        self.output = study.plan.config.output
        self.search, self.tracker, self.mailbox = Told(), Told(), Mock()
        self.losses = Losses()
        self.bulletin = study._bulletin
        self.bulletin._tracker = self.tracker
        study._tracker.set_result(self.tracker)
        self.listener = Listener(
            self.ledger,
            self.search,
            self.losses,
            self.bulletin,
            self.ending,
            self.mailbox,
            study._seconds,
        )
        self.ends = self.listener.on_end


@pytest.fixture
def study(tmp_path):
    """A study before its first step, with one trial in flight."""
    plan = make_plan(StudyConfig(output=tmp_path / "study", harvest=()))
    with Ledger(plan.config.output) as ledger:
        ledger.open(plan.config, plan.space.sha256, resume=False)
        with (tmp_path / "console").open("w") as stream:
            console = StudyConsole(stream, Standing(1))
            ledger.start("0000", TrialConfig())
            yield Study(plan, ledger, console, Ending(None))


@pytest.fixture
def run(study):
    """The same study while its trials run."""
    return Running(study)


def completed(name="0000", harvest=()):
    metrics = {"forget_rougeL_reduction": 0.9, "retain_rougeL": 0.8}
    result = TrialResult(trial_id=name, status="completed", metrics=metrics, harvest=harvest)
    return Outcome(job_id=name, result=result, slot=0)


def test_a_callback_that_fails_touches_no_trial_and_keeps_nobody_else_from_it(run, capsys):
    run.search.error = OSError("Fay Moss")
    run.ends("0000", completed(), None)
    run.ends("0000", None, None)  # what Tune makes of an error of its own
    run.bulletin.close()
    assert run.ledger.records["0000"].result == completed().result
    assert run.tracker.trials == ["0000"]
    assert (run.output / "trials.csv").exists()
    logged = capsys.readouterr().err
    assert "OSError" in logged and "in tell" in logged and "Fay Moss" not in logged
    assert run.ending.failure is None


def test_a_trial_whose_end_cannot_be_written_stays_in_flight_and_ends_the_study(run):
    place = run.ledger.folder / "0000.json"
    place.unlink()
    (place / "in-the-way").mkdir(parents=True)  # a folder cannot be replaced by a file
    run.ends("0000", completed(), None)
    assert [record.trial_id for record in run.ledger.in_flight] == ["0000"]
    assert "cannot be written" in run.ending.stopped
    assert run.search.trials == []


def test_only_the_first_end_of_a_trial_counts(run):
    run.ends("0000", completed(), None)
    before = (run.ledger.folder / "0000.json").read_bytes()
    with pytest.raises(ValueError, match="0000 has ended"):
        run.ledger.end("0000", TrialResult(trial_id="0000", status="failed"))
    assert (run.ledger.folder / "0000.json").read_bytes() == before
    assert run.ledger.records["0000"].result == completed().result


def lost(name, cause="its disk is full"):
    return Outcome(job_id=name, error=cause, lost=True)


def test_a_lost_trial_stays_in_flight_with_its_checkpoint_and_is_tried_again(run):
    checkpoint = run.ledger.checkpoints("0000") / "epoch"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    for attempt in range(RETRIES + 1):
        run.losses.begin("0000")
        # The trainable's own death is no fault of the trial's either.
        run.ends("0000", lost("0000") if attempt else None, None)
    assert run.search.again == ["0000"] * RETRIES
    run.mailbox.cancel.remote.assert_called_once_with("0000")  # no slot is at it for nobody
    assert [record.trial_id for record in run.ledger.in_flight] == ["0000"]
    assert checkpoint.exists()
    assert run.search.trials == []
    assert run.ending.stopped is None
    assert "lost: its disk is full" in (run.output.parent / "console").read_text()


def test_trials_lost_in_a_row_stop_the_study_and_stand_in_its_table_until_they_end(run):
    names = [f"{number:04d}" for number in range(IN_A_ROW)]
    for name in names:
        run.ledger.start(name, TrialConfig())
        run.losses.begin(name)
        assert not run.ending.is_over()
        run.ends(name, lost(name), None)
    assert run.ending.is_over()
    run.bulletin.still_lost(run.losses.causes, run.ledger.records)
    records = run.study.board.trials()
    assert run.study.board.counts() == {"completed": 0, "pruned": 0, "failed": 0, "lost": IN_A_ROW}
    assert run.study.board.front() == []
    said = "The study stopped: its disk is full; go on with --resume."
    assert shortfall(records, run.ending.stopped, {}) == said
    run.ends("0000", completed(), None)
    run.bulletin.close()
    assert run.tracker.trials == [*names, "0000"]
    assert [trial.result.status for trial in run.study.board.trials()] == [
        "completed",
        "lost",
        "lost",
    ]


def records(*statuses):
    return [
        TrialRecord(
            TrialConfig(),
            TrialResult(trial_id=f"{n:04d}", status=status, error=None if error == "" else error),
        )
        for n, (status, _, error) in enumerate(status.partition(":") for status in statuses)
    ]


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ((), None),
        (("completed", "failed:NaN", "pruned"), None),
        (("failed:NaN", "failed:odd", "failed:NaN"), "No trial completed, 3 of 3 failed: NaN; "),
        (("completed", "lost:its disk is full."), "Lost, 1 of 2 trials: its disk is full; "),
    ],
)
def test_a_study_says_what_it_has_not_and_exits_with_1(statuses, said, capsys):
    error = shortfall(records(*statuses), None, {})
    assert (error or "").startswith(said or "")
    assert (error is None) == (said is None)
    code = exit_code(lambda: {"interrupted": False, "error": error}, "interrupted")
    assert code == (0 if said is None else 1)
    assert capsys.readouterr().err == ("" if error is None else f"{error}\n")


def test_a_front_without_held_out_scores_is_told_of(capsys):
    error = shortfall(records("completed"), None, {"0000": "its adapter is gone."})
    assert error.endswith("such as 0000: its adapter is gone.")
    interrupted = exit_code(lambda: {"interrupted": True, "error": error}, "go on")
    assert (interrupted, capsys.readouterr().err) == (130, "go on\n")


def test_a_retry_without_a_study_to_resume_is_refused(capsys):
    assert main(["--retry-failed"]) == 2
    assert "--resume" in capsys.readouterr().err


def test_other_data_and_other_weights_are_refused_on_a_resume(study, monkeypatch):
    found = study._prepare().hashes
    header = study.ledger.header
    assert (header.data_sha256, header.base_revision) == (found["dataset"], found["base"])

    def resumed():
        ledger = study.ledger
        ledger.resume(study.plan.config, study.plan.space.sha256)
        return Study(study.plan, ledger, study.console, Ending(None))

    resumed()._prepare()  # the same again
    shard = next((study.plan.config.output / "data").glob("Test_Set/*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    again = resumed()
    with again._prepared_aside():
        for made in (again._material, again._tracker):  # nothing is recorded of what is refused
            with pytest.raises(InputError, match=r"started with data [0-9a-f]{12} and cannot go"):
                made.result()
    shard.write_bytes(content)
    monkeypatch.setattr("vgid.models.backbones.revision_of", lambda folder: "0" * 64)
    with pytest.raises(InputError, match=r"weights of the base .* restore the files of the model"):
        resumed()._prepare()


@pytest.mark.parametrize(
    ("error", "gpus", "says"),
    [
        ("OutOfMemoryError at decoding.py:74", True, "--max-concurrent, give each worker a whole"),
        ("lost its worker 3 times", False, "lower --eval-batch-size or --max-concurrent"),
        ("RuntimeError at fake.py:74", False, "study.log has its traceback"),
    ],
)
def test_a_base_that_cannot_be_scored_is_a_sentence_with_its_remedy(error, gpus, says):
    sentence = base_unscored(error, Path("study.log"), gpus)
    assert sentence.startswith(f"the base model could not be scored ({error}); ")
    assert says in sentence


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (
            {"content": {"precision": "bfloat16"}},
            "the study was started with precision float32 and cannot go on with bfloat16; give the",
        ),
        (
            {"error": "RuntimeError at fake.py:74", "trace": "the way there"},
            "The study stopped: the base model could not be scored (RuntimeError at fake.py:74); ",
        ),
    ],
)
def test_a_base_that_a_study_cannot_go_on_from_ends_it(study, monkeypatch, capsys, outcome, said):
    study.ledger.settle(precision="float32")
    monkeypatch.setattr("ray.get", lambda asked: None)
    monkeypatch.setattr(
        "vgid.study.run.outcome_of", lambda _, job, *over: Outcome(job_id=job.id, **outcome)
    )
    study._material.set_result(None)
    study.score_base(Mock()).result()
    assert said in study.ending.failure
    assert not study.board.base
    assert ("the way there" in capsys.readouterr().err) == ("trace" in outcome)


def test_what_the_base_s_scores_lack_is_said_before_the_first_trial(study, monkeypatch):
    known, half = (Score(value=v, n=9, low=v, high=v) for v in (0.2, 0.5))
    scores = {"forget_rougeL": known, "retain_rougeL": known, "retain_cloze_shots": half}
    content = {"precision": "float32"}
    monkeypatch.setattr("ray.get", lambda asked: None)
    monkeypatch.setattr(
        "vgid.study.run.outcome_of",
        lambda _, job, *over: Outcome(job_id=job.id, scores=scores, content=content),
    )
    study._material.set_result(None)
    study.score_base(Mock()).result()
    study.console._console.file.flush()
    text = (study.plan.config.output.parent / "console").read_text()
    assert "Warning: The base may never have known the forget people" in text
    assert "Warning: The context does not hold all few-shot turns; shown was at least" in text


def test_ray_that_does_not_start_is_one_sentence_each_time(tmp_path, monkeypatch, capsys):
    def late(**settings):
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", late)
    for _ in range(2):
        assert main(["--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("ray: a local Ray cluster did not start (The current node timed out")
        assert "Give the same command again" in said and said.count("\n") == 1
        assert (tmp_path / "out" / "study.log").exists()


def test_a_table_that_cannot_be_written_stops_the_study_and_is_no_bad_input(run):
    (run.output / "trials.csv" / "in-the-way").mkdir(parents=True)
    run.ends("0000", completed(), None)
    run.bulletin.close()
    assert run.ledger.records["0000"].result == completed().result
    assert "trials.csv: cannot be written" in run.ending.stopped
    assert run.ending.failure is None


def test_a_study_without_a_slot_stops_and_has_no_bad_input(run):
    gone = Outcome(job_id="0000", error="every slot is gone.", fatal=True, lost=True)
    run.ends("0000", gone, None)
    assert (run.ending.stopped, run.ending.failure) == ("every slot is gone.", None)
    assert run.search.again == []
    assert [record.trial_id for record in run.ledger.in_flight] == ["0000"]


@pytest.fixture
def scored(run, monkeypatch):
    """The same study at its end: its trial completed, its base scored; figures cost nothing."""
    run.ends("0000", completed(), None)
    run.bulletin.close()
    names = ("forget_rougeL", "retain_rougeL")
    run.study.board.base["search"] = {n: Score(value=0.9, n=1, low=0.9, high=0.9) for n in names}

    def draw(folder, front):
        time.sleep(0.3)

    monkeypatch.setattr("vgid.study.run.write_figures", draw)
    monkeypatch.setattr("vgid.interrupts.GRACE_S", 1.0)
    return run


def on_disk(run):
    return json.loads((run.output / "study.json").read_text())


def test_a_signal_while_the_outcome_is_written_does_not_make_a_whole_study_interrupted(scored):
    with scored.ending.interrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        summary = scored.study.write()
        assert scored.ending.interrupt.came
    assert not summary["interrupted"]
    assert summary["files"] == [*TABLES, *FIGURES]
    assert scored.tracker.finished == [("FINISHED", [*TABLES, *FIGURES])]
    assert on_disk(scored)["interrupted"] is False
    assert exit_code(lambda: summary, "") == 0


def test_what_was_left_out_of_the_data_is_counted_in_study_json(scored):
    benchmark = Benchmark(Path(), dropped={"forget_5": {"one", "another", 3}})
    scored.study.plan = replace(scored.study.plan, benchmark=benchmark)
    scored.study.write()
    assert on_disk(scored)["left_out"] == {"forget_5": {"questions": 2, "people": 1}}


@pytest.mark.parametrize("hanging", ["figures", "mlflow"])
def test_what_a_signal_leaves_no_time_for_is_missing_and_said(scored, monkeypatch, hanging):
    over = threading.Event()

    def hang(*arguments):
        over.wait(60)

    if hanging == "figures":
        monkeypatch.setattr("vgid.study.run.write_figures", hang)
    else:
        scored.tracker.finish_study = hang
    began = time.monotonic()
    with scored.ending.interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        summary = scored.study.write()
    assert time.monotonic() - began < 30
    over.set()
    assert summary["interrupted"]
    found = on_disk(scored)
    assert found["interrupted"] is True
    assert found["files"] == [*TABLES, *(FIGURES if hanging == "mlflow" else ())]
    assert (scored.output / "front.csv").read_text().count("\n") == 2
    assert exit_code(lambda: summary, "") == 130


def test_study_json_and_tables_are_there_before_anything_is_analysed(scored, monkeypatch):
    seen = []

    def look(folder, front):
        seen.extend(sorted(path.name for path in folder.iterdir() if path.is_file()))
        raise InputError("no space")

    monkeypatch.setattr("vgid.study.run.write_figures", look)
    with pytest.raises(InputError):
        scored.study.write()
    assert set(TABLES) <= set(seen)


MILD = Harvested(scale=0.9, metrics={"forget_rougeL_reduction": 0.8, "retain_rougeL": 0.9})


def test_what_was_harvested_of_an_adapter_that_is_lost_is_missing_as_well(study):
    trial, mild = study.ledger.adapter("0000"), study.ledger.adapter("0000x0.9")
    assert study._adapter("0000x0.9") == mild and not mild.exists()
    trial.mkdir(parents=True)
    (trial / "adapter_model.safetensors").write_bytes(b"weights")
    for damaged in ("", "{}"):
        (trial / "adapter_config.json").write_text(damaged)
        assert study._adapter("0000x0.9") == mild and not mild.exists()
    (trial / "adapter_config.json").write_text('{"lora_alpha": 32, "r": 16}')
    study._adapter("0000x0.9")
    assert json.loads((mild / "adapter_config.json").read_text()) == {"lora_alpha": 28.8, "r": 16}
    assert (mild / "adapter_model.safetensors").read_bytes() == b"weights"
    assert {path.name for path in trial.parent.iterdir()} == {"0000", "0000x0.9"}


def test_a_candidate_that_cannot_be_written_stops_the_study(run):
    run.ends("0000", completed(harvest=(MILD,)), None)
    run.bulletin.close()
    assert [c.result.trial_id for c in run.study.board.front()] == ["0000", "0000x0.9"]
    (run.output / "adapters").write_text("in the way")
    run.study.score_front(SimpleNamespace(mailbox=None))  # asks no slot
    assert "adapters" in run.ending.stopped


def test_the_front_is_not_scored_on_after_a_signal(scored, monkeypatch):
    """The mailbox's answer never comes; Ray's own waiting is stood in for."""

    class Mailbox:
        submit = next_message = SimpleNamespace(remote=lambda *_: None)

    fake = SimpleNamespace(get=lambda ref: None, wait=lambda refs, timeout: ([], refs))
    monkeypatch.setitem(sys.modules, "ray", fake)
    with scored.ending.interrupt:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(StudyInterruptedError):
            scored.study.score_front(SimpleNamespace(mailbox=Mailbox))
    assert scored.study.board.held_out == {}
