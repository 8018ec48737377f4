import json
import re
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from tests.tiny_benchmark import SHARD, WHO, encoded, picture, write_tiny
from vgid.data.benchmark import Benchmark
from vgid.data.check import check_benchmark
from vgid.errors import InputError


def defects_of(root: Path) -> list[tuple[str, int | None, str]]:
    return [(d.config, d.row, d.field) for d in check_benchmark(root).defects]


def huge_png() -> bytes:
    """A valid header of 60,000 x 60,000 pixels and no pixels."""
    small = encoded(Image.new("1", (1, 1)))
    body = b"IHDR" + struct.pack(">II", 60_000, 60_000) + small[24:29]
    return small[:12] + body + struct.pack(">I", zlib.crc32(body)) + small[33:]


def test_counts_of_a_sound_benchmark(tmp_path: Path):
    report = check_benchmark(write_tiny(tmp_path)).model_dump(mode="json")
    assert report["defects"] == []
    assert list(report["configs"]) == [
        "Full_Set",
        "ft_Data",
        *("forget_5", "forget_10", "forget_15"),
        *("retain_95", "retain_90", "retain_85"),
        "Test_Set",
        "Retain_Set",
    ]
    assert report["configs"]["Test_Set"] == {
        "people": 3,
        "images": 6,
        "questions": {
            "generation": {"image": 6, "text": 3},
            "cloze": {"image": 3, "text": 3},
            "classification": {"image": 6, "text": 3},
        },
        "training_pairs": 0,
        "questions_left_out": 0,
        "people_left_out": 0,
        "in_training": 3,
    }
    training = report["configs"]["ft_Data"]
    assert (training["people"], training["images"], training["training_pairs"]) == (3, 3, 3)


def test_questions_that_stand_in_the_training_pairs_are_counted(tmp_path: Path):
    def retype(rows):
        rows[0]["metadata"] = json.dumps(
            [
                {"Question": "who  IS\tthis? ", "Answer": "Fay"},
                {"Question": "What does Fay 007 do?", "Answer": "A nurse."},
            ]
        )
        rows[1]["metadata"] = json.dumps([{"Question": "Another one?", "Answer": "A nurse."}])

    configs = check_benchmark(write_tiny(tmp_path, {"ft_Data": retype})).configs
    assert configs["forget_5"].in_training == 2
    assert configs["retain_95"].in_training == 1  # 009's only; 008's is another question
    assert configs["Retain_Set"].in_training == configs["ft_Data"].in_training == 0


# One defect a row: where it is put, and where it must be found.


def _choice(row):
    return row["Classification_Task"]["Pure_Text_Questions"][0]


