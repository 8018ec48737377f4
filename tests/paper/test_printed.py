"""The paper's numbers: complete, spot-checked against the printed tables, and found by our rows."""

import csv
from collections import Counter
from importlib.resources import files

import pytest

from vgid.config import TrialConfig
from vgid.paper.printed import (
    PAPER_BACKBONES,
    TABLE_7,
    closest_backbone,
    paper_row,
    paper_rows,
    repeated_rows,
)
from vgid.paper.tables import METRIC_LABELS, tables
from vgid.report.records import METHOD_LABELS


def test_every_table_has_its_rows_and_cells():
    rows = paper_rows()
    assert Counter(row.table for row in rows) == {1: 4, 2: 4, 3: 30, 4: 7, 5: 4, 6: 6, 8: 30, 9: 30}
    cells = {table: {len(r.scores) for r in rows if r.table == table} for table in range(1, 10)}
    assert cells == {1: {4}, 2: {6}, 3: {9}, 4: {9}, 5: {9}, 6: {6}, 7: set(), 8: {9}, 9: {9}}
    assert {row.backbone for row in rows} == set(PAPER_BACKBONES)
    names = [(r.table, r.backbone, r.setting, r.method) for r in rows]
    assert len(set(names)) == len(names)
    ratios = {row.table: row.forget_ratio for row in rows}
    assert ratios == {1: 5, 2: 5, 3: 5, 4: 5, 5: 5, 6: 5, 8: 10, 9: 15}


def test_shares_lie_between_0_and_1_and_no_column_is_unknown():
    assert all(0 <= value <= 1 for row in paper_rows() for value in row.scores.values())
    text = files("vgid.paper").joinpath("paper_tables.csv").read_text()
    header = next(csv.reader([text.splitlines()[0]]))
    assert set(header) == {
        "table",
        "backbone",
        "forget_ratio_percent",
        "setting",
        "method",
        *(
            f"{split}_{metric}"
            for split in ("forget", "test", "retain")
            for metric in METRIC_LABELS
        ),
    } - {"retain_bleu"}


@pytest.mark.parametrize(
    ("table", "backbone", "method", "setting", "score", "printed"),
    [
        (1, "LLaVA-1.5-7B", "Polite", "", "test_bleu", 0.046),
        (2, "LLaVA-1.5-7B", "Dual-modal", "", "forget_classification", 0.35),
        (3, "LLaVA-1.5-13B", "GA_Diff", "", "test_classification", 0.0333),
        (3, "Qwen2.5-VL-3B", "Vgid", "", "retain_cloze", 0.0101),
        (4, "LLaVA-1.5-7B", "gaussian sigma=0.8", "", "forget_rougeL", 0.409),
        (5, "LLaVA-1.5-7B", "Declarative", "", "forget_rougeL", 0.112),
        (6, "LLaVA-1.5-7B", "Vgid", "w/ Reverse Attack", "test_rougeL", 0.15),
        (8, "LLaVA-1.5-13B", "RMU", "", "retain_rougeL", 0.287),
        (9, "LLaVA-1.5-7B", "PO", "", "forget_cloze", 0.2876),
    ],
)
def test_spot_values(table, backbone, method, setting, score, printed):
    row = paper_row(table, backbone, method, setting)
    assert row is not None and row.scores[score] == printed


def test_table_7_is_the_paper_s():
    assert TABLE_7 == {
        "optimizer": "AdamW",
        "learning_rate": 2e-5,
        "batch_size": 4,
        "epochs": 1,
        "max_sequence_length": 384,
    }


def test_each_row_of_our_tables_finds_its_own_in_the_paper():
    ours = tables({method: TrialConfig(method=method) for method in METHOD_LABELS})
    assert set(ours) == {1, 2, 3, 4, 5, 6, 8, 9}
    for table in ours.values():
        found = set()
        for row in table.rows:
            printed = paper_row(table.number, "LLaVA-1.5-7B", row.paper, row.setting)
            assert printed is not None, (table.number, row.label)
            assert printed.forget_ratio == table.forget_ratio
            assert set(printed.scores) == set(table.metrics)
            found.add((printed.method, printed.setting))
        there = {
            (r.method, r.setting)
            for r in paper_rows()
            if r.table == table.number and r.backbone == "LLaVA-1.5-7B"
        }
        assert found == there


@pytest.mark.parametrize(
    ("name", "table", "beside"),
    [
        ("llava-1.5-13b", 3, "LLaVA-1.5-13B"),
        ("llava-1.5-13b", 4, "LLaVA-1.5-7B"),
        ("qwen2.5-vl-3b", 9, "Qwen2.5-VL-3B"),
        ("tiny-qwen2.5-vl", 8, "Qwen2.5-VL-3B"),
        ("tiny-qwen2.5-vl", 1, "LLaVA-1.5-7B"),
        ("tiny-llava", 3, "LLaVA-1.5-7B"),
    ],
)
def test_which_of_the_paper_s_backbones_stands_beside(name, table, beside):
    assert closest_backbone(name, table) == beside


def test_the_row_that_the_paper_prints_for_two_models_is_found():
    ((first, second),) = repeated_rows()
    assert (first.table, first.backbone, first.method) == (8, "LLaVA-1.5-7B", "RMU")
    assert (second.table, second.backbone, second.method) == (9, "Qwen2.5-VL-3B", "RMU")


def test_a_row_that_the_paper_lacks_is_none():
    assert paper_row(3, "LLaVA-1.5-7B", "DUET") is None
    assert paper_row(7, "LLaVA-1.5-7B", "GA") is None
