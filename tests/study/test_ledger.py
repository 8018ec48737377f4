"""The ledger: what a killed study leaves behind, who may hold the folder, what may be resumed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from vgid.config import StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.requirement import OBJECTIVES
from vgid.results import EpochReport, TrialResult
from vgid.study.ledger import (
    CONTENT,
    MAY_CHANGE,
    MUST_AGREE,
    Header,
    Ledger,
    changes,
    now,
    trial_id,
)

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


def test_a_rung_is_those_who_came_before_and_the_same_after_a_resume(tmp_path):
    draw = random.Random(0)
    arrivals = [(f"{n:04d}", epoch) for epoch in (1, 2) for n in draw.sample(range(8), 8)]
    before: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    with begun(tmp_path / "s") as ledger:
        for number in range(8):
            ledger.start(f"{number:04d}", TrialConfig())
        for name, epoch in arrivals:
            scores = {metric: draw.random() for metric in OBJECTIVES}
            report = EpochReport(epoch=epoch, epochs=4, step=epoch, metrics=scores)
            ledger.epoch(name, report)
            before[name, epoch] = ledger.rung(name, epoch)
            assert before[name, epoch][0] == tuple(scores.values())
            time.sleep(0.002)  # by the clock's milliseconds
    for place, (_, epoch) in enumerate(arrivals):
        earlier = {before[key][0] for key in arrivals[:place] if key[1] == epoch}
        assert set(before[arrivals[place]][1:]) == earlier
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), SHA)
        assert {key: again.rung(*key) for key in arrivals} == before


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
        "import sys, time; from pathlib import Path; from vgid.study.ledger import Ledger;"
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


def test_begin_refuses_a_folder_with_work_or_anything_else(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
        ledger.end("0000", completed("0000"))
    with begun(tmp_path / "c") as ledger:
        ledger.start("0000", TrialConfig())
        ledger.checkpoints("0000").mkdir(parents=True)
    with begun(tmp_path / "f") as ledger:
        ledger.start("0000", TrialConfig())
        ledger.end("0000", TrialResult(trial_id="0000", status="failed", error="NaN"))
        ledger.retry_failed()
    for name in ("s", "c", "f"):
        with pytest.raises(InputError, match="--resume"):
            begun(tmp_path / name)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.tex").write_text("")
    (tmp_path / "u" / "trials").mkdir(parents=True)
    (tmp_path / "u" / "trials" / "0000.json").write_text("{}")
    for name in ("t/thesis.tex", "u/trials/0000.json"):
        with pytest.raises(InputError, match=r"not empty|damaged"):
            begun(tmp_path / name.split("/")[0])
        assert (tmp_path / name).exists()


def test_a_study_that_failed_before_any_trial_keeps_all_and_starts_again(tmp_path):
    output = tmp_path / "s"
    with pytest.raises(InputError, match="out of memory"), begun(output, seed=1) as ledger:
        ledger.start("0000", TrialConfig(alpha=2.0))
        (output / "store").mkdir()
        (output / "store" / "hours.safetensors").write_bytes(b"x")
        (output / "study.log").write_text("what happened")
        raise InputError("out of memory")
    with Ledger(output) as again:  # with the same command and --resume
        again.resume(StudyConfig(output=output, seed=1), SHA)
        assert [record.config.alpha for record in again.in_flight] == [2.0]
    with begun(output, seed=2) as anew:  # without --resume, and with any other
        assert not anew.records
        anew.start("0000", TrialConfig())
    assert (output / "study.log").read_text() == "what happened"
    assert (output / "store" / "hours.safetensors").exists()
    assert [path.name for path in sorted((output / "trials").iterdir())] == [
        "0000.json",
        "study.json",
    ]


def test_a_kill_before_the_header_leaves_a_folder_that_can_be_started(tmp_path):
    output = tmp_path / "s"
    (output / "trials").mkdir(parents=True)
    (output / ".lock").touch()
    (output / "trials" / ".study.json.abc").write_text('{"study')
    with Ledger(output) as ledger, pytest.raises(InputError, match="leave out --resume"):
        ledger.resume(StudyConfig(output=output), SHA)
    with begun(output) as ledger:
        assert ledger.header is not None
    assert [path.name for path in (output / "trials").iterdir()] == ["study.json"]


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
        ({"require": ("forget_cloze<=0.3",)}, "require"),
        ({"halving": 2}, "halving 1"),
    ],
)
def test_resume_refuses_another_study(tmp_path, change, word):
    begun(tmp_path / "s").close()
    with Ledger(tmp_path / "s") as ledger, pytest.raises(InputError, match=word):
        ledger.resume(StudyConfig(output=tmp_path / "s", **change), SHA)


def test_every_argument_is_refused_or_taken_by_name(tmp_path):
    assert not set(MUST_AGREE) & set(MAY_CHANGE)
    assert {*MUST_AGREE, *MAY_CHANGE} == set(StudyConfig.model_fields)
    asked = {
        "trials": 9,
        "sampler": "tpe",
        "time_budget_s": 60.0,
        "max_concurrent": 1,
        "gpus_per_worker": 0.5,
        "stop_when_flat": 5,
        "eval_batch_size": 16,
        "store_limit_gb": 1.0,
        "fresh_workers": True,
        "log_responses": True,
        "output": tmp_path / "s",
        "search_space": tmp_path / "moved.yaml",
        "from_deployment": tmp_path / "moved" / "deployment.yaml",
    }
    assert asked.keys() == set(MAY_CHANGE)
    begun(tmp_path / "s", trials=4).close()
    with Ledger(tmp_path / "s") as ledger:
        config = StudyConfig(**asked)
        header = ledger.resume(config, SHA)
        assert header.study_id == "s"
    said = changes(header.config.model_copy(update={"output": tmp_path / "before"}), config)
    assert len(said) == len(MAY_CHANGE)
    assert "trials 9 (started with 4)" in said
    assert "time-budget 60.0 (started with None)" in said


CONTENTS = {name: f"{name} of {'x' * 20}" for name in CONTENT}


@pytest.mark.parametrize("name", CONTENT)
def test_a_study_goes_on_over_the_content_that_it_was_started_with(tmp_path, name):
    output = tmp_path / "s"
    config = StudyConfig(output=output)
    ledger = Ledger(output)
    ledger.open(config, SHA, resume=False)
    content = {**CONTENTS, "vgid_version": version("vgid")}
    assert ledger.settle(**content) == []
    ledger.start("0000", TrialConfig())
    ledger.end("0000", completed("0000"))
    ledger.close()
    record = (output / "trials" / "study.json").read_bytes()
    with Ledger(output) as again:
        again.open(config, SHA, resume=True)
        assert again.settle(**content) == []
        what, remedy = CONTENT[name]
        with pytest.raises(InputError, match=f"started with {what} .* {re.escape(remedy)}"):
            again.settle(**{**content, name: "other"})
    assert (output / "trials" / "study.json").read_bytes() == record


def test_another_version_of_the_package_is_refused(tmp_path):
    config = StudyConfig(output=tmp_path / "s")
    with Ledger(tmp_path / "s") as ledger:
        header = ledger.open(config, SHA, resume=False)
        ledger.begin(header.model_copy(update={"vgid_version": "0.0.1"}))
    with Ledger(tmp_path / "s") as ledger, pytest.raises(InputError, match=r"vgid 0\.0\.1"):
        ledger.resume(config, SHA)


def test_a_study_of_before_these_records_takes_what_it_finds_and_says_so(tmp_path):
    with begun(tmp_path / "s") as ledger:
        ledger.start("0000", TrialConfig())
        ledger.end("0000", completed("0000"))
    path = tmp_path / "s" / "trials" / "study.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({key: old[key] for key in old if key not in CONTENT}))
    config = StudyConfig(output=tmp_path / "s")
    found = {"data_sha256": "a" * 64, "base_revision": "b" * 64}
    with Ledger(tmp_path / "s") as ledger:
        ledger.resume(config, SHA)
        assert ledger.settle(**found) == ["data", "weights of the base"]
        assert ledger.settle(**found) == []
    with Ledger(tmp_path / "s") as ledger:
        ledger.resume(config, SHA)
        with pytest.raises(InputError, match="started with data aaaaaaaaaaaa and cannot go on"):
            ledger.settle(data_sha256="c" * 64)


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


def test_studies_that_start_in_the_same_second_have_ids_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("vgid.study.ledger.now", lambda: "2026-11-28T20:00:00.000+00:00")
    ids = set()
    for number in range(8):
        config = StudyConfig(output=tmp_path / str(number))
        with Ledger(config.output) as ledger:
            ids.add(ledger.open(config, SHA, resume=False).study_id)
    assert len(ids) == 8
    assert {name.rsplit("-", 1)[0] for name in ids} == {"tiny-llava-2026-11-28T200000-0"}
