"""Reading a benchmark: people, questions, training pairs and images; splitting its questions."""

import hashlib
import io
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image, ImageCms

from vgid.data import layout
from vgid.data.address import local
from vgid.data.layout import Defect
from vgid.data.people import Parsed, Person, Question, TrainingPair, parsed_rows
from vgid.errors import InputError
from vgid.results import LeftOut, QuestionPart

__all__ = ["Benchmark", "Person", "Question", "TrainingPair", "decode_image", "split_questions"]

MAX_IMAGE_PIXELS = 50_000_000  # by the header, before memory is spent on decoding
MAX_IMAGE_BYTES = 32 * 2**20  # of the file, before it is opened
# Pillow's rarer parsers are left out as needless risk.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark folder, read config by config when asked.

    Every reading method raises InputError at the first defect of what it reads, and only of that:
    a torn config stops nobody who does not need it. Methods that take ``only`` read just these
    person IDs, which saves memory.

    Attributes:
        skip_defects: leave broken questions out in place of raising, and people with them whose
            portrait, ID or whole metadata is broken. Defects of files and columns still raise.
        unfit: IDs of sound questions and training pairs that a backbone cannot take; left out too.
        dropped: what reading left out so far by config: IDs of questions, rows of people.
    """

    root: Path
    skip_defects: bool = False
    unfit: frozenset[str] = frozenset()
    dropped: dict[str, set[str | int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, root: Path, skip_defects: bool = False) -> Self:
        """Open a folder, or the copy of what an address names, without reading any row.

        InputError if it has no config of the layout.
        """
        root = local(root)
        if not root.is_dir():
            raise InputError(
                f"{root}: no such benchmark folder; make one with `vgid data make {root}`."
            )
        if not any(layout.shard_paths(root, config) for config in layout.CONFIGS):
            raise InputError(
                f"{root}: no MLLMU-Bench config (a folder such as forget_5 with "
                "train-00000-of-00001.parquet) in this folder; name the folder that holds them."
            )
        return cls(root, skip_defects)

    @property
    def left_out(self) -> LeftOut:
        """How much reading left out so far."""
        return {
            config: {
                "questions": sum(isinstance(what, str) for what in self.dropped[config]),
                "people": sum(isinstance(what, int) for what in self.dropped[config]),
            }
            for config in layout.CONFIGS
            if config in self.dropped
        }

    def forget(self, ratio: int) -> tuple[Person, ...]:
        """The people to forget: 5, 10 or 15 per cent."""
        return self._people(f"forget_{ratio}")

    def retain(self, ratio: int) -> tuple[Person, ...]:
        """The people to retain when ``ratio`` per cent are forgotten."""
        return self._people(f"retain_{100 - ratio}")

    def test(self, only: Collection[str] | None = None) -> tuple[Person, ...]:
        """Everyone again with transformed portraits and paraphrased questions."""
        return self._people("Test_Set", only)

    def full(self, only: Collection[str] | None = None) -> tuple[Person, ...]:
        """All fictitious people."""
        return self._people("Full_Set", only)

    def celebrities(self, only: Collection[str] | None = None) -> tuple[Person, ...]:
        """Real people (``Retain_Set``), for general utility."""
        return self._people("Retain_Set", only)

    def has_celebrities(self) -> bool:
        """Whether there are any; a benchmark may lack them."""
        return layout.holds_people(self.root, "Retain_Set")

    def person_ids(self, config: str) -> tuple[str, ...]:
        """The person IDs of a config in file order, read without images or questions."""
        return tuple(parsed.id for parsed in self.rows(config, ("ID",)))

    def training_pairs(self) -> dict[str, tuple[TrainingPair, ...]]:
        """Fine-tuning questions and answers of everyone by person ID, from ``ft_Data``."""
        return {row.id: tuple(row.pairs) for row in self.rows("ft_Data", ("ID", "metadata"))}

    @cached_property
    def sha256(self) -> str:
        """Digest over the bytes and the name of every shard: in another config it is other data."""
        digest = hashlib.sha256()
        for config in sorted(layout.CONFIGS):
            for path in layout.shard_paths(self.root, config):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{config}/{path.name}\0{content}\n".encode())
        return digest.hexdigest()

    def _people(self, config: str, only: Collection[str] | None = None) -> tuple[Person, ...]:
        return tuple(
            Person(row.id, tuple(row.images.values()), tuple(row.questions))
            for row in self.rows(config, layout.EVALUATION_COLUMNS, only)
        )

    def rows(
        self, config: str, columns: Sequence[str], only: Collection[str] | None = None
    ) -> Iterator[Parsed]:
        """What is sound of a config, in file order; columns and ``only`` as ``parsed_rows``'s."""
        # Decoding everything takes a while, and whoever needs an image names what is wrong with it.
        look = image_problem if self.skip_defects else None
        for parsed in parsed_rows(self.root, config, columns, look, only):
            if isinstance(parsed, Defect):
                raise self._error(parsed)
            if not self.skip_defects:
                self.refuse(parsed.defects)
            gone = self.unfit | {defect.question for defect in parsed.defects}
            whole = None in gone
            ids = {q.id for q in parsed.questions} | {pair.id for pair in parsed.pairs}
            left_out: set[str | int] = {parsed.row} if whole else {*(ids & gone)}
            if left_out:
                self.dropped.setdefault(config, set()).update(left_out)
            if not whole:
                questions = [question for question in parsed.questions if question.id not in gone]
                pairs = [pair for pair in parsed.pairs if pair.id not in gone]
                yield replace(parsed, questions=questions, pairs=pairs)

    def people_defects(self, ratio: int) -> Iterator[Defect]:
        """Who of a request is not where a study looks for them (``people_defects``)."""
        configs = (f"forget_{ratio}", f"retain_{100 - ratio}", "ft_Data", "Test_Set")
        places = {name: {p: row for row, p in enumerate(self.person_ids(name))} for name in configs}
        return people_defects(places, ratio)

    def refuse(self, defects: Iterable[Defect]) -> None:
        """Raise InputError at the first defect, if there is one."""
        for defect in defects:
            raise self._error(defect)

    def _error(self, defect: Defect) -> InputError:
        row = "" if defect.row is None else f"row {defect.row}, "
        return InputError(
            f"{self.root / defect.config}: {row}{defect.field}: {defect.problem}; "
            f"`vgid data check {self.root}` lists every defect to repair."
        )


