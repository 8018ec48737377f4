"""The tables of a study: exact columns, exact numbers, never half a file."""

import csv
import errno
import json
import math
import os
import resource
import signal
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

from vgid.config import Method, TrialConfig
from vgid.errors import InputError
from vgid.files import write_atomically
from vgid.report.records import (
    TrialRecord,
    TrialsTable,
    describe,
    write_front,
    write_study,
)
from vgid.results import Score, TrialResult

THIRD = 1 / 3


def record(trial_id, tmp_path, *, on_front=False, held_out=None, status="completed", **config):
    metrics = {
        "forget_rougeL": THIRD * int(trial_id) / 10,
        "retain_rougeL": math.pi / 4,
        "test_rougeL": 0.1 + 0.2,
        "forget_rougeL_reduction": math.e / 3,
        "forget_cloze": 0.7,
        "learning_rate": 5e-5,  # the last epoch's, not the configured one
        "exact_memorisation": 1e-17,
    }
    done = status == "completed"
    result = TrialResult(
        trial_id=trial_id,
        status=status,
        metrics=metrics if done else {},
        seconds={"train": 1.1, "evaluate": 2.2},
        adapter=tmp_path / "adapters" / trial_id if done else None,
        error=None if done else "the loss is not a number",
    )
    return TrialRecord(TrialConfig(**config), result, on_front, held_out)


@pytest.fixture
def records(tmp_path):
    held_out = {
        "test_rougeL": Score(value=0.2, n=50, low=0.1, high=0.3),
        "forget_rougeL": Score(value=THIRD / 10, n=55, low=0.01, high=0.05),
        "forget_rougeL_reduction": Score(value=0.95 - THIRD / 10, n=55, low=0.9, high=0.94),
        "retain_rougeL_drop": Score(value=0.02, n=50, low=-0.01, high=0.05),
        "forget_cloze": Score(value=0.25, n=20, low=0.1, high=0.4),
    }
    return [
        record("0002", tmp_path, status="failed", noise_type="white"),
        record("0001", tmp_path, noise_type="gaussian", sigma=0.1 + 0.2, alpha=THIRD),
        record("0000", tmp_path, on_front=True, held_out=held_out, released=True),
    ]


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_trials_have_the_columns_of_the_contract(tmp_path, records):
    TrialsTable(tmp_path / "trials.csv").write(records)
    header = (tmp_path / "trials.csv").read_text().splitlines()[0].split(",")
    assert header[:8] == [
        "trial_id",
        "status",
        "alpha",
        "beta",
        "noise_type",
        "sigma",
        "prompt_style",
        "learning_rate",
    ]
    metrics = header.index("forget_rougeL")
    assert set(header[:metrics]) - {"trial_id", "status"} == set(TrialConfig.model_fields)
    assert header[metrics:] == [
        "forget_rougeL",
        "retain_rougeL",
        "test_rougeL",
        "forget_rougeL_reduction",
        "forget_cloze",
        "exact_memorisation",
        "on_front",
        "seconds",
        "adapter",
    ]


def test_rows_are_ordered_and_read_back_bit_for_bit(tmp_path, records):
    TrialsTable(tmp_path / "trials.csv").write(records)
    rows = read(tmp_path / "trials.csv")
    assert [row["trial_id"] for row in rows] == ["0000", "0001", "0002"]
    assert [row["status"] for row in rows] == ["completed", "completed", "failed"]
    assert [row["sigma"] for row in rows] == ["", "0.30000000000000004", ""]
    assert float(rows[1]["alpha"]) == THIRD
    assert [float(row["learning_rate"]) for row in rows] == [5e-4, 1e-3, 1e-3]  # the script's first
    assert float(rows[1]["forget_rougeL"]) == THIRD / 10
    assert float(rows[1]["retain_rougeL"]) == math.pi / 4
    assert float(rows[1]["exact_memorisation"]) == 1e-17
    assert float(rows[1]["seconds"]) == 1.1 + 2.2
    assert rows[0]["adapter"] == str(Path("adapters", "0000"))
    assert rows[2]["forget_rougeL"] == rows[2]["adapter"] == ""
    assert [row["on_front"] for row in rows] == ["true", "false", "false"]
    assert [row["train_tasks"] for row in rows] == ["generation"] + ["generation+cloze"] * 2
    assert [row["noise_type"] for row in rows] == ["", "gaussian", "white"]
    assert [row["released"] for row in rows] == ["true", "false", "false"]

    frame = pd.read_csv(
        tmp_path / "trials.csv", dtype={"trial_id": str}, float_precision="round_trip"
    )
    assert frame.on_front.tolist() == [True, False, False]
    assert frame.alpha[1] == THIRD
    assert math.isnan(frame.sigma[0])


def test_the_same_trials_give_the_same_bytes_in_any_order(tmp_path, records):
    TrialsTable(tmp_path / "a.csv").write(records)
    TrialsTable(tmp_path / "b.csv").write(records[::-1])
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_no_trials_still_give_a_header(tmp_path):
    TrialsTable(tmp_path / "trials.csv").write([])
    frame = pd.read_csv(tmp_path / "trials.csv")
    assert len(frame) == 0
    assert {"trial_id", "retain_rougeL", "adapter"} <= set(frame.columns)
    write_front(tmp_path / "front.csv", [])
    assert len(pd.read_csv(tmp_path / "front.csv")) == 0


