"""The numbers that the VGID paper (arXiv 2606.00105) prints, as typed rows.

``paper_tables.csv`` holds Tables 1 to 6, 8 and 9 cell by cell, percentages as shares. Table 7, the
baselines' training settings, is ``TABLE_7``.
"""

import csv
import itertools
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

PAPER_BACKBONES = ("LLaVA-1.5-7B", "LLaVA-1.5-13B", "Qwen2.5-VL-3B")

TABLE_7: dict[str, str | float | int] = {
    "optimizer": "AdamW", "learning_rate": 2e-5, "batch_size": 4, "epochs": 1,
    "max_sequence_length": 384,
}  # fmt: skip
"""The baselines' training settings, the same in its columns for all three backbones."""


class PaperRow(NamedTuple):
    """One row of one of the paper's tables, all named as there but the scores.

    ``setting`` is the block of the table, such as ``w/ Reverse Attack``; empty where it has none.
    """

    table: int
    backbone: str
    forget_ratio: int
    setting: str
    method: str
    scores: Mapping[str, float]


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """All rows, in the order of the paper."""
    text = files("vgid.paper").joinpath("paper_tables.csv").read_text(encoding="utf-8")
    names = ("table", "backbone", "forget_ratio_percent", "setting", "method")
    rows = []
    for row in csv.DictReader(text.splitlines()):
        table, backbone, ratio, setting, method = (row.pop(name) for name in names)
        scores = {name: float(cell) for name, cell in row.items() if cell}
        rows.append(PaperRow(int(table), backbone, int(ratio), setting, method, scores))
    return tuple(rows)


def paper_row(table: int, backbone: str, method: str, setting: str = "") -> PaperRow | None:
    """One row by its names in the paper, None if the paper does not have it."""
    wanted = (table, backbone, method, setting)
    rows = (r for r in paper_rows() if (r.table, r.backbone, r.method, r.setting) == wanted)
    return next(rows, None)


def closest_backbone(name: str, table: int) -> str:
    """The paper's backbone that one of ours stands beside in a table.

    Itself where the table has it, else the one of its architecture, else LLaVA-1.5-7B, which every
    table has.
    """
    folded = name.lower()
    itself = next((p for p in PAPER_BACKBONES if p.lower() == folded), None)
    wanted = itself or ("Qwen2.5-VL-3B" if "qwen" in folded else "LLaVA-1.5-7B")
    there = any((row.table, row.backbone) == (table, wanted) for row in paper_rows())
    return wanted if there else "LLaVA-1.5-7B"


def repeated_rows() -> list[tuple[PaperRow, PaperRow]]:
    """Pairs of rows for different backbones that agree in nine cells or more: one is a copy."""
    pairs = itertools.combinations([row for row in paper_rows() if len(row.scores) >= 9], 2)
    return [(a, b) for a, b in pairs if a.backbone != b.backbone and a.scores == b.scores]
