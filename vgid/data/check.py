"""Checking a benchmark folder: what it holds by config and task, and every defect it has.

A torn file of one config hides nothing in another. Reports name configs, rows and fields, and never
a value of the data but person IDs.
"""

import hashlib
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, Field
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from vgid.config import Config
from vgid.data import layout
from vgid.data.address import local
from vgid.data.benchmark import image_problem, people_defects
from vgid.data.layout import Defect
from vgid.data.people import comparable, parsed_rows
from vgid.errors import InputError
from vgid.prompts import Form, Task
from vgid.results import describe_left_out


class ConfigCount(BaseModel):
    """What one config holds, defective or not, and what of it a run leaves out.

    ``questions_left_out`` counts training pairs too; ``in_training`` are the generation questions
    that stand word for word in the person's training pairs.
    """

    people: int = 0
    images: int = 0
    questions: dict[Task, dict[Form, int]] = Field(
        default_factory=lambda: {task: dict.fromkeys(get_args(Form), 0) for task in get_args(Task)}
    )
    training_pairs: int = 0
    in_training: int = 0
    questions_left_out: int = 0
    people_left_out: int = 0


class Report(Config):
    """Counts by config, and every defect in the order of ``CONFIGS`` and rows.

    ``left_out`` are defects that need no repair, since the run leaves out what has them.
    """

    configs: dict[str, ConfigCount]
    defects: list[Defect]
    left_out: list[Defect]

    def print(self, console: Console) -> None:
        """Print a table of the counts, then one of the defects or a line that there are none."""
        # Narrow enough for 80 columns, where a table that is wider would cut the configs' names.
        counts = Table("config", title="Benchmark", box=SIMPLE, padding=0)
        for heading in ("people", "images", *get_args(Task), "trained on", "pairs"):
            counts.add_column(heading, justify="right")
        for name, count in self.configs.items():
            by_task = [f"{forms['image']}+{forms['text']}" for forms in count.questions.values()]
            cells = [count.people, count.images, *by_task, count.in_training, count.training_pairs]
            counts.add_row(name, *map(str, cells))
        counts.caption = (
            "questions in image form + in text form; generation questions that stand word for word "
            "in ft_Data; pairs of training questions and answers"
        )
        console.print(counts)
        for name, found in (("Left out", self.left_out), ("Defects", self.defects)):
            title = f"{name}: {len(found)}"
            listed = Table("config", "row", "field", "problem", title=title, box=SIMPLE)
            for defect in found:
                row = "" if defect.row is None else str(defect.row)
                listed.add_row(defect.config, row, escape(defect.field), escape(defect.problem))
            if found:
                console.print(listed)
        if not self.defects:
            console.print("No defects.")
        left_out = {
            name: {"questions": count.questions_left_out, "people": count.people_left_out}
            for name, count in self.configs.items()
            if count.questions_left_out or count.people_left_out
        }
        if left_out:
            console.print(f"Left out as defective: {describe_left_out(left_out)}.")


def check_benchmark(
    root: Path,
    progress: bool = False,
    stops: Callable[[Path, Set[str]], list[Defect]] | None = None,
    skipping: bool = False,
) -> Report:
    """Read a benchmark whole and report what it holds and every defect.

    ``stops`` tells what would stop a run, looking at no config that is broken
    (``vgid.evaluation.rehearsal.Run.defects``); the run is ``skipping`` what is defective.
    ``root`` may be an address. InputError where there is no such folder, or the run's backbone
    cannot be found.
    """
    root = local(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the benchmark folder to check.")
    counts: dict[str, ConfigCount] = {}
    defects: list[Defect] = []
    left_out: list[Defect] = []

    def judge(found: Iterable[Defect]) -> None:
        for defect in found:
            whole_files = defect.question is None and defect.row is None
            (left_out if skipping and not whole_files else defects).append(defect)

    # A person is missing elsewhere only where that config could be read whole.
    places: dict[str, dict[str, int]] = {}
    asked: dict[str, list[tuple[str, str]]] = {}
    problem_of = _decoding_once()
    stderr = Console(stderr=True)
    for config in track(
        layout.CONFIGS, "Checking", console=stderr, disable=not progress, transient=True
    ):
        counts[config], found, rows, asked[config] = _read(root, config, problem_of)
        judge(found)
        if not any(d.row is None and d.field.endswith(("ID", ".parquet")) for d in found):
            places[config] = rows
    trained_on = set(asked.pop("ft_Data"))
    for config, questions in asked.items():
        counts[config].in_training = sum(question in trained_on for question in questions)
    # Never left out: a person on both sides would be forgotten and retained at once.
    defects += [
        defect for ratio in layout.FORGET_RATIOS for defect in people_defects(places, ratio)
    ]
    if stops is not None:
        # After the data's own defects: what is broken cannot be asked, and is known already.
        judge(stops(root, {defect.config for defect in defects}))
    for config, count in counts.items():
        mine = [defect for defect in left_out if defect.config == config]
        whole_rows = {defect.row for defect in mine if defect.question is None}
        count.people_left_out = len(whole_rows)
        count.questions_left_out = len({d.question for d in mine if d.row not in whole_rows})
    for found in (defects, left_out):  # whole files first, then by row
        found.sort(key=lambda d: (layout.CONFIGS.index(d.config), -1 if d.row is None else d.row))
    return Report(configs=counts, defects=defects, left_out=left_out)


def _decoding_once() -> Callable[[bytes], str | None]:
    """``image_problem``, which decodes no image twice."""
    known: dict[bytes, str | None] = {}

    def problem_of(image: bytes) -> str | None:
        digest = hashlib.sha256(image).digest()
        if digest not in known:
            known[digest] = image_problem(image)
        return known[digest]

    return problem_of


def _read(
    root: Path, config: str, problem_of: Callable[[bytes], str | None]
) -> tuple[ConfigCount, list[Defect], dict[str, int], list[tuple[str, str]]]:
    """A config's counts, its defects, the row of each ID, and who is asked what in free words."""
    count = ConfigCount()
    defects: list[Defect] = []
    rows: dict[str, int] = {}
    asked: list[tuple[str, str]] = []
    if config == "Retain_Set" and not layout.holds_people(root, config):  # a benchmark may lack it
        return count, defects, rows, asked
    columns = layout.TRAINING_COLUMNS if config == "ft_Data" else layout.EVALUATION_COLUMNS
    for parsed in parsed_rows(root, config, columns, problem_of):
        if isinstance(parsed, Defect):
            defects.append(parsed)
            continue
        count.people += 1
        count.images += len(parsed.images)
        defects += parsed.defects
        if parsed.id:
            rows[parsed.id] = parsed.row
        count.training_pairs += len(parsed.pairs)
        asked += [(pair.person_id, comparable(pair.question)) for pair in parsed.pairs]
        for question in parsed.questions:
            count.questions[question.task][question.form] += 1
            if question.task == "generation":
                asked.append((question.person_id, comparable(question.text)))
    return count, defects, rows, asked
