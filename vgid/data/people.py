"""Rows of the benchmark parsed into people and their questions, with every defect on the way.

Nothing here raises: whether a defect stops the reading (``vgid.data.benchmark``) or is listed
(``vgid.data.check``) is the caller's matter.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgid.config import PSEUDONYM
from vgid.data.layout import IMAGE_COLUMNS, Defect, Row, read_rows, records
from vgid.prompts import BLANK, Form, Task

_FORMS: dict[str, Form] = {"Image_Textual": "image", "Pure_Text": "text"}
_PERSON_ID = re.compile(PSEUDONYM)
_CELEBRITY_ID = re.compile(r"\w([\w .-]{0,98}[\w-])?")  # public names do, they are scored only


@dataclass(frozen=True)
class Question:
    """One question about one person.

    Attributes:
        id: ``<config>/<person_id>/<task>/<form>/<index>``, index counted within task and form.
        form: ``image`` shows the person, ``text`` names them.
        text: as stored, without the benchmark's answer instructions.
        answer: the ground truth; for classification the letter of the right option.
        options: by letter, for classification only.
    """

    id: str
    person_id: str
    task: Task
    form: Form
    text: str
    answer: str
    options: Mapping[str, str] | None


@dataclass(frozen=True)
class Person:
    """One row of a config: a person's encoded images as stored, and the questions about them."""

    id: str
    images: tuple[bytes, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class TrainingPair:
    """A question and answer of ``ft_Data``; the id is ``ft_Data/<person_id>/<index>``."""

    id: str
    person_id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Parsed:
    """A row of a config with all that is wrong with it.

    Attributes:
        row: its index over all shards.
        id: of the person; empty if it is defective or another row's.
        images: encoded images by field (``image``, ``images[0]``, ...).
        questions: the defective ones too, as with ``pairs``, which ``ft_Data`` has in their place.
        defects: those of one question or pair name it.
    """

    config: str
    row: int
    id: str
    images: dict[str, bytes] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    pairs: list[TrainingPair] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)

    def note(self, place: str, problem: str, question: str | None = None) -> None:
        """Add a defect."""
        self.defects.append(Defect(self.config, self.row, place, problem, question))