ROW_DEFECTS = {
    "wrong letter": (
        "retain_95",
        1,
        lambda row: _choice(row).update(Correct_Answer="E"),
        "Classification_Task.Pure_Text_Questions[0].Correct_Answer",
        "none of the options",
    ),
    "lower-case letter": (
        "Full_Set",
        2,
        lambda row: _choice(row).update(Correct_Answer="b"),
        "Classification_Task.Pure_Text_Questions[0].Correct_Answer",
        "none of the options",
    ),
    "no letter": (
        "Full_Set",
        2,
        lambda row: _choice(row).update(Correct_Answer=None),
        "Classification_Task.Pure_Text_Questions[0].Correct_Answer",
        "empty",
    ),
    "letter of a missing option": (
        "Test_Set",
        0,
        lambda row: _choice(row)["Options"].update(B=None),
        "Classification_Task.Pure_Text_Questions[0].Correct_Answer",
        "none of the options",
    ),
    "blank option": (
        "Test_Set",
        0,
        lambda row: _choice(row)["Options"].update(D=" "),
        "Classification_Task.Pure_Text_Questions[0].Options.D",
        "empty",
    ),
    "empty generation answer": (
        "forget_10",
        0,
        lambda row: row["Generation_Task"][1].update(Ground_Truth=""),
        "Generation_Task[1].Ground_Truth",
        "empty",
    ),
    "missing cloze answer": (
        "forget_10",
        0,
        lambda row: row["Mask_Task"][0].update(Ground_Truth=None),
        "Mask_Task[0].Ground_Truth",
        "empty",
    ),
    "empty question": (
        "Retain_Set",
        0,
        lambda row: row["Generation_Task"][2].update(Question="\n"),
        "Generation_Task[2].Question",
        "empty",
    ),
    "cloze without a blank": (
        "retain_85",
        1,
        lambda row: row["Mask_Task"][1].update(Question="Fay 009 is a nurse."),
        "Mask_Task[1].Question",
        "no blank",
    ),
    "unknown type": (
        "retain_90",
        0,
        lambda row: row["Mask_Task"][1].update(Type="Video"),
        "Mask_Task[1].Type",
        "Image_Textual, Pure_Text",
    ),
    "path-like ID": (
        "Retain_Set",
        0,
        lambda row: row.update(ID="../../etc"),
        "ID",
        "looks like a path",
    ),
    "empty ID": ("Retain_Set", 0, lambda row: row.update(ID=None), "ID", "empty"),
    "torn image": (
        "retain_90",
        1,
        lambda row: row["image"].update(bytes=picture("009")[:50]),
        "image",
        "cannot be read",
    ),
    "torn pose": (
        "Test_Set",
        1,
        lambda row: row["images"][1].update(bytes=b"no image"),
        "images[1]",
        "cannot be read",
    ),
    "oversized image": (
        "ft_Data",
        1,
        lambda row: row["image"].update(bytes=huge_png()),
        "image",
        "more than 50,000,000 pixels",
    ),
    "image without bytes": (
        "Full_Set",
        0,
        lambda row: row["image"].update(bytes=None),
        "image",
        "no bytes",
    ),
    "no image": ("Full_Set", 0, lambda row: row.update(image=None), "image", "no image"),
    "no poses": ("Test_Set", 2, lambda row: row.update(images=[]), "images", "no image"),
    "broken metadata": (
        "ft_Data",
        2,
        lambda row: row.update(metadata='[{"Question": "Who'),
        "metadata",
        "not valid JSON",
    ),
    "nested metadata bomb": (
        "ft_Data",
        2,
        lambda row: row.update(metadata="[" * 100_000),
        "metadata",
        "not valid JSON",
    ),
    "missing metadata": (
        "ft_Data",
        0,
        lambda row: row.update(metadata=None),
        "metadata",
        "not valid JSON",
    ),
    "metadata of another shape": (
        "ft_Data",
        0,
        lambda row: row.update(metadata='{"Question": "Who?"}'),
        "metadata",
        "not a list",
    ),
    "pair without an answer": (
        "ft_Data",
        0,
        lambda row: row.update(metadata=json.dumps([{"Question": "Who?"}])),
        "metadata[0].Answer",
        "empty",
    ),
    "pair that is no object": (
        "ft_Data",
        0,
        lambda row: row.update(metadata=json.dumps([{"Question": "Who?", "Answer": [3]}])),
        "metadata[0].Answer",
        "no text",
    ),
}


@pytest.mark.parametrize("name", ROW_DEFECTS)
def test_each_defect_of_a_row_is_found(tmp_path: Path, name: str):
    config, row, damage, field, problem = ROW_DEFECTS[name]
    root = write_tiny(tmp_path, {config: lambda rows: damage(rows[row])})
    (defect,) = check_benchmark(root).defects
    assert (defect.config, defect.row, defect.field) == (config, row, field)
    assert problem in defect.problem
    assert not re.search("Fay|nurse|Who", defect.problem)


def test_duplicate_id(tmp_path: Path):
    root = write_tiny(tmp_path, {"Full_Set": lambda rows: rows.append(dict(rows[0]))})
    assert defects_of(root) == [("Full_Set", 3, "ID")]


