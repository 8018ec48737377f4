"""A study on MLflow, read back with MLflow's own client from a real SQLite store."""

import os
import signal
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.browser.servers import mlflow_process
from tests.end_to_end.conftest import free_port
from vgid.config import StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.report.front import Front
from vgid.report.note import NOTE_PICTURE, UI, Place, study_note
from vgid.report.records import TrialRecord, TrialsTable, write_front, write_study
from vgid.report.result import recommended
from vgid.report.study_page import FIGURES, write_figures
from vgid.results import EpochReport, Score, TrialResult
from vgid.study.ledger import Ledger, Record, now
from vgid.study.mlflow_client import connect
from vgid.study.tracking import Tracker

SHA = "0" * 64
HASHES = {"dataset": "d" * 64, "base": "b" * 64}
BASE = {
    "forget_rougeL": Score(value=0.95, n=60, low=0.9, high=1.0),
    "retain_rougeL": Score(value=0.97, n=300, low=0.95, high=0.98),
}
SUMMARY = {  # of study.json, what MLflow is told
    "hypervolume": 0.41,
    "wall_s": 9.0,
    "phases": {},
    "counts": {"completed": 2, "failed": 1},
    "store": {"hit_rate_after_first_trial": 0.75, "bytes": 12},
    "output": Path(),
    "files": (),
    "trained_verbatim": {},
    "left_out": {},
}
PLACE = Place("1", "s", "r")
HELD_OUT = {
    "forget_rougeL": Score(value=0.05, n=50, low=0.02, high=0.08),
    "forget_rougeL_reduction": Score(value=0.9, n=50, low=0.84, high=0.94),
    "retain_rougeL": Score(value=0.94, n=290, low=0.93, high=0.96),
    "forget_cloze": Score(value=0.25, n=20, low=0.1, high=0.4),
}
EPOCHS = [
    EpochReport(epoch=e, epochs=2, step=6 * e, metrics={"loss": 1.0 / e, "forget_loss": 0.5 / e})
    for e in (1, 2)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store made as the study makes it: by default URI, in a thread."""
    output = tmp_path_factory.mktemp("study")
    thread = threading.Thread(target=lambda: connect(None, output, "tiny-llava"))
    thread.start()
    thread.join()
    return output


@pytest.fixture
def output(store, tmp_path):
    """The output folder of a test's own study, which shares the store's database."""
    return tmp_path


def flat(value):
    return Score(value=value, n=10, low=value, high=value)


def opened(store, backbone):
    return connect(f"sqlite:///{store / 'mlflow.db'}", store, backbone)


def client(store):
    return MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


def make_records(output):
    configs = [
        TrialConfig(),
        TrialConfig(noise_type="gaussian", sigma=0.1 + 0.2, alpha=1 / 3, beta=5.0),
        TrialConfig(method="npo", preference_beta=1 / 7),
        TrialConfig(prompt_style="polite", learning_rate=3e-4),
    ]
    records = []
    for number, (config, status) in enumerate(
        zip(configs, ["completed", "completed", "failed", "pruned"], strict=True)
    ):
        trial_id = f"{number:04d}"
        adapter = None
        metrics = {}
        if status == "completed":
            adapter = output / "adapters" / trial_id
            adapter.mkdir(parents=True)
            (adapter / "adapter_config.json").write_text("{}")
            (adapter / "adapter_model.safetensors").write_bytes(bytes([number]) * 100)
            metrics = {
                "forget_rougeL": 0.05 + number / 10,
                "forget_rougeL_reduction": 0.9 - number / 10,
                "retain_rougeL": 0.93 + number / 100,
            }
        result = TrialResult(
            trial_id=trial_id,
            status=status,
            metrics=metrics,
            seconds={"train": 2.0, "evaluate": 1.0},
            adapter=adapter,
            error="the loss is not a number" if status == "failed" else None,
        )
        on_front = status == "completed"
        records.append(TrialRecord(config, result, on_front, HELD_OUT if on_front else None))
    return records


@contextmanager
def ledger_of(output):
    """The ledger of a study, begun or gone on with."""
    config = StudyConfig(output=output, data=output / "data", trials=4)
    with Ledger(output / "study") as ledger:
        ledger.open(config, SHA, resume=(ledger.folder / "study.json").exists())
        yield ledger


def run_study(connection, output, study_id, records):
    """A whole study; its tracker."""
    with ledger_of(output) as ledger:
        tracker = Tracker(connection, study_id, ledger.header.config, HASHES)
        for record in records:
            name = record.result.trial_id
            tracker.log_trial(ledger.start(name, record.config))
            for report in EPOCHS:
                tracker.log_trial(ledger.epoch(name, report))
            assert tracker.log_trial(end(ledger, record.result))
    front = Front("tiny-llava", records, BASE, BASE, tracker.pages, tracker.server)
    TrialsTable(output / "trials.csv").write(records)
    write_front(output / "front.csv", records)
    write_study(output / "study.json", {"seed": 0})
    write_figures(output, front)
    names = (*FIGURES, "front.csv", "trials.csv", "study.json")
    phases = {"train": {"total_s": 8.0}}
    told = {"left_out": {"forget_5": {"questions": 2, "people": 0}}}
    told |= {"output": output, "files": names, "phases": phases}
    tracker.finish_study(front, SUMMARY | told)
    return tracker


def end(ledger, result):
    """The record of a trial that has ended, now or before."""
    record = ledger.records[result.trial_id]
    return record if record.result is not None else ledger.end(result.trial_id, result)


def ended(record):
    """The record of a trial that ended at once, without a ledger."""
    name, config = record.result.trial_id, record.config
    return Record(trial_id=name, config=config, started=now(), ended=now(), result=record.result)


def children_of(mlflow, tracker):
    runs = mlflow.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.study_run_id}'"
    )
    return {run.data.tags["vgid.trial_id"]: run for run in runs}


def artifacts(mlflow, run_id, folder=None):
    return {entry.path for entry in mlflow.list_artifacts(run_id, folder)}


def history(mlflow, run_id, name):
    return [(m.step, m.value) for m in mlflow.get_metric_history(run_id, name)]


def test_a_study_reads_back_whole(store, output, monkeypatch):
    working_folder = output / "elsewhere"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)
    records = make_records(output)
    tracker = run_study(opened(store, "tiny-llava"), output, "study-one", records)
    mlflow = client(store)

    assert mlflow.get_experiment_by_name("tiny-llava").experiment_id == tracker.experiment_id
    parent = mlflow.get_run(tracker.study_run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["vgid.study_id"] == "study-one"
    assert parent.data.tags["vgid.dataset_hash"] == HASHES["dataset"]
    assert parent.data.tags["vgid.base_hash"] == HASHES["base"]
    assert parent.data.params["trials"] == "4"
    assert parent.data.metrics["hypervolume"] == 0.41
    assert parent.data.metrics["trials_failed"] == 1
    assert parent.data.metrics["store_hit_rate"] == 0.75
    assert parent.data.metrics["base_retain_rougeL"] == 0.97
    assert parent.data.metrics["seconds/train"] == 8.0
    (dataset,) = parent.inputs.dataset_inputs
    assert dataset.dataset.digest == "d" * 12
    assert artifacts(mlflow, tracker.study_run_id) == {
        *FIGURES,
        "front.csv",
        "trials.csv",
        "study.json",
        NOTE_PICTURE,
    }

    children = children_of(mlflow, tracker)
    assert sorted(children) == ["0000", "0001", "0002", "0003"]
    assert [children[key].info.status for key in sorted(children)] == [
        "FINISHED",
        "FINISHED",
        "FAILED",
        "KILLED",
    ]
    for record in records:
        run = children[record.result.trial_id]
        assert run.data.params["train_tasks"] == "generation+cloze"
        read = {**run.data.params, "train_tasks": record.config.train_tasks}
        assert TrialConfig(**read) == record.config
        for name, value in record.result.metrics.items():
            assert run.data.metrics[name] == value
        assert history(mlflow, run.info.run_id, "loss") == [(6, 1.0), (12, 0.5)]
        assert run.data.tags["vgid.base_hash"] == HASHES["base"]
        assert run.data.tags["vgid.status"] == record.result.status
    gaussian = children["0001"]
    assert gaussian.info.run_name == "0001 · Gaussian-noise σ0.3 · strict · α0.33 β5 · lr 1e-3"
    assert gaussian.data.tags["vgid.on_front"] == "true"
    assert gaussian.data.metrics["heldout_forget_rougeL_reduction"] == 0.9
    assert gaussian.data.metrics["heldout_forget_cloze"] == 0.25
    assert gaussian.data.metrics["heldout_retain_rougeL_low"] == 0.93
    assert children["0002"].data.tags["vgid.error"] == "the loss is not a number"
    assert artifacts(mlflow, gaussian.info.run_id, "adapter") == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert artifacts(mlflow, children["0003"].info.run_id) == set()

    note = parent.data.tags["mlflow.note.content"]
    assert f"get-artifact?path={NOTE_PICTURE}&run_uuid={tracker.study_run_id}" in note
    assert "2 questions and 0 people of forget_5" in note
    pages = tracker.pages
    assert (
        pages["0001"] == f"#/experiments/{tracker.experiment_id}/runs/{gaussian.info.run_id}?{UI}"
    )
    assert f"| [0001]({pages['0001']}) |" in note
    assert "0.940 [0.930, 0.960]" in note
    assert tracker.study_run_id in tracker.ui_command
    assert str(store / "mlflow.db") in tracker.ui_command
    assert list(working_folder.iterdir()) == []


def test_a_resumed_study_doubles_nothing(store, output):
    records = make_records(output)
    first = run_study(opened(store, "resumed"), output, "study-two", records[:2])
    second = run_study(opened(store, "resumed"), output, "study-two", records)
    run_study(opened(store, "resumed"), output, "study-two", records)

    assert second.study_run_id == first.study_run_id
    mlflow = client(store)
    assert len(mlflow.search_runs([first.experiment_id])) == 5
    children = children_of(mlflow, first)
    assert sorted(children) == ["0000", "0001", "0002", "0003"]
    for key, run in children.items():
        assert history(mlflow, run.info.run_id, "loss") == [(6, 1.0), (12, 0.5)], key
    once = ("retain_rougeL", "seconds/train", "heldout_retain_rougeL")
    for name in once:
        assert len(history(mlflow, children["0001"].info.run_id, name)) == 1, name
    assert mlflow.get_run(first.study_run_id).info.status == "FINISHED"


def curve(mlflow, tracker, ledger):
    """Steps, values and times of a lone trial's loss, on MLflow and in the ledger."""
    (run,) = children_of(mlflow, tracker).values()
    there = mlflow.get_metric_history(run.info.run_id, "loss")
    (record,) = ledger.records.values()
    known = [(e.report.step, e.report.metrics["loss"], to_ms(e.at)) for e in record.epochs]
    return [(m.step, m.value, m.timestamp) for m in there], known


def to_ms(iso):
    return round(datetime.fromisoformat(iso).timestamp() * 1000)


@pytest.mark.parametrize("flush_s", [0.0, 60.0])
@pytest.mark.parametrize("heard", [0, 1, 2], ids=lambda n: f"{n} epochs")
@pytest.mark.parametrize("cut", ["in flight", "recorded"])
def test_a_trial_cut_short_has_its_whole_curve(store, output, monkeypatch, flush_s, heard, cut):
    """Killed in flight, or after the ledger had the result and MLflow had not."""
    monkeypatch.setattr("vgid.study.tracking.FLUSH_SECONDS", flush_s)
    record = make_records(output)[0]
    name = f"cut short {flush_s} {heard} {cut}"
    with ledger_of(output) as ledger:
        first = Tracker(opened(store, name), name, ledger.header.config, HASHES)
        first.log_trial(ledger.start("0000", record.config))
        for report in EPOCHS[:heard]:
            first.log_trial(ledger.epoch("0000", report))
        if cut == "recorded":
            for report in EPOCHS[heard:]:
                ledger.epoch("0000", report)
            ledger.end("0000", record.result)

    with ledger_of(output) as ledger:
        second = Tracker(opened(store, name), name, ledger.header.config, HASHES)
        second.log_trial(ledger.records["0000"])
        for report in EPOCHS:  # a trial in flight starts over
            second.log_trial(ledger.epoch("0000", report))
        assert second.log_trial(end(ledger, record.result))
        there, known = curve(client(store), second, ledger)

    assert there == known
    assert [(step, value) for step, value, _ in there] == [(6, 1.0), (12, 0.5)]
    mlflow = client(store)
    (run,) = children_of(mlflow, second).values()
    assert float(run.data.params["alpha"]) == record.config.alpha
    assert run.info.status == "FINISHED"
    assert mlflow.get_run(second.study_run_id).info.status == "RUNNING"


def test_a_study_is_found_by_the_one_that_it_started_from(store, output):
    with ledger_of(output) as ledger:
        config, name = ledger.header.config, "warm"
        tracker = Tracker(opened(store, name), name, config, HASHES, prior="an-earlier-study")
        tracker.log_trial(ledger.start("0000", make_records(output)[0].config))
        mlflow = client(store)
        query = "tags.`vgid.warm_start` = 'an-earlier-study'"
        (found,) = mlflow.search_runs([tracker.experiment_id], query)  # no run of a trial
        assert found.info.run_id == tracker.study_run_id
        tracker.close("KILLED")


def test_what_is_sent_twice_is_there_once(store, output):
    """The server did what it was asked to, and its answer was lost."""
    record = make_records(output)[0]
    with ledger_of(output) as ledger:
        tracker = Tracker(opened(store, "twice"), "twice", ledger.header.config, HASHES)
        tracker.log_trial(ledger.start("0000", record.config))
        for report in EPOCHS:
            ledger.epoch("0000", report)
        log_batch = tracker._client.log_batch

        def no_answer(*arguments, **options):
            log_batch(*arguments, **options)
            tracker._client.log_batch = log_batch
            raise OSError("timed out")

        tracker._client.log_batch = no_answer
        assert not tracker.log_trial(ledger.end("0000", record.result))
        tracker._silent_until = 0.0
        assert tracker.log_trial(ledger.records["0000"])
        there, known = curve(client(store), tracker, ledger)
    assert there == known
    (run,) = children_of(client(store), tracker).values()
    assert len(history(client(store), run.info.run_id, "retain_rougeL")) == 1


def statuses(mlflow, tracker):
    children = children_of(mlflow, tracker)
    parent = mlflow.get_run(tracker.study_run_id).info.status
    return parent, {name: run.info.status for name, run in sorted(children.items())}


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_a_study_that_ends_early_leaves_nothing_running_and_goes_on(store, output, status):
    records = make_records(output)
    with ledger_of(output) as ledger:
        for number in range(4):
            ledger.start(f"{number:04d}", records[number].config)
        first = Tracker(opened(store, "early"), f"early {status}", ledger.header.config, HASHES)
        for record in ledger.records.values():
            first.log_trial(record)
        assert first.log_trial(end(ledger, records[0].result))
        assert first.log_trial(end(ledger, records[3].result))
        first.close(status)
        early = statuses(client(store), first)

        second = Tracker(opened(store, "early"), f"early {status}", ledger.header.config, HASHES)
        for record in ledger.records.values():
            assert second.log_trial(record)
        again = statuses(client(store), second)
        for record in records[1:3]:
            assert second.log_trial(end(ledger, record.result))
    second.finish_study(Front("t", records, BASE), SUMMARY)
    second.close("FAILED")  # as every path does; it has ended

    ended = {"0000": "FINISHED", "0003": "KILLED"}
    assert early == (status, ended | {"0001": "KILLED", "0002": "KILLED"})
    assert again == ("RUNNING", ended | {"0001": "RUNNING", "0002": "RUNNING"})
    assert statuses(client(store), second) == (
        "FINISHED",
        ended | {"0001": "FINISHED", "0002": "FAILED"},
    )


def test_artifacts_that_cannot_be_kept_are_told_before_the_first_trial(store, output):
    """Where they go to Google's storage, the client's own library is missing."""
    client(store).create_experiment("bucket", "gs://nobody:secret@bucket/artifacts")
    connection = opened(store, "bucket")
    with pytest.raises(
        InputError, match=r"artifacts cannot be kept at gs://bucket/.*google"
    ) as told:
        Tracker(connection, "bucket", StudyConfig(output=output), HASHES)
    assert "secret" not in str(told.value)
    (run,) = client(store).search_runs([connection.experiment_id])
    assert run.info.status == "FAILED"


def test_whatever_a_store_raises_is_told_at_the_end(store, output, monkeypatch):
    """One trial's adapter finds no place: all else is recorded, and a resume sends it."""
    records = make_records(output)
    tracker = Tracker(opened(store, "refused"), "refused", StudyConfig(output=output), HASHES)
    monkeypatch.setattr("vgid.study.tracking.RETRY_SECONDS", 0.0)
    log_artifacts = tracker._client.log_artifacts

    def refuse(run_id, folder, *more):
        if folder.endswith("0000"):
            raise ImportError("No module named 'boto3'")
        log_artifacts(run_id, folder, *more)

    tracker._client.log_artifacts = refuse
    assert [tracker.log_trial(ended(record)) for record in records] == [False, True, True, True]
    with pytest.raises(InputError, match=r"'boto3'; 1 trials are missing.*--resume"):
        tracker.finish_study(Front("t", records, BASE), SUMMARY | {"hypervolume": 0.5})
    kept = {"0001": "FINISHED", "0002": "FAILED", "0003": "KILLED"}
    assert statuses(client(store), tracker) == ("FINISHED", {"0000": "KILLED"} | kept)
    assert client(store).get_run(tracker.study_run_id).data.metrics["hypervolume"] == 0.5

    again = Tracker(opened(store, "refused"), "refused", StudyConfig(output=output), HASHES)
    assert all(again.log_trial(ended(record)) for record in records)
    again.finish_study(Front("t", records, BASE), SUMMARY)
    assert statuses(client(store), again) == ("FINISHED", {"0000": "FINISHED"} | kept)
    run = children_of(client(store), again)["0000"]
    assert artifacts(client(store), run.info.run_id, "adapter")


def test_a_server_that_is_away_costs_a_delay_only(output, monkeypatch):
    """Stopped, it does later what was asked of it meanwhile; killed, it forgets."""
    for name, value in (("TIMEOUT", "1"), ("MAX_RETRIES", "1"), ("BACKOFF_FACTOR", "0")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    monkeypatch.setattr("vgid.study.mlflow_client.PROBE_SECONDS", 1.0)
    monkeypatch.setattr("vgid.study.tracking.RETRY_SECONDS", 0.0)
    monkeypatch.setattr("vgid.study.tracking.FLUSH_SECONDS", 0.0)
    records = make_records(output)
    uri, port, told = f"sqlite:///{output / 'mlflow.db'}", free_port(), []
    with ExitStack() as stack, ledger_of(output) as ledger:
        server = stack.enter_context(mlflow_process(uri, output, port))
        connection = connect(f"http://127.0.0.1:{port}", output, "tiny-llava")
        tracker = Tracker(connection, "away", ledger.header.config, HASHES)
        assert tracker.log_trial(ledger.start("0000", records[0].config))

        os.killpg(server.pid, signal.SIGSTOP)
        assert not tracker.log_trial(ledger.start("0001", records[1].config))
        assert not tracker.log_trial(ledger.epoch("0000", EPOCHS[0]))
        os.killpg(server.pid, signal.SIGCONT)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        assert tracker.log_trial(ledger.epoch("0001", EPOCHS[0]))

        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for name, record in zip(("0000", "0001"), records, strict=False):
            assert not tracker.log_trial(ledger.epoch(name, EPOCHS[1]))
            assert not tracker.log_trial(ledger.end(name, record.result))
        front = Front("t", records[:2], BASE)
        with pytest.raises(InputError, match=r"2 trials are missing.*--resume"):
            tracker.finish_study(front, SUMMARY, "KILLED")
        tracker.close("KILLED")
        monkeypatch.setattr("vgid.study.tracking.RETRY_SECONDS", 0.2)
        with ThreadPoolExecutor(1) as side:
            back = side.submit(stack.enter_context, mlflow_process(uri, output, port))
            tracker.finish_study(front, SUMMARY, tell=told.append)
            back.result()
        known = {
            name: [(e.report.step, e.report.metrics["loss"], to_ms(e.at)) for e in record.epochs]
            for name, record in ledger.records.items()
        }
    assert len(told) == 1 and "does not answer" in told[0]
    mlflow = MlflowClient(uri)
    children = mlflow.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.study_run_id}'"
    )
    assert sorted(run.data.tags["vgid.trial_id"] for run in children) == ["0000", "0001"]
    assert statuses(mlflow, tracker) == ("FINISHED", {"0000": "FINISHED", "0001": "FINISHED"})
    for run in children:
        losses = mlflow.get_metric_history(run.info.run_id, "loss")
        there = [(m.step, m.value, m.timestamp) for m in losses]
        assert there == known[run.data.tags["vgid.trial_id"]]
        assert len(history(mlflow, run.info.run_id, "retain_rougeL")) == 1


