"""The MLLMU-Bench layout on disk: configs, column types, and the rows that are read from it.

Facts from the data card and code of https://github.com/franciscoliu/MLLMU-Bench: a folder per
config with parquet shards ``train-00000-of-00001.parquet``. Rows and defects come out of one
stream, so that reader and checker can never disagree about what is sound.

Writers differ in how they store the same rows. Read are also: an image as bytes alone, whole
numbers where text is expected, categories (pandas), large, view and fixed-size types (polars,
pyarrow), and a dictionary of lists for a list of dictionaries (``datasets``).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

FORGET_RATIOS = (5, 10, 15)
CONFIGS = (
    "Full_Set",
    "ft_Data",
    *(f"forget_{ratio}" for ratio in FORGET_RATIOS),
    *(f"retain_{100 - ratio}" for ratio in FORGET_RATIOS),
    "Test_Set",
    "Retain_Set",
)
"""Every config of the benchmark; ``ft_Data`` alone holds training metadata, not questions."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""One encoded image (PNG, JPEG, ...) and the file name it had, which may be null."""


def _texts(*names: str) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.string()) for name in names]


_OPTIONS = ("Options", pa.struct(_texts(*"ABCD")))
_CHOICES = pa.list_(pa.struct([*_texts("Question"), _OPTIONS, *_texts("Correct_Answer")]))
_OPEN_QUESTIONS = pa.list_(pa.struct(_texts("Question", "Ground_Truth", "Type")))
_FORMS = [(f"{form}_Questions", _CHOICES) for form in ("Image_Textual", "Pure_Text")]
_TASK_FIELDS = [
    ("Classification_Task", pa.struct(_FORMS)),
    ("Generation_Task", _OPEN_QUESTIONS),
    ("Mask_Task", _OPEN_QUESTIONS),
]
_PROFILE_FIELDS = _texts("ID", "biography", "question", "answer")

EVALUATION_SCHEMA = pa.schema([("image", IMAGE), *_PROFILE_FIELDS, *_TASK_FIELDS])
"""Columns of the forget, retain, full and celebrity configs."""

TEST_SCHEMA = pa.schema([("images", pa.list_(IMAGE)), *_PROFILE_FIELDS, *_TASK_FIELDS])

TRAINING_SCHEMA = pa.schema(
    [("image", pa.struct([("bytes", pa.binary())])), *_texts("ID", "metadata")]
)
"""Columns of ``ft_Data``; ``metadata`` is a JSON list of ``{"Question", "Answer"}``."""

IMAGE_COLUMNS = ("image", "images")
EVALUATION_COLUMNS = ("ID", *IMAGE_COLUMNS, *(name for name, _ in _TASK_FIELDS))
TRAINING_COLUMNS = ("ID", *IMAGE_COLUMNS, "metadata")
"""What is read. The profile (``biography``, ``question``, ``answer``) is not."""

# The last wins: the evaluation's image has a path too, which may be missing (`_OPTIONAL_FIELDS`).
_COLUMN_TYPES = {
    column.name: column.type for column in (*TRAINING_SCHEMA, *TEST_SCHEMA, *EVALUATION_SCHEMA)
}
_OPTIONAL_FIELDS = ("path",)  # ft_Data lacks it, and nothing here reads it
# What is read as a value of the layout's type, by ``_kind``.
_LIKE = {pa.string(): ("string", "int"), pa.binary(): ("binary",), IMAGE: ("binary",)}

_PAIRS = pa.list_(pa.struct(_texts("Question", "Answer")))
SHARD_NAME = re.compile(r"train-(\d+)-of-(\d+)\.parquet")
_ROWS_A_BATCH = 16  # rows carry megabytes of image each, so read few at a time


@dataclass(frozen=True)
class Defect:
    """Something wrong with a config.

    Attributes:
        row: 0-based over all shards, None for a whole file or column.
        field: column, or path within it such as ``Mask_Task[1].Ground_Truth``; or file name.
        problem: what is wrong, without any value of the data.
        question: ID of the question or training pair, None where more is concerned.
    """

    config: str
    row: int | None
    field: str
    problem: str
    question: Annotated[str | None, Field(exclude=True)] = None  # `field` tells people as much


@dataclass(frozen=True)
class Row:
    """One parquet row: its index over all shards, and the columns that have the right type."""

    index: int
    values: Mapping[str, Any]


def shard_paths(root: Path, config: str) -> list[Path]:
    """The parquet shards of a config in row order; empty when there are none."""
    folder = root / config
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name))


def holds_people(root: Path, config: str) -> bool:
    """Whether a config has somebody in it; a torn one counts, since reading it names the defect."""
    try:
        return any(pq.read_metadata(path).num_rows for path in shard_paths(root, config))
    except (pa.ArrowException, OSError, ValueError):
        return True


