"""README.md is one screen a topic, and all seven README files name only what is there."""

import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer

from vgid.cli import app, main

ROOT = Path(__file__).resolve().parent.parent
FURTHER = (
    "studies/README.md",
    "search_spaces/README.md",
    "vgid/README.md",
    "vgid/deployment/README.md",
    "vgid/bases/README.md",
    "tests/benchmarks/README.md",
)
SCRIPTS = tuple(sorted(f"studies/{path.name}" for path in (ROOT / "studies").glob("*.py")))
OURS = (".py", ".yaml", ".md", ".ipynb", ".toml")
"""What a name without a slash ends in that is a file of the project, and no file of a study."""
PLACEHOLDER = re.compile(r"[<>*\[\]{}$=:]|(?:^|/)[A-Z]+(?:-[A-Z])?(?:/|$)|^[~/]")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_the_first_page_is_short_and_leads_to_the_others():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8_000
    assert set(FURTHER) <= set(LINK.findall(text))


@pytest.mark.parametrize("name", ["README.md", *FURTHER])
def test_whatever_a_readme_names_is_there(name):
    assert faults((ROOT / name).read_text(), (ROOT / name).parent) == []


SOUND = """
# Made up
[Up](#made-up), [a study](../studies/README.md#what-a-study-leaves), `OUT/front.csv`, `trials.csv`,
`studies/pareto_search.py`, `tiny-llava.yaml`, `models/<name>/README.md`, `--rule knee`,
`vgid.pareto`
"""
COMMANDS = """
```
make study ARGS="--trials 3"   # a few
export A=b; ray job submit -- python studies/pareto_search.py --output OUT
python -m tests.benchmarks.step --json
vgid data check DIR --json
vgid pick --study OUT-A --study OUT-B
```
"""


def test_a_sound_text_has_no_fault():
    assert faults(SOUND + COMMANDS, ROOT / "search_spaces") == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("`studies/pareto_search.py`", "`studies/pareto_serach.py`"),
        ("`tiny-llava.yaml`", "`tiny-lava.yaml`"),
        ("vgid.pareto", "vgid.paretto"),
        ("../studies/README.md#", "../study/README.md#"),
        ("#what-a-study-leaves", "#what-a-study-left"),
        ("#made-up", "#made-down"),
        ("--rule", "--rules"),
        ("make study", "make studies"),
        ("--trials", "--trails"),
        ("-- python studies/pareto_search.py", "-- python studies/pareto.py"),
        ("--output", "--out"),
        ("tests.benchmarks.step", "tests.benchmarks.stop"),
        ("step --json", "step --jsonl"),
        ("data check", "data chek"),
        ("DIR --json", "DIR --jason"),
        ("pick --study", "pick --studies"),
    ],
)
def test_a_wrong_name_is_found(right, wrong):
    text = SOUND + COMMANDS
    assert text.count(right) == 1
    (fault,) = faults(text.replace(right, wrong), ROOT / "search_spaces")
    assert re.split(r"[`#. ]", wrong.strip("`"))[-1] in fault


def faults(text: str, folder: Path) -> list[str]:
    """What the text of a README in ``folder`` names and is not there."""
    prose = FENCED.sub("", text)
    blocks = [block for language, block in FENCED.findall(text) if language in ("", "sh", "bash")]
    spans = INLINE.findall(prose)
    links = LINK.findall(prose)
    found = [f"link {link}" for link in links if not _leads_somewhere(link, text, folder)]
    found += [f"path {span}" for span in spans if _is_path(span) and not _exists(span, folder)]
    found += [f"module {span}" for span in spans if _is_module(span) and not _source(span)]
    found += [f"option {flag}" for span in spans for flag in _flags([span.split(" ")[0]], _all())]
    lines = [line for block in blocks for line in block.splitlines()] + spans
    return found + [fault for line in lines for fault in _faults_of(line)]


def _leads_somewhere(link: str, text: str, folder: Path) -> bool:
    if "://" in link:
        return True
    path, _, anchor = link.partition("#")
    if path and not (folder / path).exists():
        return False
    there = (folder / path).read_text() if anchor and path else text
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", there), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings]
    return not anchor or anchor in slugs


def _is_path(span: str) -> bool:
    if " " in span or span.startswith("-") or PLACEHOLDER.search(span):
        return False
    return "/" in span or span.endswith(OURS)


def _exists(path: str, folder: Path) -> bool:
    return (ROOT / path).exists() or (folder / path).exists()


def _is_module(span: str) -> bool:
    return re.fullmatch(r"(vgid|tests)(\.\w+)+", span) is not None


def _source(module: str) -> Path | None:
    """The file of a module, or that of its package."""
    place = ROOT.joinpath(*module.split("."))
    files = (place.with_suffix(".py"), place / "__main__.py", place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _faults_of(line: str) -> Iterator[str]:
    for command in re.split(r"; | && | -- ", line):
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # prose with an apostrophe
            continue
        match words:
            case ["python", "-m", module, *arguments] if _source(module) is None:
                yield f"module {module}"
            case ["python", "-m", module, *arguments]:
                yield from _flags(arguments, _words_of(module))
            case ["python", script, *arguments] if not (ROOT / script).is_file():
                yield f"script {script}"
            case ["python", script, *arguments]:
                yield from _flags(arguments, _options(script))
            case ["make", target, *arguments]:
                if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                    yield f"target {target}"
                given = " ".join(arguments).removeprefix("ARGS=").split()
                yield from _flags(given, _options("studies/pareto_search.py"))
            case ["vgid", *arguments]:
                yield from _faults_of_vgid(arguments)


def _faults_of_vgid(arguments: list[str]) -> Iterator[str]:
    command: Any = typer.main.get_command(app)
    while arguments and not arguments[0].startswith("-") and hasattr(command, "commands"):
        name, *arguments = arguments
        if name not in command.commands:
            yield f"command {name}"
            return
        command = command.commands[name]
    yield from _flags(arguments, _options_of(command))


def _flags(arguments: list[str], known: frozenset[str]) -> Iterator[str]:
    for word in arguments:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--[a-z][a-z-]+", flag) and flag not in known:
            yield f"option {flag}"


@cache
def _options(script: str) -> frozenset[str]:
    """The options that a script's help explains."""
    return _explained(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), script)


def _explained(run: Callable[[], object], *command: str) -> frozenset[str]:
    help_text = StringIO()
    with (
        patch("sys.argv", [*command, "--help"]),
        redirect_stdout(help_text),
        suppress(SystemExit),
    ):
        run()
    indented = r"^  (?:-\w, )?(--[a-z-]+)"
    return frozenset({"--help", *re.findall(indented, help_text.getvalue(), re.MULTILINE)})


def _options_of(command: Any) -> frozenset[str]:
    if command.context_settings.get("allow_extra_args"):  # its flags are the fields of a config
        return _explained(main, "vgid", command.name)
    own = {option for parameter in command.params for option in parameter.opts}
    return frozenset({"--help", *own})


@cache
def _words_of(module: str) -> frozenset[str]:
    """Options that a module may have: the names in its source, and what benchmarks share."""
    source = _source(module)
    assert source is not None
    shared = (ROOT / "tests/benchmarks/machine.py").read_text()
    names = re.findall(r"\b[a-z][a-z_-]+\b", source.read_text() + shared)
    return frozenset("--" + name.replace("_", "-") for name in names)


@cache
def _all() -> frozenset[str]:
    """Every option of every study and command."""
    found = frozenset[str]().union(*map(_options, SCRIPTS))
    commands = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        found |= _options_of(command)
        commands += getattr(command, "commands", {}).values()
    return found