def test_a_study_cut_short_before_its_parameters_gets_them(store, output, monkeypatch):
    config = StudyConfig(output=output, seed=3)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vgid.study.tracking.Tracker._log_dataset", killed)
        Tracker(opened(store, "cut-shorter"), "study-cut", config, HASHES)
    second = Tracker(opened(store, "cut-shorter"), "study-cut", config, HASHES)
    more = config.model_copy(update={"trials": 99})  # another number is no conflict
    third = Tracker(opened(store, "cut-shorter"), "study-cut", more, HASHES)
    assert third.study_run_id == second.study_run_id
    run = client(store).get_run(second.study_run_id)
    assert run.data.params["seed"] == "3" and run.data.params["trials"] != "99"
    assert len(run.inputs.dataset_inputs) == 1


def test_more_metrics_than_one_request_holds_are_all_recorded(store, output):
    record = make_records(output)[0]
    many = {f"metric_{i}": float(i) for i in range(1700)}
    tracker = Tracker(opened(store, "many"), "study-many", StudyConfig(output=output), HASHES)
    result = record.result.model_copy(update={"metrics": many})
    assert tracker.log_trial(ended(replace(record, result=result)))
    (run,) = children_of(client(store), tracker).values()
    assert {name: run.data.metrics[name] for name in many} == many


