"""Rows of the benchmark parsed into people and their questions, with every defect on the way.

Nothing here raises: a parser returns what there is and what is wrong with it, and its caller
decides whether a defect stops the reading (``vgid.data.benchmark``) or is listed
(``vgid.data.check``).
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vgid.config import PSEUDONYM
from vgid.data.layout import IMAGE_COLUMNS, Defect, Row, records
from vgid.prompts import BLANK, Form, Task

_FORMS: dict[str, Form] = {"Image_Textual": "image", "Pure_Text": "text"}
_PERSON_ID = re.compile(PSEUDONYM)
_CELEBRITY_ID = re.compile(r"\w([\w .-]{0,98}[\w-])?")  # public names do, they are scored only


@dataclass(frozen=True)
class Question:
    """One question about one person.

    Attributes:
        id: ``<config>/<person_id>/<task>/<form>/<index>``, index counted within task and form.
        person_id: whom it is about.
        task: generation, cloze or classification.
        form: ``image`` shows the person, ``text`` names them.
        text: the question as stored, without the benchmark's answer instructions.
        answer: the ground truth; for classification the letter of the right option.
        options: letter to option for classification, otherwise None.
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


def parse_images(config: str, row: Row) -> tuple[dict[str, bytes], list[Defect]]:
    """The encoded images of a row by field (``image``, ``images[0]``, ...), and what is wrong."""
    cells = [("image", row.values["image"])] if row.values.get("image") is not None else []
    listed = row.values.get("images") or []
    cells += [(f"images[{index}]", cell) for index, cell in enumerate(listed)]
    images = {}
    defects = []
    for field, cell in cells:
        data = cell.get("bytes") if cell else None
        if data:
            images[field] = data
        else:
            problem = "the image has no bytes; embed the file in the parquet"
            defects.append(Defect(config, row.index, field, problem))
    if not cells and not row.values.keys().isdisjoint(IMAGE_COLUMNS):
        field = next(name for name in IMAGE_COLUMNS if name in row.values)
        defects.append(Defect(config, row.index, field, "the person has no image"))
    return images, defects


def parse_person(config: str, row: Row) -> tuple[Person, list[Defect]]:
    """The person of a row with every question there is, and what is wrong with any of it.

    Tasks that a row lacks are no defect: profiles short of questions exist in the real data.
    """
    person_id, defects = parse_id(config, row)
    images, image_defects = parse_images(config, row)
    defects += image_defects
    questions: list[Question] = []
    for field, task, form, entry in _entries(row.values):
        shown = form or "image"
        # Counted over broken questions too, so that leaving some out changes nobody else's id, and
        # with it which half of the questions it falls into.
        number = sum(question.task == task and question.form == shown for question in questions)
        question_id = f"{config}/{person_id}/{task}/{shown}/{number}"
        question, problems = _question(question_id, person_id, task, form, entry)
        defects += [
            Defect(config, row.index, f"{field}.{at}", what, question_id) for at, what in problems
        ]
        questions.append(question)
    return Person(person_id, tuple(images.values()), tuple(questions)), defects


def parse_id(config: str, row: Row) -> tuple[str, list[Defect]]:
    """The person ID of a row (empty if the column is missing), and what is wrong with it."""
    if "ID" not in row.values:
        return "", []
    value = row.values["ID"]
    problem = id_problem(value, celebrity=config == "Retain_Set")
    defects = [Defect(config, row.index, "ID", problem)] if problem else []
    return value or "", defects


def _entries(values: Mapping[str, Any]) -> Iterator[tuple[str, Task, Form | None, dict[str, Any]]]:
    """Each question of a row as (field path, task, form, raw entry); form None if unknown."""
    choices = values.get("Classification_Task") or {}
    for kind, form in _FORMS.items():
        for index, entry in enumerate(choices.get(f"{kind}_Questions") or []):
            field = f"Classification_Task.{kind}_Questions[{index}]"
            yield field, "classification", form, entry or {}
    tasks: tuple[tuple[str, Task], ...] = (
        ("Generation_Task", "generation"),
        ("Mask_Task", "cloze"),
    )
    for column, task in tasks:
        for index, entry in enumerate(values.get(column) or []):
            form_or_none = _FORMS.get((entry or {}).get("Type") or "")
            yield f"{column}[{index}]", task, form_or_none, entry or {}


def _question(
    question_id: str, person_id: str, task: Task, form: Form | None, entry: Mapping[str, Any]
) -> tuple[Question, list[tuple[str, str]]]:
    """A question, and its problems as (field within the entry, what is wrong)."""
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
    if form is None:
        problems.append(("Type", f"the type is none of {', '.join(_FORMS)}"))
    if task == "classification":
        given = entry.get("Options") or {}
        options = {letter: option for letter, option in given.items() if option is not None}
        problems += [
            (f"Options.{letter}", "the option is empty")
            for letter, option in options.items()
            if not option.strip()
        ]
        if len(options) < 2:
            problems.append(("Options", "there are fewer than two options"))
        if answer.strip() and answer not in options:
            problems.append((answer_field, "the letter is none of the options"))
    question = Question(question_id, person_id, task, form or "image", text, answer, options)
    return question, problems


def parse_training_pairs(config: str, row: Row) -> tuple[tuple[TrainingPair, ...], list[Defect]]:
    """The question-answer pairs in the ``metadata`` of a row, and what is wrong with them."""
    person_id, defects = parse_id(config, row)
    if "metadata" not in row.values:
        return (), defects

    def defect(field: str, problem: str, pair_id: str | None = None) -> Defect:
        return Defect(config, row.index, field, problem, pair_id)

    entries = row.values["metadata"]
    try:
        if not isinstance(entries, list):
            entries = json.loads(entries or "")
    except (ValueError, RecursionError):
        return (), [*defects, defect("metadata", "the metadata is not valid JSON")]
    if isinstance(entries, dict) and all(isinstance(v, list) for v in entries.values()):
        entries = records(entries)
    if not isinstance(entries, list) or not entries:
        problem = "the metadata is not a list of questions and answers"
        return (), [*defects, defect("metadata", problem)]
    pairs = []
    for index, entry in enumerate(entries):
        values = entry if isinstance(entry, dict) else {}
        pair_id = f"{config}/{person_id}/{index}"
        question, answer = (_text(values.get(key)) for key in ("Question", "Answer"))
        for key, text in (("Question", question), ("Answer", answer)):
            if not text.strip():
                problem = f"the {key.lower()} is empty or no text"
                defects.append(defect(f"metadata[{index}].{key}", problem, pair_id))
        pairs.append(TrainingPair(pair_id, person_id, question, answer))
    return tuple(pairs), defects


def _text(value: object) -> str:
    """A value of parsed JSON as text, whole numbers too as in any column; empty if it is none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole or isinstance(value, str) else ""
