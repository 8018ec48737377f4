"""The same people as other writers store them: pandas, polars, ``datasets``."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny_benchmark import SHARD, WHO, write_tiny
from vgid.data.benchmark import Benchmark
from vgid.data.check import check_benchmark
from vgid.data.layout import CONFIGS

Store = Callable[[pa.Table], pa.Table]


def rewritten(root: Path, store: Store) -> Path:
    """The tiny benchmark, with every table changed by ``store``."""
    write_tiny(root)
    for config in WHO:
        path = root / config / SHARD
        pq.write_table(store(pq.read_table(path)), path)
    return root


def everything(root: Path) -> list[object]:
    """All that is read of a folder."""
    benchmark = Benchmark.open(root)
    people = [benchmark.full(), benchmark.test(), benchmark.celebrities()]
    people += [
        read(ratio) for ratio in (5, 10, 15) for read in (benchmark.forget, benchmark.retain)
    ]
    return [*people, benchmark.training_pairs()]


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def raw_images(table: pa.Table) -> pa.Table:
    for name in {"image", "images"} & set(table.column_names):
        cells = [
            cell["bytes"] if name == "image" else [pose["bytes"] for pose in cell]
            for cell in table[name].to_pylist()
        ]
        table = replaced(table, name, pa.array(cells))
    return table


def through_pandas(table: pa.Table) -> pa.Table:
    frame = table.to_pandas()
    for name in {"ID", "answer", "metadata"} & set(table.column_names):
        frame[name] = frame[name].astype("category")
    assert isinstance(frame["ID"].dtype, pd.CategoricalDtype)
    written = pa.Table.from_pandas(frame)
    assert pa.types.is_dictionary(written.schema.field("ID").type)
    return written


def _large(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_string(kind):
        return pa.large_string()
    if types.is_binary(kind):
        return pa.large_binary()
    if types.is_struct(kind):
        return pa.struct([(child.name, _large(child.type)) for child in kind])
    return pa.large_list(_large(kind.value_type))


def _view(kind: pa.DataType) -> pa.DataType:
    """Views of texts and images outside lists, in which pyarrow cannot write them, and of lists."""
    types = pa.types
    if types.is_string(kind):
        return pa.string_view()
    if types.is_binary(kind):
        return pa.binary_view()
    if types.is_struct(kind):
        return pa.struct([(child.name, _view(child.type)) for child in kind])
    return pa.list_view(kind.value_type)


def as_types(of: Callable[[pa.DataType], pa.DataType]) -> Store:
    def store(table: pa.Table) -> pa.Table:
        schema = pa.schema([(field.name, of(field.type)) for field in table.schema])
        return pa.Table.from_pylist(table.to_pylist(), schema=schema)

    return store


def lists_in_dictionaries(table: pa.Table) -> pa.Table:
    """What ``datasets`` makes of ``Sequence({"Question": Value("string"), ...})``."""

    def turned(entries: list[dict[str, object]]) -> dict[str, list[object]]:
        return {name: [entry[name] for entry in entries] for name in entries[0]}

    if "metadata" in table.column_names:
        pairs = [turned(json.loads(text)) for text in table["metadata"].to_pylist()]
        return replaced(table, "metadata", pa.array(pairs))
    for name in ("Generation_Task", "Mask_Task"):
        table = replaced(table, name, pa.array([turned(v) for v in table[name].to_pylist()]))
    choices = [
        {form: turned(entries) for form, entries in cell.items()}
        for cell in table["Classification_Task"].to_pylist()
    ]
    return replaced(table, "Classification_Task", pa.array(choices))


def json_of_lists(table: pa.Table) -> pa.Table:
    if "metadata" not in table.column_names:
        return table
    turned = lists_in_dictionaries(table)["metadata"].to_pylist()
    return replaced(table, "metadata", pa.array([json.dumps(lists) for lists in turned]))


STORES: dict[str, Store] = {
    "images as bytes": raw_images,
    "pandas categories": through_pandas,
    "large types": as_types(_large),
    "view types": as_types(_view),
    "dictionaries of lists": lists_in_dictionaries,
    "JSON of dictionaries of lists": json_of_lists,
}


@pytest.mark.parametrize("name", STORES)
def test_the_same_people_are_read(tmp_path: Path, name: str):
    expected = everything(write_tiny(tmp_path / "plain"))
    root = rewritten(tmp_path / "other", STORES[name])
    assert check_benchmark(root).defects == []
    assert everything(root) == expected


def test_whole_numbers_are_read_as_text(tmp_path: Path):
    """IDs, options and answers that a writer took for numbers."""

    def store(table: pa.Table) -> pa.Table:
        table = replaced(table, "ID", pa.array([int(i) for i in table["ID"].to_pylist()]))
        if "metadata" in table.column_names:
            pairs = json.dumps([{"Question": "Born?", "Answer": 1985}])
            return replaced(table, "metadata", pa.array([pairs] * table.num_rows))
        cells = table["Classification_Task"].to_pylist()
        for cell in cells:
            for entry in cell["Image_Textual_Questions"] + cell["Pure_Text_Questions"]:
                entry["Options"] = {"A": 1984, "B": 1985}
        return replaced(table, "Classification_Task", pa.array(cells))

    root = rewritten(tmp_path, store)
    assert check_benchmark(root).defects == []
    benchmark = Benchmark.open(root)
    (person,) = benchmark.forget(5)
    assert (person.id, person.questions[0].options) == ("7", {"A": "1984", "B": "1985"})
    assert benchmark.training_pairs()["8"][0].answer == "1985"


def test_fractions_are_no_text(tmp_path: Path):
    def store(table: pa.Table) -> pa.Table:
        if "metadata" in table.column_names:
            return table
        cells = table["Classification_Task"].to_pylist()
        for cell in cells:
            cell["Image_Textual_Questions"] = []
            cell["Pure_Text_Questions"][0]["Options"] = {"A": 1.5, "B": 2.5}
        return replaced(table, "Classification_Task", pa.array(cells))

    defects = check_benchmark(rewritten(tmp_path, store)).defects
    fields = [f"Classification_Task.Pure_Text_Questions[].Options.{letter}" for letter in "AB"]
    found = [(d.config, d.row, d.field) for d in defects]
    assert found == [(c, None, f) for c in CONFIGS if c != "ft_Data" for f in fields]
    assert {d.problem for d in defects} == {"the type is double, not string"}


def test_lists_of_unequal_length_leave_fields_empty(tmp_path: Path):
    def store(table: pa.Table) -> pa.Table:
        if "metadata" in table.column_names:
            return table
        table = lists_in_dictionaries(table)
        cells = table["Mask_Task"].to_pylist()
        for cell in cells:
            cell["Ground_Truth"].pop()
        return replaced(table, "Mask_Task", pa.array(cells))

    defects = check_benchmark(rewritten(tmp_path, store)).defects
    assert {(d.field, d.problem) for d in defects} == {
        ("Mask_Task[1].Ground_Truth", "the answer is empty")
    }
