"""Checking a benchmark folder: what it holds by config and task, and every defect it has.

Unlike the reader, the checker never stops: a torn file of one config hides nothing in another.
Reports name configs, rows and fields, and never a value of the data but person IDs.
"""

import hashlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from vgid.data.benchmark import decode_image, people_defects
from vgid.data.layout import (
    CONFIGS,
    EVALUATION_COLUMNS,
    FORGET_RATIOS,
    TRAINING_COLUMNS,
    Defect,
    Row,
    holds_people,
    read_rows,
)
from vgid.data.people import (
    comparable,
    parse_id,
    parse_images,
    parse_person,
    parse_training_pairs,
)
from vgid.errors import InputError
from vgid.prompts import Form, Task
from vgid.results import describe_left_out


@dataclass
class ConfigCount:
    """What one config holds, defective or not.

    Attributes:
        people: rows.
        images: encoded images.
        questions: number by task and form.
        training_pairs: questions with answers in the training metadata.
        in_training: generation questions that stand word for word in the person's training pairs.
        questions_left_out: questions or training pairs that a run with ``skip_defects`` leaves out.
        people_left_out: people whom it leaves out.
    """

    people: int = 0
    images: int = 0
    questions: dict[Task, dict[Form, int]] = field(
        default_factory=lambda: {task: dict.fromkeys(get_args(Form), 0) for task in get_args(Task)}
    )
    training_pairs: int = 0
    in_training: int = 0
    questions_left_out: int = 0
    people_left_out: int = 0


@dataclass
class Report:
    """Counts by config and every defect, in the order of ``CONFIGS`` and rows.

    Attributes:
        configs: counts by config.
        defects: what is to be repaired.
        left_out: defects that need not be, since the run leaves out what has them.
    """

    configs: dict[str, ConfigCount]
    defects: list[Defect]
    left_out: list[Defect]

    def as_json(self) -> dict[str, Any]:
        """Plain data: counts as ``configs``, and ``defects`` and ``left_out`` as lists.

        An entry of a list is ``{config, row, field, problem}``.
        """
        return {
            "configs": {name: asdict(count) for name, count in self.configs.items()},
            **{
                name: [
                    {key: getattr(defect, key) for key in ("config", "row", "field", "problem")}
                    for defect in defects
                ]
                for name, defects in (("defects", self.defects), ("left_out", self.left_out))
            },
        }

    def print(self, console: Console) -> None:
        """Print a table of the counts, then one of the defects or a line that there are none."""
        counts = Table("config", title="Benchmark", box=SIMPLE)
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
            if not found:
                continue
            title = f"{name}: {len(found)}"
            defects = Table("config", "row", "field", "problem", title=title, box=SIMPLE)
            for defect in found:
                row = "" if defect.row is None else str(defect.row)
                defects.add_row(defect.config, row, escape(defect.field), escape(defect.problem))
            console.print(defects)
        if not self.defects:
            console.print("No defects.")
        left_out = {
            name: {"questions": count.questions_left_out, "people": count.people_left_out}
            for name, count in self.configs.items()
            if count.questions_left_out or count.people_left_out
        }
        if left_out:
            console.print(f"Left out as defective: {describe_left_out(left_out)}.")


class Rehearsed(Protocol):
    """What a benchmark is to be good for besides being read (``vgid.evaluation.rehearsal.Run``)."""

    @property
    def skip_defects(self) -> bool:
        """Whether what is defective is left out."""

    def defects(self, root: Path, broken: Set[str]) -> list[Defect]:
        """What would stop it, looking at no config that is broken."""


