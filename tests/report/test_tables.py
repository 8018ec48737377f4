"""One table in its four forms, against rich, an HTML parser and the csv module."""

import csv
import io
from html.parser import HTMLParser

from rich.console import Console

from vgid.report.tables import Grid, four_cells
from vgid.results import Score

SCORE = Score(value=0.25, n=7, low=0.125, high=1 / 3)
GRID = Grid(
    ("name", "n", "score"),
    [("a|b", 7, SCORE), ("<i> [bold]", None, 0.5), ("base", 12, None)],
    "Title & more",
    ("a note",),
    {0: "chosen", 2: "base"},
)


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows, self.classes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
            self.classes.append(dict(attrs).get("class"))
        elif tag in ("td", "th"):
            self.rows[-1].append((dict(attrs).get("class"), ""))

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data.strip():
            kind, text = self.rows[-1][-1]
            self.rows[-1][-1] = (kind, text + data)


def test_on_a_terminal_numbers_stand_to_the_right_and_no_markup_is_read():
    stream = io.StringIO()
    Console(file=stream, width=60).print(GRID.rich())
    text = stream.getvalue()
    assert "Title & more" in text and "<i> [bold]" in text
    assert "0.250 [0.125, 0.333]" in text and "                0.500 " in text
    assert [column.justify for column in GRID.rich().columns] == ["left", "right", "right"]
    assert [row.style for row in GRID.rich().rows] == ["bold", None, "dim"]


def test_markdown_has_a_section_aligned_numbers_and_escaped_strokes():
    assert GRID.markdown().splitlines() == [
        "### Title & more",
        "",
        "| name | n | score |",
        "| --- | ---: | ---: |",
        "| a\\|b | 7 | 0.250 [0.125, 0.333] |",
        "| <i> [bold] |  | 0.500 |",
        "| base | 12 |  |",
        "",
        "a note",
    ]
    assert "| base | &emsp;12 |  |" in GRID.markdown(gap="&emsp;")
    assert Grid(("a",), [("x",)]).markdown() == "| a |\n| --- |\n| x |"


def test_a_page_gets_the_same_cells_with_marks_as_classes():
    page = GRID.html()
    assert page.startswith("<h3>Title &amp; more</h3>") and page.endswith("<p>a note</p>")
    found = Cells(page[: page.index("</table>")].split("<table>")[1])
    assert found.classes == [None, "chosen", None, "base"]
    assert [text for _, text in found.rows[1]] == ["a|b", "7", "0.250 [0.125, 0.333]"]
    assert [kind for kind, _ in found.rows[2]] == [None, "number", "number"]
    assert found.rows[2][0][1] == "<i> [bold]"


def test_csv_keeps_every_bit():
    grid = Grid(
        ("name", "low", *(f"s{p}" for p in "vlhn")), [("a,b", 0.1 + 0.2, *four_cells(SCORE))]
    )
    (row,) = csv.DictReader(io.StringIO(grid.csv().decode()))
    assert row["name"] == "a,b" and float(row["low"]) == 0.1 + 0.2
    assert (float(row["sh"]), row["sn"]) == (1 / 3, "7")
    assert four_cells(None) == [None] * 4 and four_cells(SCORE) == [0.25, 0.125, 1 / 3, 7]