def test_of_two_rows_of_a_person_the_reader_leaves_out_what_the_check_counts(tmp_path: Path):
    def spoil(rows):
        rows.append(dict(rows[0]))
        rows[0]["image"] = {"bytes": b"torn", "path": None}

    root = write_tiny(tmp_path, {"retain_95": spoil})
    benchmark = Benchmark.open(root, skip_defects=True)
    assert [person.id for person in benchmark.retain(5)] == ["009"]
    assert benchmark.left_out == {"retain_95": {"questions": 0, "people": 2}}
    report = check_benchmark(root, stops=lambda root, broken: [], skipping=True)
    assert report.configs["retain_95"].people_left_out == 2 and report.defects == []
    assert [(d.row, d.field) for d in report.left_out] == [(0, "image"), (2, "ID")]


def test_overlap_of_forget_and_retain(tmp_path: Path):
    root = write_tiny(tmp_path, {"retain_90": lambda rows: rows[1].update(ID="007")})
    (defect,) = check_benchmark(root).defects
    assert (defect.config, defect.row, defect.field) == ("forget_10", 0, "ID")
    assert "overlap: row 1 of retain_90" in defect.problem


@pytest.mark.parametrize("config", ["ft_Data", "Test_Set", "Full_Set"])
def test_forget_people_missing_elsewhere(tmp_path: Path, config: str):
    root = write_tiny(tmp_path, {config: lambda rows: rows.pop(0)})
    report = check_benchmark(root)
    found = [(d.config, d.row, d.field, d.problem) for d in report.defects]
    problem = f"the person is missing in {config}"
    assert found == [(f"forget_{ratio}", 0, "ID", problem) for ratio in (5, 10, 15)]


def test_retain_people_need_training_metadata(tmp_path: Path):
    root = write_tiny(tmp_path, {"ft_Data": lambda rows: rows.pop(2)})
    assert defects_of(root) == [(f"retain_{ratio}", 1, "ID") for ratio in (95, 90, 85)]


@pytest.mark.parametrize("column", ["ID", "image", "Generation_Task", "Classification_Task"])
def test_missing_column(tmp_path: Path, column: str):
    path = write_tiny(tmp_path) / "retain_95" / SHARD
    pq.write_table(pq.read_table(path).drop_columns(column), path)
    report = check_benchmark(tmp_path)
    assert defects_of(tmp_path) == [("retain_95", None, column)]
    assert report.configs["retain_95"].people == 2
    assert report.configs["retain_95"].questions["cloze"]["image"] == 2


def test_missing_metadata_column(tmp_path: Path):
    path = write_tiny(tmp_path) / "ft_Data" / SHARD
    pq.write_table(pq.read_table(path).drop_columns("metadata"), path)
    assert defects_of(tmp_path) == [("ft_Data", None, "metadata")]


def test_columns_of_a_wrong_type(tmp_path: Path):
    path = write_tiny(tmp_path) / "forget_5" / SHARD
    table = pq.read_table(path)
    gap = pa.struct([("Question", pa.string()), ("Ground_Truth", pa.float64())])
    for name, values in {
        "ID": pa.array([7.0]),
        "image": pa.array(["a.png"]),
        "Mask_Task": pa.array([[{"Question": "__", "Ground_Truth": 1.0}]], pa.list_(gap)),
    }.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)
    fields = {field for _, row, field in defects_of(tmp_path) if row is None}
    assert fields == {"ID", "image", "Mask_Task[].Ground_Truth", "Mask_Task[].Type"}


def test_a_column_that_is_empty_throughout_is_no_defect(tmp_path: Path):
    """Writers give a column of empty lists no item type."""
    path = write_tiny(tmp_path) / "forget_5" / SHARD
    table = pq.read_table(path)
    place = table.schema.get_field_index("Mask_Task")
    pq.write_table(table.set_column(place, "Mask_Task", pa.array([[]])), path)
    assert defects_of(tmp_path) == []


def _doubled(table: pa.Table, column: str) -> pa.Table:
    return table.append_column(column, table[column])


def test_a_doubled_column_is_named(tmp_path: Path):
    path = write_tiny(tmp_path) / "retain_95" / SHARD
    pq.write_table(_doubled(pq.read_table(path), "Mask_Task"), path)
    (defect,) = check_benchmark(tmp_path).defects
    assert (defect.config, defect.row, defect.field) == ("retain_95", None, "Mask_Task")
    assert defect.problem == "the column is there more than once"


