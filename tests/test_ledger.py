"""The ledger: what a killed study leaves behind, who may hold the folder, what may be resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vgid.config import StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.ledger import Header, Ledger, now, trial_id
from vgid.results import EpochReport, TrialResult

SHA = "0" * 64


def begun(output: Path, **config) -> Ledger:
    ledger = Ledger(output)
    study = StudyConfig(output=output, **config)
    ledger.begin(Header(study_id="s", config=study, search_space_sha256=SHA, started=now()))
    return ledger


def completed(name: str) -> TrialResult:
    return TrialResult(trial_id=name, status="completed", metrics={"retain_rougeL": 0.1 + 0.2})


def test_trials_come_back_with_their_bits_after_a_resume(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig(alpha=1 / 3))
        ledger.end("0000", completed("0000"), slot=1, overhead_s=0.25)
        ledger.start("0001", TrialConfig(noise_type="gaussian", sigma=0.1))
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), SHA)
        (ended,) = again.ended
        assert ended.config == TrialConfig(alpha=1 / 3)
        assert ended.result == completed("0000")
        assert ended.slot == 1
        assert ended.overhead_s == 0.25
        (in_flight,) = again.in_flight
        assert in_flight.trial_id == "0001"
        assert in_flight.config.sigma == 0.1


def test_epochs_are_kept_as_they_are_heard(tmp_path):
    reports = [EpochReport(epoch=e, epochs=3, step=4 * e, metrics={"loss": 1 / e}) for e in (1, 2)]
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
        first = ledger.epoch("0000", reports[0])
    with Ledger(tmp_path / "s") as again:  # killed; the trial starts over
        again.resume(StudyConfig(output=tmp_path / "s"), SHA)
        assert again.records["0000"] == first
        for report in reports:
            again.epoch("0000", report)
        assert again.records["0000"].epochs[:1] == first.epochs
        assert [heard.report for heard in again.records["0000"].epochs] == reports
        again.end("0000", completed("0000"))
        late = reports[1].model_copy(update={"step": 12})
        assert again.epoch("0000", late).epochs == again.records["0000"].epochs
    with Ledger(tmp_path / "s") as last:
        last.resume(StudyConfig(output=tmp_path / "s"), SHA)
        assert [heard.report for heard in last.records["0000"].epochs] == reports
        assert last.records["0000"].result == completed("0000")


def test_a_record_of_before_epochs_were_kept_is_read(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
    path = tmp_path / "s" / "trials" / "0000.json"
    old = json.loads(path.read_text())
    del old["epochs"]
    path.write_text(json.dumps(old))
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), SHA)
        assert again.records["0000"].epochs == ()


def test_an_in_flight_trial_keeps_its_record_when_it_starts_again(tmp_path):
    with begun(tmp_path / "s") as ledger:
        first = ledger.start("0000", TrialConfig())
        assert ledger.start("0000", TrialConfig(alpha=2.0)) == first


def test_ended_trials_drop_their_checkpoints(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
        ledger.checkpoints("0000").mkdir(parents=True)
        (ledger.checkpoints("0000") / "state.safetensors").write_bytes(b"x")
        ledger.end("0000", completed("0000"))
        assert not ledger.checkpoints("0000").exists()


def test_a_half_written_record_of_a_killed_process_is_swept_away(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
    stray = tmp_path / "s" / "trials" / ".0001.json.abc"
    stray.write_text('{"trial_')
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), SHA)
        assert list(again.records) == ["0000"]
        assert not stray.exists()


def test_a_second_holder_is_refused_and_a_kill_frees_the_folder(tmp_path):
    output = tmp_path / "s"
    hold = (
        "import sys, time; from pathlib import Path; from vgid.ledger import Ledger;"
        "ledger = Ledger(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(output)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="a study is running in this folder"):
        Ledger(output)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    Ledger(output).close()


@pytest.mark.parametrize("made_before", [True, False])
def test_a_study_that_never_began_leaves_nothing(tmp_path, made_before):
    output = tmp_path / "s"
    if made_before:
        output.mkdir()
    with Ledger(output), pytest.raises(ZeroDivisionError):
        _ = 1 / 0
    assert output.exists() == made_before
    assert not made_before or not list(output.iterdir())


def test_begin_refuses_a_folder_with_a_study_or_anything_else(tmp_path):
    begun(tmp_path / "s").close()
    with pytest.raises(InputError, match="--resume"):
        begun(tmp_path / "s")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not empty"):
        begun(tmp_path / "t")
    assert (tmp_path / "t" / "thesis.tex").exists()


def test_an_unwritable_output_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Ledger(tmp_path / "file" / "s")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed 0"),
        ({"forget_ratio": 10}, "forget-ratio 5"),
        ({"retain_people": 4}, "retain-people"),
        ({"train_pairs": "all"}, "train-pairs unheld"),
    ],
)
def test_resume_refuses_another_study(tmp_path, change, word):
    begun(tmp_path / "s").close()
    with Ledger(tmp_path / "s") as ledger, pytest.raises(InputError, match=word):
        ledger.resume(StudyConfig(output=tmp_path / "s", **change), SHA)


def test_resume_may_change_how_much_and_how_fast(tmp_path):
    begun(tmp_path / "s", trials=4).close()
    with Ledger(tmp_path / "s") as ledger:
        config = StudyConfig(output=tmp_path / "s", trials=9, time_budget_s=60, max_concurrent=1)
        assert ledger.resume(config, SHA).study_id == "s"


def test_resume_refuses_a_changed_search_space_and_an_empty_folder(tmp_path):
    begun(tmp_path / "s").close()
    with Ledger(tmp_path / "s") as ledger, pytest.raises(InputError, match="search space"):
        ledger.resume(StudyConfig(output=tmp_path / "s"), "1" * 64)
    with Ledger(tmp_path / "t") as ledger, pytest.raises(InputError, match="no study to resume"):
        ledger.resume(StudyConfig(output=tmp_path / "t"), SHA)


def test_resume_names_a_damaged_or_missing_record(tmp_path):
    with begun(tmp_path / "s") as ledger:
        for number in range(3):
            ledger.start(trial_id(number), TrialConfig())
    (tmp_path / "s" / "trials" / "0001.json").unlink()
    with Ledger(tmp_path / "s") as ledger, pytest.raises(InputError, match=r"0001\.json"):
        ledger.resume(StudyConfig(output=tmp_path / "s"), SHA)
    (tmp_path / "s" / "trials" / "0001.json").write_text("{")
    with Ledger(tmp_path / "s") as ledger, pytest.raises(InputError, match="damaged"):
        ledger.resume(StudyConfig(output=tmp_path / "s"), SHA)


def test_retried_failures_are_in_flight_and_keep_why_they_failed(tmp_path):
    with begun(tmp_path / "s") as ledger:
        for name in ("0000", "0001"):
            ledger.start(name, TrialConfig())
        ledger.end("0000", completed("0000"))
        failed = TrialResult(trial_id="0001", status="failed", error="the loss is NaN")
        ledger.end("0001", failed, slot=3, overhead_s=0.5)
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), SHA)
        again.retry_failed()
        again.retry_failed()  # nothing has failed any more
        assert [record.trial_id for record in again.ended] == ["0000"]
    with Ledger(tmp_path / "s") as third:
        third.resume(StudyConfig(output=tmp_path / "s"), SHA)
        (record,) = third.in_flight
        assert (record.failures, record.ended, record.slot) == (("the loss is NaN",), None, None)
        assert third.end("0001", completed("0001")).failures == ("the loss is NaN",)


def test_a_study_without_a_result_can_be_taken_back_whole(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
        (tmp_path / "s" / "data").mkdir()
        (tmp_path / "s" / "mlflow.db").write_bytes(b"x")
        ledger.abandon()
    assert not (tmp_path / "s").exists()


def test_a_result_is_never_taken_back(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
        ledger.end("0000", completed("0000"))
        ledger.abandon()
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), SHA)
        again.abandon()
        assert len(again.ended) == 1


def test_a_study_of_more_than_10000_trials_is_read_in_the_order_of_its_trials(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
    plain = (tmp_path / "s" / "trials" / "0000.json").read_text()
    for number in range(1, 10_002):
        path = tmp_path / "s" / "trials" / f"{trial_id(number)}.json"
        path.write_text(plain.replace('"0000"', f'"{trial_id(number)}"'))
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), SHA)
        assert list(again.records)[9998:] == ["9998", "9999", "10000", "10001"]