def test_a_trial_that_left_the_front_loses_its_mark(store, output):
    records = make_records(output)
    run_study(opened(store, "left"), output, "study-four", records)
    demoted = TrialRecord(records[0].config, records[0].result)
    tracker = run_study(opened(store, "left"), output, "study-four", [demoted, *records[1:]])
    children = children_of(client(store), tracker)
    assert children["0000"].data.tags["vgid.on_front"] == "false"
    assert children["0001"].data.tags["vgid.on_front"] == "true"


@pytest.mark.parametrize(("status", "shown"), [("failed", "FAILED"), ("lost", "KILLED")])
def test_a_trial_in_flight_again_goes_on_in_its_run(store, output, status, shown):
    record = make_records(output)[0]
    tried = replace(
        record, result=TrialResult(trial_id="0000", status=status, error="its disk is full")
    )

    def kept(record):
        tracker = Tracker(
            opened(store, "again"), f"study-{status}", StudyConfig(output=output), HASHES
        )
        assert tracker.log_trial(record)
        (run,) = children_of(client(store), tracker).values()
        return run.info.run_id, run.info.status, run.data.tags.get("vgid.error")

    run_id, *ending = kept(ended(tried))
    assert ending == [shown, "its disk is full"]
    in_flight = ended(tried).model_copy(update={"result": None, "ended": None})
    assert kept(in_flight) == (run_id, "RUNNING", None)
    assert kept(ended(record)) == (run_id, "FINISHED", None)
    assert kept(ended(record)) == (run_id, "FINISHED", None)


