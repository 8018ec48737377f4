"""One table for people and machines: on a terminal, in Markdown, on a page, and as CSV.

rich is imported when a table is made for a terminal.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vgid.results import Score

if TYPE_CHECKING:
    from rich.table import Table

Mark = Literal["chosen", "base", "wrong"]
"""What makes a row stand out; also its class on a page."""

_STYLES: dict[Mark, str] = {"chosen": "bold", "base": "dim", "wrong": "red"}

FOUR_PARTS = ("", "_low", "_high", "_n")
"""What stands behind a score's name in the headers of its ``four_cells``."""


def as_text(value: Any) -> str:
    """One value as a CSV cell or a parameter: numbers exactly, lists joined by ``+``."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case float():
            return repr(float(value))
        case tuple():
            return "+".join(map(str, value))
    return str(value)


def four_cells(score: Score | None) -> list[float | None]:
    """Value, low, high and n for a CSV file, empty where there is none."""
    parts = [None] * 4 if score is None else [score.value, score.low, score.high, score.n]
    return [None if part is None or math.isnan(part) else part for part in parts]


@dataclass(frozen=True)
class Grid:
    """A table; a cell is a text, a number, a score with its interval, or None for an empty one.

    ``caption`` stands above it, ``notes`` are sentences below it, ``marks`` are rows that stand
    out, by their number from 0.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    notes: Sequence[str] = ()
    marks: Mapping[int, Mark] = field(default_factory=dict)

    def rich(self) -> "Table":
        """For a terminal."""
        from rich.markup import escape as plain
        from rich.table import Table

        table = Table(title=self.caption or None, title_justify="left")
        texts = self._texts
        for number, title in enumerate(self.header):
            whole = not any(" " in row[number] for row in texts)  # others make room first
            side = self._justify[number]
            table.add_column(title, justify=side, no_wrap=whole, overflow="fold")
        for number, row in enumerate(texts):
            mark = self.marks.get(number)
            if mark == "base":
                table.add_section()
            table.add_row(*map(plain, row), style=None if mark is None else _STYLES[mark])
        return table

    def markdown(self, gap: str = "") -> str:
        """As a Markdown table, with a caption as a section and ``gap`` before each number."""
        rules = ["---:" if side == "right" else "---" for side in self._justify]
        before = [gap if side == "right" else "" for side in self._justify]
        escaped = [[text.replace("|", "\\|") for text in row] for row in self._texts]
        rows = [
            [b + text if text else "" for b, text in zip(before, r, strict=True)] for r in escaped
        ]
        lines = [f"| {' | '.join(row)} |" for row in (self.header, rules, *rows)]
        caption = [f"### {self.caption}\n"] if self.caption else []
        return "\n".join([*caption, *lines, *(f"\n{note}\n" for note in self.notes)])

    def html(self) -> str:
        """As an HTML table, with a caption as a section; rows have their marks as classes."""
        from vgid.report.page import rendered

        kinds = [' class="number"' if side == "right" else "" for side in self._justify]
        given = {"grid": self, "kinds": kinds, "texts": self._texts}
        return rendered("vgid.report", "table.html.jinja", **given)

    def csv(self) -> bytes:
        """For machines: numbers exactly, without caption and notes."""
        text = io.StringIO(newline="")
        rows = ([as_text(cell) for cell in row] for row in self.rows)
        csv.writer(text, lineterminator="\n").writerows([self.header, *rows])
        return text.getvalue().encode()

    @property
    def _texts(self) -> list[list[str]]:
        return [[_shown(cell) for cell in row] for row in self.rows]

    @property
    def _justify(self) -> list[Literal["left", "right"]]:
        """Right for a column of numbers: one that has any."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        return [
            "right" if any(cell is not None and not isinstance(cell, str) for cell in column)
            else "left"
            for column in columns
        ]  # fmt: skip


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