def check_benchmark(root: Path, progress: bool = False, run: Rehearsed | None = None) -> Report:
    """Read a benchmark whole and report what it holds and every defect.

    Args:
        root: benchmark folder.
        progress: show a progress bar on stderr.
        run: also report what would stop these studies; None judges the data alone.

    Raises:
        InputError: there is no such folder, or the run's backbone cannot be found.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the benchmark folder to check.")
    checks = [_ConfigCheck(root, config) for config in CONFIGS]
    steps = track(
        checks,
        description="Checking",
        console=Console(stderr=True),
        disable=not progress,
        transient=True,
    )
    image_problems: dict[str, str | None] = {}
    for check in steps:
        check.run(image_problems)
    by_name = {check.config: check for check in checks}
    trained_on = set(by_name["ft_Data"].asked)
    for check in checks:
        if check.config != "ft_Data":
            check.count.in_training = sum(question in trained_on for question in check.asked)
    places = {name: check.rows for name, check in by_name.items() if check.complete}
    if run is not None and run.skip_defects:
        for check in checks:
            check.leave_out(check.defects)
    for ratio in FORGET_RATIOS:
        for defect in people_defects(places, ratio):
            by_name[defect.config].defects.append(defect)
    if run is not None:
        stopping = run.defects(root, {c.config for c in checks if c.defects})
        for check in checks:
            mine = [defect for defect in stopping if defect.config == check.config]
            check.defects += mine
            if run.skip_defects:
                check.leave_out(mine)
    return Report(
        {check.config: check.count for check in checks},
        [defect for check in checks for defect in check.by_row(check.defects)],
        [defect for check in checks for defect in check.by_row(check.left_out)],
    )


class _ConfigCheck:
    """Findings about one config.

    Attributes:
        config: its name.
        count: what it holds.
        rows: first row of each person ID.
        complete: every file could be read, so a person who is not in ``rows`` is truly missing.
        asked: person and wording of each generation question, or of each training pair.
    """

    def __init__(self, root: Path, config: str) -> None:
        self.root = root
        self.config = config
        self.count = ConfigCount()
        self.rows: dict[str, int] = {}
        self.complete = True
        self.asked: list[tuple[str, str]] = []
        self.defects: list[Defect] = []
        self.left_out: list[Defect] = []

    def leave_out(self, defects: Sequence[Defect]) -> None:
        """Count what of ``defects`` concerns single questions or rows, and list it no longer."""
        skipped = [d for d in defects if d.question is not None or d.row is not None]
        self.defects = [defect for defect in self.defects if defect not in skipped]
        self.left_out += skipped
        rows = {d.row for d in self.left_out if d.question is None}
        questions = {d.question for d in self.left_out if d.row is None or d.row not in rows}
        self.count.people_left_out = len(rows)
        self.count.questions_left_out = len(questions)

    def run(self, image_problems: dict[str, str | None]) -> None:
        """Read the config; ``image_problems`` by digest spares decoding an image twice."""
        if self.config == "Retain_Set" and not holds_people(self.root, self.config):
            return  # a benchmark may lack celebrities
        columns = TRAINING_COLUMNS if self.config == "ft_Data" else EVALUATION_COLUMNS
        for item in read_rows(self.root, self.config, columns):
            if isinstance(item, Defect):
                self.defects.append(item)
                if item.field == "ID" or item.field.endswith(".parquet"):
                    self.complete = False
            else:
                self.count.people += 1
                self._check_id(item)
                self._check_content(item)
                self.defects += self._check_images(item, image_problems)

    @staticmethod
    def by_row(defects: Sequence[Defect]) -> list[Defect]:
        """Defects of whole files first, then by row."""
        return sorted(defects, key=lambda defect: -1 if defect.row is None else defect.row)

    def _check_id(self, row: Row) -> None:
        person_id, defects = parse_id(self.config, row)
        if defects or not person_id:
            return
        if person_id in self.rows:
            what = f"the ID is a duplicate of row {self.rows[person_id]}"
            self.defects.append(Defect(self.config, row.index, "ID", what))
        else:
            self.rows[person_id] = row.index

    def _check_content(self, row: Row) -> None:
        if self.config == "ft_Data":
            pairs, defects = parse_training_pairs(self.config, row)
            self.count.training_pairs += len(pairs)
            self.asked += [(pair.person_id, comparable(pair.question)) for pair in pairs]
            self.defects += defects + parse_images(self.config, row)[1]
            return
        person, defects = parse_person(self.config, row)
        for question in person.questions:
            self.count.questions[question.task][question.form] += 1
            if question.task == "generation":
                self.asked.append((question.person_id, comparable(question.text)))
        self.defects += defects

    def _check_images(self, row: Row, image_problems: dict[str, str | None]) -> Iterator[Defect]:
        images, _ = parse_images(self.config, row)
        self.count.images += len(images)
        for name, data in images.items():
            digest = hashlib.sha256(data).hexdigest()
            if digest not in image_problems:
                image_problems[digest] = _image_problem(data)
            problem = image_problems[digest]
            if problem:
                yield Defect(self.config, row.index, name, problem)


def _image_problem(data: bytes) -> str | None:
    try:
        decode_image(data)
    except InputError as error:
        return str(error)
    return None