def test_trials_that_could_not_be_sent_are_sent_at_the_end(store, output, caplog):
    records = make_records(output)
    tracker = Tracker(opened(store, "outage"), "study-five", StudyConfig(output=output), HASHES)
    assert tracker.log_trial(ended(records[0]))
    database = sqlite3.connect(store / "mlflow.db")
    database.execute("ALTER TABLE runs RENAME TO runs_away")
    with caplog.at_level("WARNING", logger="vgid.study.tracking"):
        assert not tracker.log_trial(ended(records[1]))
        assert not tracker.log_trial(ended(records[2]))
    front = Front("tiny-llava", records, BASE)
    with pytest.raises(InputError, match="run the same command with --resume"):
        tracker.finish_study(front, SUMMARY)
    database.execute("ALTER TABLE runs_away RENAME TO runs")
    database.close()
    assert caplog.text.count("does not record") == 1  # the server is not asked again at once

    tracker.finish_study(front, SUMMARY)
    assert sorted(children_of(client(store), tracker)) == ["0000", "0001", "0002"]


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9",
        "http://user:secret@127.0.0.1:9",
        "http://[bad",
        "nonsense://somewhere",
        "sqlite:////proc/nowhere/mlflow.db",
        "mysql://root@127.0.0.1:9/mlflow",
    ],
)
def test_an_address_that_does_not_work_gets_one_sentence(tmp_path, uri):
    with pytest.raises(InputError) as caught:
        connect(uri, tmp_path, "tiny-llava")
    message = str(caught.value)
    assert "--tracking-uri" in message
    assert "secret" not in message
    assert "\n" not in message
    assert message.endswith(".")


