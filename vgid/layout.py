"""The MLLMU-Bench layout on disk: configs, column types, and the rows that are read from it.

Facts from the data card and code of https://github.com/franciscoliu/MLLMU-Bench: a folder per
config with parquet shards ``train-00000-of-00001.parquet``. Rows and defects come out of one
stream, so that the reader (which stops at the first defect, ``vgid.benchmark``) and the checker
(which lists them all, ``vgid.data_check``) can never disagree about what is sound.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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

_CHOICES = pa.list_(
    pa.struct(
        [
            ("Question", pa.string()),
            ("Options", pa.struct([(letter, pa.string()) for letter in "ABCD"])),
            ("Correct_Answer", pa.string()),
        ]
    )
)
_OPEN_QUESTIONS = pa.list_(
    pa.struct([("Question", pa.string()), ("Ground_Truth", pa.string()), ("Type", pa.string())])
)
_TASK_FIELDS = [
    (
        "Classification_Task",
        pa.struct([(f"{form}_Questions", _CHOICES) for form in ("Image_Textual", "Pure_Text")]),
    ),
    ("Generation_Task", _OPEN_QUESTIONS),
    ("Mask_Task", _OPEN_QUESTIONS),
]
_PROFILE_FIELDS = [(name, pa.string()) for name in ("ID", "biography", "question", "answer")]

EVALUATION_SCHEMA = pa.schema([("image", IMAGE), *_PROFILE_FIELDS, *_TASK_FIELDS])
"""Columns of the forget, retain, full and celebrity configs."""

TEST_SCHEMA = pa.schema([("images", pa.list_(IMAGE)), *_PROFILE_FIELDS, *_TASK_FIELDS])
"""Columns of ``Test_Set``: several poses a person."""

TRAINING_SCHEMA = pa.schema(
    [("image", pa.struct([("bytes", pa.binary())])), ("ID", pa.string()), ("metadata", pa.string())]
)
"""Columns of ``ft_Data``; ``metadata`` is a JSON list of ``{"Question", "Answer"}``."""

IMAGE_COLUMNS = ("image", "images")
QUESTION_COLUMNS = tuple(name for name, _ in _TASK_FIELDS)
_COLUMN_TYPES = dict(
    [
        ("images", pa.list_(IMAGE)),
        ("metadata", pa.string()),
        *zip(EVALUATION_SCHEMA.names, EVALUATION_SCHEMA.types, strict=True),
    ]
)
_OPTIONAL_FIELDS = ("path",)  # ft_Data lacks it, and nothing here reads it
_SHARD_NAME = re.compile(r"train-(\d+)-of-(\d+)\.parquet")
_ROWS_A_BATCH = 16  # rows carry megabytes of image each, so read few at a time


@dataclass(frozen=True)
class Defect:
    """Something wrong with a config.

    Attributes:
        config: which config.
        row: 0-based row over all its shards, None for a whole file or column.
        field: column, or path within it such as ``Mask_Task[1].Ground_Truth``; or file name.
        problem: what is wrong, without any value of the data.
    """

    config: str
    row: int | None
    field: str
    problem: str


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
    return sorted(path for path in folder.iterdir() if _SHARD_NAME.fullmatch(path.name))


def read_rows(root: Path, config: str, columns: Sequence[str]) -> Iterator[Row | Defect]:
    """Stream a config: its rows in order, and file-level defects where they are met.

    Args:
        root: the benchmark folder.
        config: one of ``CONFIGS``.
        columns: columns to read. Each is required, except that ``image`` and ``images`` stand in
            for each other, and that columns which no question depends on may be absent.

    Yields:
        Rows with those columns that are present and have the layout's type, and a defect for a
        missing config or shard, a torn file, or a missing or ill-typed column.
    """
    shards = shard_paths(root, config)
    if not shards:
        yield Defect(config, None, "train-*.parquet", "the config has no parquet file")
        return
    yield from _missing_shards(config, shards)
    first_row = 0
    for path in shards:
        try:
            with pq.ParquetFile(path) as parquet:
                sound = []
                for name in _wanted(columns, parquet.schema_arrow):
                    mismatches = list(_mismatches(name, parquet.schema_arrow))
                    yield from (Defect(config, None, field, what) for field, what in mismatches)
                    if not mismatches:
                        sound.append(name)
                index = first_row
                first_row += parquet.metadata.num_rows
                for batch in parquet.iter_batches(_ROWS_A_BATCH, columns=sound):
                    # A batch of no columns has no rows in to_pylist, but still so many people.
                    rows = batch.to_pylist() if sound else [{}] * batch.num_rows
                    for values in rows:
                        yield Row(index, values)
                        index += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            problem = f"the file cannot be read as parquet ({type(error).__name__})"
            yield Defect(config, None, path.name, problem)


def _missing_shards(config: str, shards: Sequence[Path]) -> Iterator[Defect]:
    matches = [match for path in shards if (match := _SHARD_NAME.fullmatch(path.name))]
    present = {int(match[1]) for match in matches}
    totals = {int(match[2]) for match in matches}
    if len(totals) > 1:
        names = "the shard names disagree about the number of shards"
        yield Defect(config, None, "train-*.parquet", names)
        return
    total = totals.pop()
    for number in sorted(set(range(total)) - present):
        name = f"train-{number:05d}-of-{total:05d}.parquet"
        yield Defect(config, None, name, "the shard is missing")


def _wanted(columns: Sequence[str], schema: pa.Schema) -> list[str]:
    """``columns`` fitted to a file: whichever image columns it has, optional ones if present."""
    required = {"ID", "metadata", *QUESTION_COLUMNS}
    names = [name for name in columns if name not in IMAGE_COLUMNS]
    wanted = [name for name in names if name in schema.names or name in required]
    if len(names) < len(columns):
        present = [name for name in IMAGE_COLUMNS if name in schema.names]
        wanted += present or ["image"]
    return wanted


def _mismatches(column: str, schema: pa.Schema) -> Iterator[tuple[str, str]]:
    """Where a column's type departs from the layout, as (field, problem)."""
    if column not in schema.names:
        yield column, "the column is missing"
    else:
        yield from _type_mismatches(column, _COLUMN_TYPES[column], schema.field(column).type)


def _type_mismatches(
    field: str, expected: pa.DataType, actual: pa.DataType
) -> Iterator[tuple[str, str]]:
    types = pa.types
    if types.is_null(actual):  # a column of nulls or empty lists; its rows are judged one by one
        return
    if types.is_struct(expected) and types.is_struct(actual):
        if field.endswith(".Options"):  # any letters will do, each row is judged for itself
            return
        for child in expected:
            if actual.get_field_index(child.name) >= 0:
                child_type = actual.field(child.name).type
                yield from _type_mismatches(f"{field}.{child.name}", child.type, child_type)
            elif child.name not in _OPTIONAL_FIELDS:
                yield f"{field}.{child.name}", "the field is missing"
    elif types.is_list(expected) and (types.is_list(actual) or types.is_large_list(actual)):
        yield from _type_mismatches(f"{field}[]", expected.value_type, actual.value_type)
    else:
        texts = types.is_string(expected) and (
            types.is_string(actual) or types.is_large_string(actual) or types.is_string_view(actual)
        )
        binaries = types.is_binary(expected) and (
            types.is_binary(actual) or types.is_large_binary(actual)
        )
        if not texts and not binaries:
            kind = "struct" if types.is_struct(expected) else str(expected).split("<")[0]
            yield field, f"the type is {str(actual).split('<')[0]}, not {kind}"