def people_defects(places: Mapping[str, Mapping[str, int]], ratio: int) -> Iterator[Defect]:
    """Who is both to forget and to retain, or is missing in a config that another one presumes.

    ``places`` is the row of each person in the configs that could be read whole.
    """
    forget, retain = f"forget_{ratio}", f"retain_{100 - ratio}"
    for person_id, row in places.get(forget, {}).items():
        if person_id in places.get(retain, {}):
            twin = places[retain][person_id]
            yield Defect(forget, row, "ID", f"overlap: row {twin} of {retain} is the same person")
    presumed = {forget: ("Full_Set", "ft_Data", "Test_Set"), retain: ("ft_Data",)}
    for config, others in presumed.items():
        for other in others:
            for person_id, row in places.get(config, {}).items():
                if other in places and person_id not in places[other]:
                    yield Defect(config, row, "ID", f"the person is missing in {other}")


def split_questions(person: Person, part: QuestionPart, seed: int) -> tuple[Question, ...]:
    """One part of a person's questions: selection and evaluation must not share any.

    Within each task and form the questions are shuffled by a seeded hash and dealt to ``search``
    and ``held_out`` in turn, so that both are alike in number; each keeps the person's order. The
    hash covers what a question says, not where it stands, so the same question falls into the same
    part whatever the order of the file and whichever config it is read from.
    """
    if part == "all":
        return person.questions
    groups: dict[str, list[Question]] = {}
    for question in person.questions:
        groups.setdefault(f"{question.task}/{question.form}", []).append(question)
    chosen: set[str] = set()
    for name, questions in groups.items():
        group = f"{seed}/{person.id}/{name}"
        keyed = sorted((_hash(f"{group}/{q.text}/{q.answer}"), q.id) for q in questions)
        # Either part may begin, or one of them would have the odd question of every person.
        first = (int(_hash(group), 16) + (part == "held_out")) % 2
        chosen.update(question_id for _, question_id in keyed[first::2])
    return tuple(question for question in person.questions if question.id in chosen)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def decode_image(data: bytes, source: str = "the image") -> Image.Image:
    """Decode a stored image of any Pillow mode to 8-bit RGB, its first frame if it has several.

    Transparency is dropped and orientation tags are ignored, as the benchmark's own code does.
    InputError where ``source`` is not readable or, by its header, too large.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise InputError(
            f"{source} has more than {MAX_IMAGE_BYTES:,} bytes; store a smaller image."
        )
    try:
        with warnings.catch_warnings():
            # Between Pillow's own limits it only warns; the limit here is the lower one.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        return _to_rgb(image)
    except Image.DecompressionBombError:
        raise InputError(
            f"{source} has more than {MAX_IMAGE_PIXELS:,} pixels; store a smaller image."
        ) from None
    except Exception as error:  # a torn file makes Pillow's parsers raise nearly anything
        raise InputError(
            f"{source} cannot be read ({type(error).__name__}); store it as one of "
            f"{', '.join(IMAGE_FORMATS)}."
        ) from None


def image_problem(data: bytes) -> str | None:
    """Why a stored image cannot be shown, or None."""
    try:
        decode_image(data)
    except InputError as error:
        return str(error)
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # only an in-place conversion returns None
        return converted
    if image.mode.startswith("I"):
        # Pillow clips wide integers at 255, which turns a 16-bit portrait white.
        wide = np.asarray(image).astype(np.int64)
        if image.mode.startswith("I;16") or wide.max() > 255:
            wide >>= 8
        return Image.fromarray(wide.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's own advice; straight to RGB it warns
    return image.convert("RGB")