def test_a_deleted_experiment_gets_one_sentence(store):
    client(store).delete_experiment(opened(store, "deleted").experiment_id)
    with pytest.raises(InputError, match="restore it with"):
        opened(store, "deleted")


def test_credentials_are_not_recorded(store, output):
    secret = "http://user:secret@example.org"
    tracker = Tracker(
        opened(store, "secret"), "s", StudyConfig(output=output, tracking_uri=secret), HASHES
    )
    run = client(store).get_run(tracker.study_run_id)
    assert "secret" not in str(run.data.params) + str(run.data.tags)


def test_the_note_quotes_held_out_scores_of_the_gentlest_good_trial(tmp_path):
    records = make_records(tmp_path)
    front = Front("tiny-llava", records, BASE, BASE)
    # 0000 forgets more and keeps 0.93 of 0.97, less than the paper's drop of 0.055.
    assert recommended(front).result.trial_id == "0000"
    note = study_note(front, {"train": 8.04}, PLACE)
    assert "removes 95% of the forget people's ROUGE-L (0.950 to 0.050) on held-out" in note
    assert (
        "![All trials, the front, the base model](get-artifact?path=front-small.png&run_uuid=r)"
        in note
    )
    assert "train 8.0 s" in note
    assert "celebrities" not in note  # the data has none
    raw = {"forget_rougeL_raw": 0.2, "retain_refusal": 0.01, "retain_refusal_raw": 0.21}
    raw["celebrity_rougeL"] = 0.875
    scored = [
        replace(r, held_out=r.held_out and r.held_out | {k: flat(v) for k, v in raw.items()})
        for r in records
    ]
    counts = {"scored": 30, "seen": 7}
    verbatim = {"search": {"forget": counts}, "held_out": {"forget": counts, "retain_text": counts}}
    note = study_note(Front("t", scored, BASE, BASE), {}, PLACE, verbatim)
    assert "ROUGE-L without answer instructions is 0.200" in note
    assert "celebrities" in note and "0.875 [0.875, 0.875]" in note
    assert "(1.0% of their questions refused, 21.0% without answer instructions)" in note
    assert (
        "trained on word for word: of the search ones forget 7 of 30; "
        "of the held-out ones forget 7 of 30, retain_text 7 of 30." in note
    )
    assert "on the search questions" in study_note(Front("t", records, BASE), {}, PLACE)
    assert "2 trials, and no front yet" in study_note(Front("t", records[2:], BASE), {}, PLACE)