def comparable(text: str) -> str:
    """A question as it is compared with others, word for word: without case and extra spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def id_problem(value: object, celebrity: bool = False) -> str | None:
    """What keeps ``value`` from being a person's ID, or None.

    IDs name files and folders of results, so nothing that could leave a folder is let in. They are
    printed and recorded too, so they are pseudonyms: with a space it may be a name.
    """
    if not isinstance(value, str) or not value.strip():
        return "the ID is empty"
    if "/" in value or "\\" in value or ".." in value or value.startswith((".", "~")):
        return "the ID looks like a path; use letters, digits, '-' and '_'"
    if not (_CELEBRITY_ID if celebrity else _PERSON_ID).fullmatch(value):
        return (
            "the ID is no pseudonym (at most 64 letters A to Z, digits, '.', '_' and '-'); replace "
            "it in every config"
        )
    return None


def parsed_rows(
    root: Path,
    config: str,
    columns: Sequence[str],
    image_problem: Callable[[bytes], str | None] | None = None,
    only: Collection[str] | None = None,
) -> Iterator[Parsed | Defect]:
    """Stream a config's people, and file-level defects where they are met.

    Tasks that a row lacks are no defect: profiles short of questions exist in the real data.
    Columns (``read_rows``) that are not asked for are not judged, nor are images without
    ``image_problem``. With ``only``, whoever has a defective ID is yielded too: they may be meant.
    """
    first: dict[str, int] = {}
    for row in read_rows(root, config, columns):
        if isinstance(row, Defect):
            yield row
            continue
        person_id, problem = row.values.get("ID") or "", None
        if "ID" in row.values:  # else the whole column is a defect
            problem = id_problem(person_id, celebrity=config == "Retain_Set")
        if problem is None and only is not None and person_id not in only:
            continue
        if person_id in first:
            problem = f"the ID is a duplicate of row {first[person_id]}"
        elif person_id and problem is None:
            first[person_id] = row.index
        parsed = Parsed(config, row.index, person_id if problem is None else "")
        if problem is not None:
            parsed.note("ID", problem)
        _read_images(row, parsed)
        _read_questions(row, person_id, parsed)
        _read_training_pairs(row, person_id, parsed)
        if image_problem is not None:
            for place, data in parsed.images.items():
                if told := image_problem(data):
                    parsed.note(place, told)
        yield parsed


def _read_images(row: Row, parsed: Parsed) -> None:
    cells = {"image": row.values["image"]} if row.values.get("image") is not None else {}
    cells |= {f"images[{index}]": cell for index, cell in enumerate(row.values.get("images") or [])}
    for place, cell in cells.items():
        if cell and cell.get("bytes"):
            parsed.images[place] = cell["bytes"]
        else:
            parsed.note(place, "the image has no bytes; embed the file in the parquet")
    column = next((name for name in IMAGE_COLUMNS if name in row.values), None)
    if column is not None and not cells:
        parsed.note(column, "the person has no image")


def _read_questions(row: Row, person_id: str, parsed: Parsed) -> None:
    for place, task, kind, entry in _raw_questions(row.values):
        form = _FORMS.get(kind, "image")
        # Counted over broken questions too, so that leaving some out changes nobody else's id, and
        # with it which half of the questions it falls into.
        number = sum(q.task == task and q.form == form for q in parsed.questions)
        question_id = f"{parsed.config}/{person_id}/{task}/{form}/{number}"
        text = entry.get("Question") or ""
        answer_field = "Correct_Answer" if task == "classification" else "Ground_Truth"
        answer = entry.get(answer_field) or ""
        options = None
        problems = []
        if not text.strip():
            problems.append(("Question", "the question is empty"))
        elif task == "cloze" and BLANK not in text:
            problems.append(("Question", f"the cloze question has no blank ({BLANK})"))
        if not answer.strip():
            problems.append((answer_field, "the answer is empty"))
        if kind not in _FORMS:
            problems.append(("Type", f"the type is none of {', '.join(_FORMS)}"))
        if task == "classification":
            given = entry.get("Options") or {}
            options = {letter: option for letter, option in given.items() if option is not None}
            blank = [letter for letter, option in options.items() if not option.strip()]
            problems += [(f"Options.{letter}", "the option is empty") for letter in blank]
            if len(options) < 2:
                problems.append(("Options", "there are fewer than two options"))
            if answer.strip() and answer not in options:
                problems.append((answer_field, "the letter is none of the options"))
        question = Question(question_id, person_id, task, form, text, answer, options)
        parsed.questions.append(question)
        for at, what in problems:
            parsed.note(f"{place}.{at}", what, question_id)


def _raw_questions(values: Mapping[str, Any]) -> Iterator[tuple[str, Task, str, dict[str, Any]]]:
    """Each question of a row as (field path, task, type as stored, raw entry)."""
    # Any of it may be null, a task, its list or an entry: writers differ in what they leave empty.
    choices = values.get("Classification_Task") or {}
    for kind in _FORMS:
        for index, entry in enumerate(choices.get(f"{kind}_Questions") or []):
            field = f"Classification_Task.{kind}_Questions[{index}]"
            yield field, "classification", kind, entry or {}
    columns: dict[str, Task] = {"Generation_Task": "generation", "Mask_Task": "cloze"}
    for column, task in columns.items():
        for index, entry in enumerate(values.get(column) or []):
            known = entry or {}
            yield f"{column}[{index}]", task, known.get("Type") or "", known


def _read_training_pairs(row: Row, person_id: str, parsed: Parsed) -> None:
    if "metadata" not in row.values:
        return
    entries = row.values["metadata"]
    # Thousands of open brackets exhaust the parser's stack: RecursionError, not ValueError.
    try:
        if not isinstance(entries, list):
            entries = json.loads(entries or "")
    except (ValueError, RecursionError):
        parsed.note("metadata", "the metadata is not valid JSON")
        return
    if isinstance(entries, dict) and all(isinstance(v, list) for v in entries.values()):
        entries = records(entries)
    if not isinstance(entries, list) or not entries:
        parsed.note("metadata", "the metadata is not a list of questions and answers")
        return
    for index, entry in enumerate(entries):
        values = entry if isinstance(entry, dict) else {}
        texts = {key: _text(values.get(key)) for key in ("Question", "Answer")}
        pair_id = f"{parsed.config}/{person_id}/{index}"
        parsed.pairs.append(TrainingPair(pair_id, person_id, *texts.values()))
        for key, text in texts.items():
            if not text.strip():
                what = f"the {key.lower()} is empty or no text"
                parsed.note(f"metadata[{index}].{key}", what, pair_id)


def _text(value: object) -> str:
    """A value of parsed JSON as text, whole numbers too as in any column; empty if it is none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole or isinstance(value, str) else ""
