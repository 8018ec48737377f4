"""Every table, figure and claim at reduced size, from the command line to the index page."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from studies.paper_tables import main
from tests.small_benchmark import write_small
from vgid.config import TrialConfig
from vgid.paper.run import numbers
from vgid.paper.settings import write_settings
from vgid.report.records import METHOD_LABELS

SMALL = {"epochs": 2, "lora_rank": 2, "train_tasks": ("cloze",), "learning_rate": 2e-3}
METHODS = ("ga", "icu_t", "vgid")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    trials = {method: TrialConfig(method=method, **SMALL) for method in METHODS}
    write_settings(root / "settings.json", "tiny-llava", trials)
    write_small(root / "data", more=1)
    assert run(root) == 0
    return root / "out"


def run(root: Path, *more: str) -> int:
    return main(
        [
            *("--output", str(root / "out"), "--settings", str(root / "settings.json")),
            *("--data", str(root / "data")),
            *("--methods", ",".join(METHODS), "--seeds", "1", "--retain-people", "4"),
            *("--processes", "1", *more),
        ]
    )


def cells(output: Path, number: int) -> dict[tuple[str, str], dict[str, str]]:
    rows = csv.DictReader(io.StringIO((output / f"table_{number}.csv").read_text()))
    return {(row["row"], row["score"]): row for row in rows}


def test_every_table_is_filled(output):
    rows = {1: 4, 2: 4, 3: 4, 4: 7, 5: 4, 6: 6, 8: 4, 9: 4}
    for number, count in rows.items():
        found = cells(output, number)
        assert len({row for row, _ in found}) == count
        for (row, score), cell in found.items():
            assert 0 <= float(cell["seed_0"]) <= 1, (number, row, score)
            assert cell["mean"] == cell["seed_0"] and cell["seeds"] == "1"
            assert cell["low"] == cell["high"] == ""  # one seed has no interval
            assert int(cell["questions"]) > 0
        text = (output / f"table_{number}.md").read_text()
        assert text.startswith(f"### Table {number}: ") and "failed" not in text
    assert "| VGID | AdamW | 0.002 | 12 | 2 |" in (output / "table_7.md").read_text()


def test_all_rows_have_the_same_people_and_questions(output):
    base = {n: cells(output, n)["base", "forget_rougeL"] for n in (1, 2, 3, 4, 5, 6)}
    assert len({(cell["seed_0"], cell["questions"]) for cell in base.values()}) == 1
    for number in (3, 8, 9):
        found = cells(output, number)
        assert len({cell["questions"] for (_, s), cell in found.items() if "rougeL" in s}) <= 3
    vgid = cells(output, 3)["vgid", "forget_rougeL"]["seed_0"]
    for number, row in ((4, "random"), (5, "strict"), (6, "vgid")):
        assert cells(output, number)[row, "forget_rougeL"]["seed_0"] == vgid
    asked = [int(cells(output, n)["base", "forget_rougeL"]["questions"]) for n in (3, 8, 9)]
    assert asked[0] < asked[1] < asked[2]


def test_the_paper_s_numbers_stand_beside(output):
    assert cells(output, 6)["vgid_reverse", "test_rougeL"]["paper"] == "0.15"
    assert cells(output, 9)["ga", "retain_rougeL"]["paper"] == "0.468"
    assert " / 0.200 |" in (output / "table_4.md").read_text()


def test_the_claims_are_judged_and_one_seed_decides_none(output):
    text = (output / "claims.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| (")]
    assert len(lines) == 14
    assert all("| undecided |" in line for line in lines)
    assert "built into the embedded backbone" in text


def test_the_figures_are_drawn(output):
    for number in (2, 4, 5, 6, 7):
        image = Image.open(output / f"figure_{number}_tiny-llava.png")
        assert image.width > 900 and len(image.convert("RGB").getcolors(1 << 24)) > 20
        page = (output / f"figure_{number}_tiny-llava.html").read_text()
        assert re.findall(r'src="([^"]+)"', page) == ["plotly.min.js"]
        assert "Plotly.newPlot" in page
    assert (output / "plotly.min.js").stat().st_size > 1_000_000
    page = (output / "figure_4_tiny-llava.html").read_text()
    assert all(METHOD_LABELS[method] in page for method in METHODS)
    for ratio in (5, 10, 15):
        assert f"{ratio} % forgotten" in page


def test_the_index_leads_to_everything_and_warns(output):
    markdown = (output / "index.md").read_text()
    page = (output / "index.html").read_text()
    for text in (markdown, page):
        assert "retain columns" in text and "so one of them is a copy" in text
        assert "built in by its training mix" in text
        for number in range(1, 10):
            assert f"Table {number}: " in text
    linked = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    linked |= set(re.findall(r"\]\(([^)]+)\)", markdown))
    assert linked and all((output / name).is_file() for name in linked)


def test_tables_json_says_what_it_was_made_with(output):
    summary = json.loads((output / "tables.json").read_text())
    assert summary["experiments"] == summary["experiments_run"] == 30
    assert summary["settings"]["tiny-llava"]["vgid"]["epochs"] == 2
    assert set(summary["base"]["tiny-llava"]) == {"data_sha256", "base_revision"}
    assert summary["versions"]["torch"]
    assert all((output / name).is_file() for name in summary["files"])


def test_a_second_run_computes_nothing_and_writes_the_same(output, capsys):
    names = ("table_3.csv", "claims.md", "index.md", "index.html", "figure_4_tiny-llava.png")
    before = {name: (output / name).read_bytes() for name in names}
    assert run(output.parent) == 0
    assert "0 experiments run" in capsys.readouterr().out
    assert {name: (output / name).read_bytes() for name in names} == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--tables", "10"], "tables.0: input should be less than or equal to 9, got 10"),
        (["--tables", "3-1"], "no list of tables"),
        (["--methods", "duet"], "methods"),
        (["--seeds", "0"], "seeds"),
        (["--backbone", "no-such"], "no-such"),
        (["--backbone", "llava-1.5-7b", "--settings", "nowhere.json"], "nowhere.json"),
        (["--backbone", "tiny-llava", "llava-1.5-7b", "--model-path", "x"], "--model-path"),
        (["--colour", "red"], "see --help"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, more, sentence):
    assert main(["--output", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_lists_of_tables():
    assert numbers("1-9") == tuple(range(1, 10))
    assert numbers("3, 8-9") == (3, 8, 9)