def read_rows(root: Path, config: str, columns: Sequence[str]) -> Iterator[Row | Defect]:
    """Stream a config: its rows in order, and file-level defects where they are met.

    Each column is required, except that ``image`` and ``images`` stand in for each other. Rows
    have those that can be read, their values in the layout's form. Defects are a missing config or
    shard, a torn file, a missing, doubled or ill-typed column, and a config without rows.
    """
    # A generator of both, not an exception a defect: a torn shard must not hide the next one.
    shards = shard_paths(root, config)
    if not shards:
        yield Defect(config, None, "train-*.parquet", "the config has no parquet file")
        return
    yield from _missing_shards(config, shards)
    first_row, torn = 0, False
    for path in shards:
        try:
            with pq.ParquetFile(path) as parquet:
                sound = {}
                for name in _wanted(columns, parquet.schema_arrow):
                    expected, mismatches = _column(name, parquet.schema_arrow)
                    yield from (Defect(config, None, field, what) for field, what in mismatches)
                    if not mismatches:
                        sound[name] = expected
                index = first_row
                first_row += parquet.metadata.num_rows
                for batch in parquet.iter_batches(_ROWS_A_BATCH, columns=list(sound)):
                    # A batch of no columns has no rows in to_pylist, but still so many people.
                    rows = batch.to_pylist() if sound else [{}] * batch.num_rows
                    for values in rows:
                        yield Row(index, {k: _fitted(v, sound[k]) for k, v in values.items()})
                        index += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            torn = True
            problem = f"the file cannot be read as parquet ({type(error).__name__})"
            yield Defect(config, None, path.name, problem)
    if first_row == 0 and not torn:
        yield Defect(config, None, "train-*.parquet", "the config holds no person")


def _fitted(value: Any, expected: pa.DataType) -> Any:
    """A value of a type that ``_mismatches`` passes, in the layout's form."""
    if pa.types.is_struct(expected) and value is not None:
        if isinstance(value, bytes):
            return {"bytes": value}
        known = {child.name: child.type for child in expected}
        return {name: _fitted(v, known.get(name, pa.string())) for name, v in value.items()}
    if pa.types.is_list(expected) and value is not None:
        entries = records(value) if isinstance(value, dict) else value
        return [_fitted(entry, expected.value_type) for entry in entries]
    return str(value) if isinstance(value, int) else value


def records(lists: Mapping[str, Sequence[Any] | None]) -> list[dict[str, Any]]:
    """A dictionary of lists as a list of dictionaries; beyond a list's end stands None."""
    rows = zip_longest(*(values or () for values in lists.values()))
    return [dict(zip(lists, row, strict=True)) for row in rows]


def _missing_shards(config: str, shards: Sequence[Path]) -> Iterator[Defect]:
    present, totals = zip(
        *(map(int, re.findall(r"\d+", path.name)) for path in shards), strict=True
    )
    if len(set(totals)) > 1:
        problem = "the shard names disagree about the number of shards"
        yield Defect(config, None, "train-*.parquet", problem)
        return
    for number in sorted(set(range(totals[0])).difference(present)):
        name = f"train-{number:05d}-of-{totals[0]:05d}.parquet"
        yield Defect(config, None, name, "the shard is missing")


def _wanted(columns: Sequence[str], schema: pa.Schema) -> list[str]:
    wanted = [name for name in columns if name not in IMAGE_COLUMNS]
    if len(wanted) < len(columns):
        wanted += [name for name in IMAGE_COLUMNS if name in schema.names] or ["image"]
    return wanted


def _column(name: str, schema: pa.Schema) -> tuple[pa.DataType, list[tuple[str, str]]]:
    """The layout's type of a column, and where the file's departs from it, as (field, problem)."""
    places, expected = schema.get_all_field_indices(name), _COLUMN_TYPES[name]
    if len(places) != 1:
        what = "is there more than once" if places else "is missing"
        return expected, [(name, f"the column {what}")]
    actual = schema.field(places[0]).type
    if name == "metadata" and pa.types.is_nested(actual):  # lists in place of their JSON
        expected = _PAIRS
    return expected, list(_mismatches(name, expected, actual))


def _kind(given: pa.DataType) -> str:
    """``string``, ``binary``, ``list``, ``struct``, ``int``, whichever way a writer stores it."""
    # By its name: pyarrow has five predicates for lists alone, and none for all of them.
    return re.sub(r"large_|_view|fixed_size_|(?<=int)\d+|^u(?=int)|[<\[].*", "", str(given))


def _mismatches(
    field: str, expected: pa.DataType, actual: pa.DataType
) -> Iterator[tuple[str, str]]:
    if pa.types.is_dictionary(actual):
        actual = actual.value_type
    wanted, given = _kind(expected), _kind(actual)
    if given == "null":  # a column of nulls or empty lists; its rows are judged one by one
        return
    if wanted == given == "struct":
        yield from _field_mismatches(field, expected, actual)
    elif wanted == given == "list":
        yield from _mismatches(f"{field}[]", expected.value_type, actual.value_type)
    elif (wanted, given) == ("list", "struct"):
        lists = [child for child in actual if _kind(child.type) == "list"]
        yield from ((f"{field}.{c.name}", "is no list") for c in actual if c not in lists)
        entry = pa.struct([(child.name, child.type.value_type) for child in lists])
        yield from _mismatches(f"{field}[]", expected.value_type, entry)
    elif given not in _LIKE.get(expected, ()):
        yield field, f"the type is {str(actual).split('<')[0]}, not {wanted}"


def _field_mismatches(
    field: str, expected: pa.StructType, actual: pa.StructType
) -> Iterator[tuple[str, str]]:
    if field.endswith(".Options"):  # any letters will do, each row is judged for itself
        expected = pa.struct([(child.name, pa.string()) for child in actual])
    for child in expected:
        name, places = f"{field}.{child.name}", actual.get_all_field_indices(child.name)
        if len(places) == 1:
            yield from _mismatches(name, child.type, actual.field(places[0]).type)
        elif places:
            yield name, "the field is there more than once"
        elif child.name not in _OPTIONAL_FIELDS:
            yield name, "the field is missing"