def test_a_trial_that_ends_adds_its_row_and_the_last_write_orders_them(tmp_path, monkeypatch):
    path = tmp_path / "trials.csv"
    ended = [record(f"{number:04d}", tmp_path) for number in (9999, 10000, 3)]
    table = TrialsTable(path)
    assert not table.holds(ended[0])  # nothing is there yet
    table.write(ended[:1])
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("vgid.files.write_atomically", None)  # nothing is written anew
        for one in ended[1:]:
            assert table.holds(one)
            table.add(one)
    assert path.read_bytes().startswith(whole)
    assert [row["trial_id"] for row in read(path)] == ["9999", "10000", "0003"]

    other = record("0004", tmp_path)
    other.result.metrics["celebrity_rougeL"] = 0.5
    assert not table.holds(other)
    table.write([*ended, other])
    assert [row["trial_id"] for row in read(path)] == ["0003", "0004", "9999", "10000"]
    assert table.holds(other)
    TrialsTable(tmp_path / "at_once.csv").write([*ended, other])
    assert path.read_bytes() == (tmp_path / "at_once.csv").read_bytes()


def test_bounds_that_a_trial_misses_have_a_column_where_there_are_any(tmp_path):
    asked = [record(f"{number:04d}", tmp_path) for number in range(2)]
    for one, by in zip(asked, (-0.1, 0.25), strict=True):
        one.result.missed["forget_cloze<=0.3"] = by
    table = TrialsTable(tmp_path / "trials.csv")
    table.write([record("0002", tmp_path)])
    assert "misses" not in read(tmp_path / "trials.csv")[0]
    assert not table.holds(asked[0])
    table.write(asked)
    rows = read(tmp_path / "trials.csv")
    assert [row["misses"] for row in rows] == ["", "forget_cloze<=0.3 by 0.250"]


def test_a_row_that_does_not_fit_on_the_disk_is_one_sentence_and_no_half_line(tmp_path):
    path = tmp_path / "trials.csv"
    table = TrialsTable(path)
    table.write([record("0000", tmp_path)])
    whole = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, before[1]))
    try:
        with pytest.raises(InputError, match=r"trials.csv: cannot be written \(No space left"):
            table.add(record("0001", tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole
    table.add(record("0001", tmp_path))
    assert [row["trial_id"] for row in read(path)] == ["0000", "0001"]


def test_front_adds_held_out_scores_with_intervals(tmp_path, records):
    TrialsTable(tmp_path / "trials.csv").write(records)
    write_front(tmp_path / "front.csv", records)
    (row,) = read(tmp_path / "front.csv")
    assert row["trial_id"] == "0000"
    trials_header = list(read(tmp_path / "trials.csv")[0])
    assert list(row)[: len(trials_header)] == trials_header
    assert list(row)[len(trials_header) :] == [
        f"heldout_{name}{part}"
        for name in (
            "forget_rougeL",
            "test_rougeL",
            "forget_rougeL_reduction",
            "retain_rougeL_drop",
            "forget_cloze",
        )
        for part in ("", "_low", "_high", "_n")
    ]
    assert float(row["heldout_forget_rougeL"]) == THIRD / 10
    assert row["heldout_forget_rougeL_n"] == "55"
    assert float(row["heldout_forget_rougeL_reduction"]) == 0.95 - THIRD / 10
    assert float(row["heldout_forget_rougeL_reduction_low"]) == 0.9
    assert float(row["heldout_forget_rougeL_reduction_high"]) == 0.94
    assert float(row["heldout_retain_rougeL_drop_low"]) == -0.01


def test_study_is_plain_json(tmp_path):
    score = Score(value=0.1 + 0.2, n=3, low=0.0, high=1.0)
    write_study(tmp_path / "study.json", {"output": tmp_path, "base": {"forget": score}, "n": 3})
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["output"] == str(tmp_path)
    assert content["base"]["forget"]["value"] == 0.1 + 0.2
    with pytest.raises(ValueError, match="JSON"):
        write_study(tmp_path / "study.json", {"hypervolume": math.nan})
    with pytest.raises(TypeError, match="no place in study"):
        write_study(tmp_path / "study.json", {"what": object()})
    assert json.loads((tmp_path / "study.json").read_text()) == content


def test_a_full_disk_gets_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trials.csv"
    write_atomically(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match=r"trials.csv: cannot be written \(No space left"
    ) as caught:
        write_atomically(path, b"new")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["trials.csv"]


def test_a_file_in_place_of_the_folder_gets_one_sentence(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="cannot be written"):
        TrialsTable(Path(tmp_path / "out" / "trials.csv")).write([])


def test_a_trial_has_one_readable_line():
    config = TrialConfig(noise_type="gaussian", sigma=0.8, alpha=0.8123, learning_rate=3e-4)
    assert describe(config) == "Gaussian-noise σ0.8 · strict · α0.81 β1 · lr 3e-4"
    assert describe(TrialConfig(noise_type="white")).startswith("white-image · strict")
    said = {method: describe(TrialConfig(method=method)) for method in get_args(Method)}
    assert said["ga"] == "GA · lr 1e-3"
    assert said["npo"] == "NPO · preference β0.1 · lr 1e-3"
    assert said["icu_t"] == "ICU-T · strict · α1 β1 · lr 1e-3"
    assert said["rmu"] == "RMU · layer a third · steering 5 · α1 β1 · lr 1e-3"
    assert len(set(said.values())) == len(said)


def test_what_a_method_does_not_use_is_an_empty_cell(tmp_path):
    TrialsTable(tmp_path / "trials.csv").write([record("0000", tmp_path, method="po_dpo")])
    (row,) = read(tmp_path / "trials.csv")
    for name in ("beta", "noise_type", "sigma", "prompt_style", "response_source", "rmu_layer"):
        assert row[name] == ""
    assert (row["method"], row["alpha"], row["preference_beta"]) == ("po_dpo", "1.0", "0.1")