def trial_at(trial_id, reduction, retain, left):
    """A trial of the front by its two objectives, with its held-out forget ROUGE-L."""
    metrics = {"forget_rougeL_reduction": reduction, "retain_rougeL": retain}
    result = TrialResult(trial_id=trial_id, status="completed", metrics=metrics)
    reach = {"low": left - 0.01, "high": left + 0.01}
    held_out = HELD_OUT | {"forget_rougeL": Score(value=left, n=50, **reach)}
    return TrialRecord(TrialConfig(), result, True, held_out)


def test_the_note_recommends_no_trial_that_forgets_nothing_before_one_that_does():
    nothing, costly = trial_at("0001", 0.01, 0.97, 0.94), trial_at("0002", 0.90, 0.82, 0.05)
    front = Front("t", [nothing, costly], BASE, BASE)
    assert recommended(front).result.trial_id == "0002"
    less = trial_at("0003", 0.85, 0.85, 0.06)
    assert recommended(replace(front, records=[nothing, costly, less])).result.trial_id == "0003"
    little = trial_at("0004", 0.40, 0.90, 0.55)
    assert recommended(replace(front, records=[nothing, little])).result.trial_id == "0004"


def test_the_note_says_suppressed_only_of_what_is():
    def note(record, base=BASE):
        return study_note(Front("t", [record], base, base), {}, PLACE)

    held, broken = note(trial_at("0001", 0.9, 0.96, 0.05)), note(trial_at("0001", 0.0, 0.97, 0.95))
    assert "Suppressed under these tests" in held and "Warning" not in held
    assert "Not suppressed under any test" in broken
    assert "forget_rougeL (0.950 to 0.950 [0.940, 0.960])" in broken
    little = {name: Score(value=0.2, n=60, low=0.1, high=0.3) for name in BASE}
    doubted = note(trial_at("0001", 0.18, 0.19, 0.02), little)
    assert doubted.startswith("**Warning.** The base may never have known")
    assert "uppressed under" not in doubted


def test_a_note_stays_within_mlflows_limit(tmp_path):
    record = make_records(tmp_path)[1]
    crowd = [
        TrialRecord(
            record.config,
            record.result.model_copy(update={"trial_id": f"{i:04d}"}),
            True,
            HELD_OUT,
        )
        for i in range(200)
    ]
    front = Front("tiny-llava", crowd, BASE, BASE)
    runs = {record.result.trial_id: "r" * 32 for record in crowd}
    note = study_note(front, {"train": 8.0}, Place("1" * 18, "study", "s" * 32, runs))
    assert len(note) < 8000
    assert "184 more in `front.csv`" in note
