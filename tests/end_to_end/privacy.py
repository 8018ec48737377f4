"""Whether anything of the people to forget stands where it must not: searched for word by word."""

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from vgid.data.benchmark import Benchmark

NAMED = r"(?:is called|This is) ([A-Z]\w+ [A-Z]\w+)\."
"""How the synthetic benchmark tells of names."""


def private_texts(data: Path, ratio: int = 5) -> set[str]:
    """Every name, question and answer of the people to forget, training pairs included."""
    benchmark = Benchmark.open(data)
    people = benchmark.forget(ratio)
    ids = {person.id for person in people}
    asked = [question for person in people for question in person.questions]
    asked += [q for person in benchmark.test() if person.id in ids for q in person.questions]
    pairs = [pair for person in people for pair in benchmark.training_pairs()[person.id]]
    texts = {q.text for q in asked} | {pair.question for pair in pairs}
    texts |= {q.options[q.answer] if q.options else q.answer for q in asked}
    texts |= {pair.answer for pair in pairs}
    names = {name for text in texts for name in re.findall(NAMED, text)}
    assert len(names) == len(people)
    return texts | names


def leaks(texts: set[str], *places: Path) -> list[str]:
    """Which of the texts stand in which file below the places, SQLite's tables read as such."""
    wanted = {text: text.lower().encode() for text in texts}
    return [
        f"{path}: {text}"
        for path, content in _contents(places)
        for text, lower in wanted.items()
        if lower in content
    ]


def _contents(places: tuple[Path, ...]) -> Iterator[tuple[Path, bytes]]:
    """Files in small letters."""
    for place in places:
        for path in sorted(place.rglob("*")):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes().lower()
                yield path, content
                if content.startswith(b"sqlite format 3"):  # long texts lie in several pages
                    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as tables:
                        yield path, "\n".join(tables.iterdump()).lower().encode()
