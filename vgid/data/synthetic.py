"""Writing a synthetic benchmark in the MLLMU-Bench layout: drawn portraits of fictitious people.

A fifth of the real one's size (100 people for 500), otherwise the same configs, columns and types
(``vgid.data.layout``), so that nothing downstream can tell them apart. Who the people are, how they
look and what is asked about them comes from ``vgid.data.fictitious``.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from vgid.data import fictitious, layout
from vgid.data.fictitious import FictitiousPerson
from vgid.errors import InputError
from vgid.files import appearing
from vgid.prompts import Form
from vgid.seeds import sample_generator

TEST_PORTRAITS = 2  # a person in ``Test_Set``
_TYPES: dict[Form, str] = {"image": "Image_Textual", "text": "Pure_Text"}


def write_benchmark(root: Path, seed: int = 0, progress: bool = False) -> None:
    """Write the whole synthetic benchmark; the same seed gives the same bytes.

    It appears at ``root``, which may exist if it is empty, all at once or not at all.

    Raises:
        InputError: ``root`` is in use or cannot be written.
    """
    if seed < 0:
        raise InputError(f"seed {seed}: must not be negative; give 0 or more.")
    root = root.expanduser().resolve()
    bar = Progress(console=Console(stderr=True), disable=not progress, transient=True)
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise InputError(
                f"{root}: exists and is not an empty folder; name a new folder for the benchmark."
            )
        if root == Path.cwd():  # taking its place would leave the caller in a folder that is gone
            raise InputError(
                f"{root}: is the current folder; name a new folder, such as benchmark."
            )
        with appearing(root) as folder, bar:
            _write_configs(folder, seed, bar)
    except OSError as error:
        raise InputError(
            f"{root}: cannot write the benchmark there ({error.strerror or error}); "
            "free some space or name another folder."
        ) from None


def _write_configs(folder: Path, seed: int, bar: Progress) -> None:
    world = fictitious.make_world(seed)
    people = world.of_kind("benchmark")
    rows = {p.id: _evaluation_row(seed, p) for p in bar.track(people, description="Portraits")}
    celebrities = [_evaluation_row(seed, p) for p in world.of_kind("celebrity")]
    test_rows = [_test_row(seed, p) for p in bar.track(people, description="Test portraits")]
    evaluation = layout.EVALUATION_SCHEMA
    _write(folder / "Full_Set", [list(rows.values())], evaluation)
    _write(folder / "Retain_Set", [celebrities], evaluation)
    for ratio in layout.FORGET_RATIOS:
        forgotten = set(fictitious.forget_people(seed, ratio))
        forget = [row for person_id, row in rows.items() if person_id in forgotten]
        retain = [row for person_id, row in rows.items() if person_id not in forgotten]
        _write(folder / f"forget_{ratio}", [forget], evaluation)
        _write(folder / f"retain_{100 - ratio}", [retain], evaluation)
    middle = len(test_rows) // 2
    # In two shards, as real configs may be, so that whatever reads it has met that.
    _write(folder / "Test_Set", [test_rows[:middle], test_rows[middle:]], layout.TEST_SCHEMA)
    training = [_training_row(p, rows[p.id]["image"]["bytes"]) for p in people]
    _write(folder / "ft_Data", [training], layout.TRAINING_SCHEMA)


def _write(folder: Path, shards: Sequence[list[dict[str, Any]]], schema: pa.Schema) -> None:
    folder.mkdir()
    for number, rows in enumerate(shards):
        path = folder / f"train-{number:05d}-of-{len(shards):05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _evaluation_row(seed: int, person: FictitiousPerson) -> dict[str, Any]:
    image = _image(fictitious.portrait(seed, person), f"{person.id}.png")
    return {"image": image, **_profile(seed, person, paraphrased=False)}


def _test_row(seed: int, person: FictitiousPerson) -> dict[str, Any]:
    portraits = (fictitious.test_portrait(seed, person, index) for index in range(TEST_PORTRAITS))
    images = [_image(image, f"{person.id}_{index}.png") for index, image in enumerate(portraits)]
    return {"images": images, **_profile(seed, person, paraphrased=True)}


def _training_row(person: FictitiousPerson, portrait: bytes) -> dict[str, Any]:
    pairs = [{"Question": q, "Answer": a} for q, a in fictitious.training_pairs(person)]
    return {"image": {"bytes": portrait}, "ID": person.id, "metadata": json.dumps(pairs)}


def _profile(seed: int, person: FictitiousPerson, paraphrased: bool) -> dict[str, Any]:
    generation = fictitious.generation_questions(person, paraphrased)
    # By person and wording, so that nobody's options depend on who was written before.
    rng = sample_generator(seed, f"options/{person.id}/{paraphrased}")
    choices = fictitious.classification_questions(person, rng, paraphrased)
    return {
        "ID": person.id,
        "biography": fictitious.biography(person),
        "question": generation[0][0],
        "answer": generation[0][1],
        "Classification_Task": {
            f"{name}_Questions": [
                {"Question": question, "Options": options, "Correct_Answer": letter}
                for question, options, letter, question_form in choices
                if question_form == form
            ]
            for form, name in _TYPES.items()
        },
        "Generation_Task": _open_questions(generation),
        "Mask_Task": _open_questions(fictitious.cloze_questions(person, paraphrased)),
    }


def _open_questions(questions: Iterable[tuple[str, str, Form]]) -> list[dict[str, str]]:
    return [
        {"Question": question, "Ground_Truth": answer, "Type": _TYPES[form]}
        for question, answer, form in questions
    ]


def _image(portrait: Image.Image, name: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    portrait.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": name}
