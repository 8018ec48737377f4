"""Tables from outcomes: intervals, cells, rows, and what is written; no model."""

import csv
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vgid.config import TrialConfig
from vgid.paper.experiments import Arm, Outcome
from vgid.paper.figures import trade_off
from vgid.paper.tables import (
    ALL_NINE,
    CELEBRITIES,
    EXTRA,
    FilledTable,
    as_csv,
    as_grid,
    fill,
    table_7,
    tables,
)
from vgid.report.intervals import count_seeds, t_interval
from vgid.report.records import METHOD_LABELS
from vgid.results import Score

TRIALS = {method: TrialConfig(method=method) for method in METHOD_LABELS}


def outcome(**values):
    scores = {name: Score(value=value, n=30, low=0, high=1) for name, value in values.items()}
    return Outcome(scores=scores, seconds=1.0, provenance={})


def full(value):
    return outcome(**dict.fromkeys((*ALL_NINE, *EXTRA, "forget_bleu", "test_bleu"), value))


def filled(number=3, seeds=(0, 1, 2), trials=TRIALS, value=lambda row, seed: 0.5):
    table = tables(trials)[number]
    return FilledTable(
        table,
        "tiny-llava",
        tuple(seeds),
        {row.key: tuple(full(value(row.key, seed)) for seed in seeds) for row in table.rows},
    )


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
def test_the_interval_is_student_s(values):
    found = t_interval(values)
    assert found.n == len(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    if np.std(values) < 1e-9:
        assert found.low == pytest.approx(found.high, abs=1e-6)
        return
    reference = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_the_interval_leaves_out_what_is_missing_and_needs_two_seeds():
    assert t_interval([1.0, None, 3.0, math.nan]) == t_interval([1.0, 3.0])
    one, none = t_interval([0.25, None]), t_interval([None])
    assert (one.value, one.n) == (0.25, 1) and math.isnan(one.low) and math.isnan(one.high)
    assert none.n == 0 and math.isnan(none.value)
    assert (str(one), str(none)) == ("0.250", "none")


def test_seeds_are_counted_in_words():
    assert [count_seeds(seeds) for seeds in (1, 2, 30)] == ["1 seed", "2 seeds", "30 seeds"]


def test_rows_that_are_the_same_in_two_tables_are_one_experiment():
    made = tables(TRIALS)
    per_seed = {
        table.experiment(row, "tiny-llava", 0) for table in made.values() for row in table.rows
    }
    trained = {e for e in per_seed if e.trial is not None and not e.arm.reverse}
    assert len(trained) == 10 + 5 + 2 + 10 + 10  # Tables 3; 4 and 5 beside VGID itself; 8; 9
    assert len(per_seed) == len(trained) + 1 + 3 + 2 + 3 + 2  # base; Tables 1; 2; 6; base of 8, 9
    base = [made[n].experiment(made[n].rows[0], "tiny-llava", 0) for n in (1, 2, 3, 4, 5, 6)]
    assert len(set(base)) == 1


def test_ablations_change_one_thing_of_vgid_s_setting():
    tuned = TrialConfig(beta=3.0, noise_type="gaussian", sigma=0.5, prompt_style="polite")
    made = tables({"vgid": tuned})
    by_key = {row.key: row.arm.trial for row in made[4].rows if row.arm.trial is not None}
    assert by_key["random"] == tuned.model_copy(update={"noise_type": "random", "sigma": None})
    assert by_key["gaussian_0.8"] == tuned.model_copy(update={"sigma": 0.8})
    styles = {row.key: row.arm.trial for row in made[5].rows if row.arm.trial is not None}
    assert styles["polite"] == tuned
    assert [row.key for row in made[3].rows] == ["base", "vgid"]
    assert [row.key for row in tables({"ga": TRIALS["ga"]})[4].rows] == ["base"]


def test_a_row_has_its_seed_in_the_trial():
    table = tables(TRIALS)[3]
    experiment = table.experiment(table.rows[1], "tiny-llava", 7)
    assert experiment.trial == TRIALS["ga"].model_copy(update={"seed": 7})
    assert table.experiment(table.rows[0], "tiny-llava", 7).arm == Arm()


def test_the_csv_holds_every_seed_and_the_paper_s_number():
    table = filled(value=lambda key, seed: 0.2 + 0.1 * seed if key == "vgid" else 0.5)
    rows = list(csv.DictReader(io.StringIO(as_csv([table]).decode())))
    assert len(rows) == 11 * (9 + len(EXTRA))
    (cell,) = [r for r in rows if (r["row"], r["score"]) == ("vgid", "forget_rougeL")]
    assert [float(cell[f"seed_{s}"]) for s in range(3)] == pytest.approx([0.2, 0.3, 0.4])
    reference = stats.ttest_1samp([0.2, 0.3, 0.4], 0.0).confidence_interval(0.95)
    found = float(cell["mean"]), float(cell["low"]), float(cell["high"])
    assert found == pytest.approx((0.3, reference.low, reference.high))
    assert (cell["seeds"], cell["questions"]) == ("3", "30")
    assert (cell["paper"], cell["paper_backbone"]) == ("0.2", "LLaVA-1.5-7B")
    (extra,) = [r for r in rows if (r["row"], r["score"]) == ("vgid", "retain_bleu")]
    assert extra["paper"] == ""


def test_the_printed_table_sets_ours_beside_the_paper_s():
    grid = as_grid(filled())
    assert grid.caption == "Table 3: All methods at 5 % forgotten (tiny-llava)"
    assert grid.header[1:4] == ("forget cloze ↓", "forget class ↓", "forget ROUGE-L ↓")
    vgid = next(row for row in grid.rows if row[0] == "VGID")
    assert vgid[3] == "0.500 [0.500, 0.500] / 0.200"
    text = grid.markdown()
    assert text.count("\n|") == 2 + len(grid.rows)
    assert "mean over 3 seeds" in text and "<table>" in grid.html()


def test_celebrities_stand_beside_the_retain_people_where_the_data_has_them():
    def with_celebrities(number):
        table = filled(number)
        more = {name: Score(value=0.25, n=40, low=0, high=1) for name in CELEBRITIES}
        outcomes = {
            key: tuple(o.model_copy(update={"scores": o.scores | more}) for o in of_row)
            for key, of_row in table.outcomes.items()
        }
        return FilledTable(table.table, table.backbone, table.seeds, outcomes)

    for number in (3, 4, 5, 8, 9):
        header = as_grid(with_celebrities(number)).header
        assert header[-4:] == (
            "retain ROUGE-L ↑",
            "celebrity cloze ↑",
            "celebrity class ↑",
            "celebrity ROUGE-L ↑",
        )
        assert as_grid(filled(number)).header == header[:-3]
    assert as_grid(with_celebrities(6)).header == as_grid(filled(6)).header
    grid = as_grid(with_celebrities(3))
    assert (
        grid.rows[0][-1] == "0.250 [0.250, 0.250] / –" and "celebrity ROUGE-L 40" in grid.notes[0]
    )
    rows = list(csv.DictReader(io.StringIO(as_csv([with_celebrities(3)]).decode())))
    assert {row["score"] for row in rows} >= set(CELEBRITIES)


def test_a_failed_training_is_said_and_not_averaged():
    table = filled()
    failed = Outcome(error="loss is not finite", seconds=1.0, provenance={})
    ga, npo = (full(0.4), failed, full(0.6)), (failed,) * 3
    table = FilledTable(
        table.table, "tiny-llava", table.seeds, {**table.outcomes, "ga": ga, "npo": npo}
    )
    assert table.values("ga", "forget_rougeL") == [0.4, None, 0.6]
    rows = {row[0]: row for row in as_grid(table).rows}
    assert rows["GA"][3].startswith("0.500 [") and "(1 failed)" in rows["GA"][3]
    assert rows["NPO"][3] == "failed / 0.561"
    picture = trade_off(4, [table])
    labels = {label for method, label in METHOD_LABELS.items() if method != "npo"}
    assert {series.name for series in picture.panels[0].drawn} == {"Base", *labels}


def test_the_trade_off_is_paired_within_seeds():
    left = {"base": (0.9, 0.7), "vgid": (0.4, 0.2)}
    table = filled(
        seeds=(0, 1), trials={"vgid": TRIALS["vgid"]}, value=lambda key, seed: left[key][seed]
    )
    drawn = {series.name: series for series in trade_off(4, [table]).panels[0].drawn}
    assert drawn["VGID"].x == pytest.approx([0.5])
    assert drawn["VGID"].x_bounds[0] == pytest.approx((0.5, 0.5))
    assert drawn["Base"].x == [0.0]


def test_only_what_was_run_fills_a_table():
    table = tables({"ga": TRIALS["ga"]})[3]
    outcomes = {table.experiment(row, "tiny-llava", 0): full(0.5) for row in table.rows}
    assert fill(table, "tiny-llava", [0], outcomes).interval("ga", "test_cloze").value == 0.5
    with pytest.raises(KeyError):
        fill(table, "tiny-llava", [0, 1], outcomes)


def test_table_7_states_what_runs_here():
    text = table_7("tiny-llava", {"npo": TrialConfig(method="npo", preference_beta=0.4, epochs=3)})
    *_, paper, npo = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert paper[1:6] == ["AdamW", "2e-05", "4", "1", "384"]
    assert npo[:5] == ["| NPO", "AdamW", "0.001", "12", "3"]
    assert "preference_beta 0.4" in npo[6]
