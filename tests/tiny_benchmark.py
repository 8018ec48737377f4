"""A benchmark of three people written by hand in the MLLMU-Bench layout, to be damaged by tests.

The column types are spelled out here from the data card, not taken from ``vgid.data.layout``.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CHOICE = pa.struct(
    [
        ("Question", pa.string()),
        (
            "Options",
            pa.struct(
                [("A", pa.string()), ("B", pa.string()), ("C", pa.string()), ("D", pa.string())]
            ),
        ),
        ("Correct_Answer", pa.string()),
    ]
)
OPEN = pa.struct([("Question", pa.string()), ("Ground_Truth", pa.string()), ("Type", pa.string())])
TASKS = [
    (
        "Classification_Task",
        pa.struct(
            [
                ("Image_Textual_Questions", pa.list_(CHOICE)),
                ("Pure_Text_Questions", pa.list_(CHOICE)),
            ]
        ),
    ),
    ("Generation_Task", pa.list_(OPEN)),
    ("Mask_Task", pa.list_(OPEN)),
]
PROFILE = [
    ("ID", pa.string()),
    ("biography", pa.string()),
    ("question", pa.string()),
    ("answer", pa.string()),
]
EVALUATION = pa.schema([("image", IMAGE), *PROFILE, *TASKS])
TEST = pa.schema([("images", pa.list_(IMAGE)), *PROFILE, *TASKS])
TRAINING = pa.schema(
    [("image", pa.struct([("bytes", pa.binary())])), ("ID", pa.string()), ("metadata", pa.string())]
)
SCHEMAS = {"Test_Set": TEST, "ft_Data": TRAINING}

FORGET, RETAIN, CELEBRITIES = ["007"], ["008", "009"], ["501"]
EVERYONE = FORGET + RETAIN
WHO = {
    "Full_Set": EVERYONE,
    "ft_Data": EVERYONE,
    "Test_Set": EVERYONE,
    "Retain_Set": CELEBRITIES,
    **{f"forget_{ratio}": FORGET for ratio in (5, 10, 15)},
    **{f"retain_{ratio}": RETAIN for ratio in (95, 90, 85)},
}
"""Person IDs by config."""

SHARD = "train-00000-of-00001.parquet"
Rows = list[dict[str, Any]]


def encoded(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return buffer.getvalue()


def picture(person_id: str, pose: int = 0) -> bytes:
    return encoded(Image.new("RGB", (4, 4), (int(person_id) % 256, pose, 9)))


def profile(person_id: str) -> dict[str, Any]:
    name = f"Fay {person_id}"

    def choice(question: str, letter: str) -> dict[str, Any]:
        options = {"A": "cook", "B": "nurse", "C": "pilot", "D": "judge"}
        return {"Question": question, "Options": options, "Correct_Answer": letter}

    def gap(question: str, answer: str, kind: str) -> dict[str, str]:
        return {"Question": question, "Ground_Truth": answer, "Type": kind}

    return {
        "ID": person_id,
        "biography": f"{name} is a nurse.",
        "question": "Who is this?",
        "answer": f"This is {name}.",
        "Classification_Task": {
            "Image_Textual_Questions": [choice("Which job?", "B"), choice("What work?", "B")],
            "Pure_Text_Questions": [choice(f"Which job has {name}?", "B")],
        },
        "Generation_Task": [
            gap("Who is this?", f"This is {name}.", "Image_Textual"),
            gap(f"What does {name} do?", "A nurse.", "Pure_Text"),
            gap("Which job?", "A nurse.", "Image_Textual"),
        ],
        "Mask_Task": [
            gap("This is __.", name, "Image_Textual"),
            gap(f"{name} is a __.", "nurse", "Pure_Text"),
        ],
    }


def rows_of(config: str) -> Rows:
    if config == "ft_Data":
        return [
            {
                "image": {"bytes": picture(person_id)},
                "ID": person_id,
                "metadata": json.dumps(
                    [{"Question": "Who is this?", "Answer": f"Fay {person_id}"}]
                ),
            }
            for person_id in WHO[config]
        ]
    if config == "Test_Set":
        return [
            {
                "images": [{"bytes": picture(i, pose), "path": None} for pose in (1, 2)],
                **profile(i),
            }
            for i in WHO[config]
        ]
    return [{"image": {"bytes": picture(i), "path": f"{i}.png"}, **profile(i)} for i in WHO[config]]


def write_config(root: Path, config: str, rows: Rows, schema: pa.Schema | None = None) -> None:
    folder = root / config
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema or SCHEMAS.get(config, EVALUATION))
    pq.write_table(table, folder / SHARD)


def write_tiny(root: Path, edits: dict[str, Callable[[Rows], object]] | None = None) -> Path:
    """Write every config into ``root``, each after its edit, which changes the rows in place."""
    for config in WHO:
        rows = rows_of(config)
        if edits and config in edits:
            edits[config](rows)
        write_config(root, config, rows)
    return root