def test_what_nothing_reads_is_no_defect(tmp_path: Path):
    """The profile's columns, whatever is in them."""
    path = write_tiny(tmp_path, {"forget_5": lambda rows: rows[0].update(answer="")})
    path = path / "forget_5" / SHARD
    pq.write_table(_doubled(pq.read_table(path).drop_columns("question"), "biography"), path)
    assert defects_of(tmp_path) == []


def test_a_config_without_people_is_a_defect(tmp_path: Path):
    root = write_tiny(tmp_path, {"forget_5": lambda rows: rows.clear()})
    (defect,) = check_benchmark(root).defects
    assert (defect.config, defect.row, defect.problem) == (
        "forget_5",
        None,
        "the config holds no person",
    )
    with pytest.raises(InputError, match=r"forget_5: .*holds no person; `vgid data check"):
        Benchmark.open(root).forget(5)


def test_missing_config(tmp_path: Path):
    folder = write_tiny(tmp_path) / "Test_Set"
    (folder / SHARD).unlink()
    assert defects_of(tmp_path) == [("Test_Set", None, "train-*.parquet")]


def test_missing_shard(tmp_path: Path):
    folder = write_tiny(tmp_path) / "Retain_Set"
    (folder / SHARD).rename(folder / "train-00001-of-00002.parquet")
    assert defects_of(tmp_path) == [("Retain_Set", None, "train-00000-of-00002.parquet")]


@pytest.mark.parametrize("damage", ["footer", "empty", "pages"])
def test_torn_file_hides_nothing_elsewhere(tmp_path: Path, damage: str):
    root = write_tiny(
        tmp_path,
        {
            "Test_Set": lambda rows: rows[1]["Generation_Task"][0].update(Ground_Truth=""),
            "Retain_Set": lambda rows: rows[0].update(ID="a/b"),
        },
    )
    path = root / "Full_Set" / SHARD
    data = path.read_bytes()
    path.write_bytes(
        {"footer": data[:-10], "empty": b"", "pages": data[:4] + bytes(2000) + data[2004:]}[damage]
    )
    assert defects_of(root) == [
        ("Full_Set", None, SHARD),
        ("Test_Set", 1, "Generation_Task[0].Ground_Truth"),
        ("Retain_Set", 0, "ID"),
    ]


def test_every_defect_of_one_row_is_found(tmp_path: Path):
    def spoil(rows):
        rows[0].update(ID="..")
        rows[0]["image"]["bytes"] = b"GIF89a"
        rows[0]["Generation_Task"][0].update(Ground_Truth="", Type="?")
        _choice(rows[0]).update(Correct_Answer="")

    root = write_tiny(tmp_path, {"Retain_Set": spoil})
    assert {field for _, _, field in defects_of(root)} == {
        "ID",
        "image",
        "Generation_Task[0].Ground_Truth",
        "Generation_Task[0].Type",
        "Classification_Task.Pure_Text_Questions[0].Correct_Answer",
    }


def test_rows_are_counted_over_shards(tmp_path: Path):
    folder = write_tiny(tmp_path) / "Test_Set"
    table = pq.read_table(folder / SHARD)
    (folder / SHARD).unlink()
    pq.write_table(table.slice(0, 2), folder / "train-00000-of-00002.parquet")
    broken = table.slice(2).to_pylist()
    broken[0]["Mask_Task"][0]["Question"] = ""
    last = pa.Table.from_pylist(broken, schema=table.schema)
    pq.write_table(last, folder / "train-00001-of-00002.parquet")
    assert defects_of(tmp_path) == [("Test_Set", 2, "Mask_Task[0].Question")]


def test_missing_folder(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        check_benchmark(tmp_path / "nowhere")


def test_table_for_people_shows_counts_and_defects(tmp_path: Path):
    root = write_tiny(
        tmp_path, {"Retain_Set": lambda rows: rows[0]["Generation_Task"][2].update(Question="")}
    )
    console = Console(width=120, record=True)
    check_benchmark(root).print(console)
    text = console.export_text()
    assert all(config in text for config in WHO)
    assert "Generation_Task[2].Question" in text
    assert "the question is empty" in text
