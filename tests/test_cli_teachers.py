import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vgid.models.store import ContentStore, key_of
from vgid.study.ledger import Ledger

SIZE = 72 + 400


def vgid(*args: object, answer: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vgid.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=answer)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study's output folder with two kinds of entries and the base's scores."""
    output = tmp_path / "study"
    for kind, count in (("teachers", 1), ("vision", 2)):
        store = ContentStore(output / "store", kind, 2_000_000)
        for n in range(count):
            store.get_or_compute(key_of(n), lambda: {"x": torch.zeros(100)})
    (output / "trials").mkdir()
    (output / "trials" / "study.json").write_text("{}")
    (output / ".lock").touch()
    (output / "store" / f"base-{key_of(0)}.json").write_text("{}")
    return output


def entries(study: Path) -> int:
    return len(list(study.rglob("*.safetensors")))


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a refusal."""
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_info_as_json_and_as_a_table(study: Path):
    machine = vgid("teachers", "--info", "--json", study)
    assert (machine.returncode, machine.stderr) == (0, "")
    found = json.loads(machine.stdout)
    assert (found["root"], found["limit_bytes"]) == (str(study / "store"), 2_000_000)
    assert (found["entries"], found["bytes"]) == (3, 3 * SIZE)
    assert found["by_kind"]["vision"]["entries"] == 2
    assert found["newest_use"] == found["by_kind"]["vision"]["newest_use"]

    person = vgid("teachers", "--info", study / "store")
    assert person.returncode == 0
    rows = [line.replace("│", " ").split() for line in person.stdout.splitlines()]
    (teachers,) = (row for row in rows if row[:1] == ["teachers"])
    assert teachers[1:4] == ["1", "472", "bytes"]
    assert person.stdout.endswith(f"{study / 'store'}: 3 entries, 1.4 kB, at most 2.0 MB\n")
    assert entries(study) == 3


def test_clear_says_what_it_freed_and_leaves_the_rest(study: Path):
    done = vgid("teachers", "--clear", "--yes", study)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Removed 3 entries and freed 1.4 kB.\n"
    assert entries(study) == 0
    assert (study / "store" / f"base-{key_of(0)}.json").exists()
    assert (study / "trials").exists()

    again = vgid("teachers", "--clear", "--yes", "--json", study / "store")
    assert again.returncode == 0
    assert json.loads(again.stdout)["bytes"] == 0
    empty = vgid("teachers", "--info", study)
    assert "never" in empty.stdout and "0 entries" in empty.stdout


def test_clear_asks_first(study: Path):
    for answer in ("n\n", "\n", ""):
        no = vgid("teachers", "--clear", "--json", study, answer=answer)
        assert (no.returncode, no.stdout, entries(study)) == (2, "", 3)
        question, sentence = no.stderr.splitlines()
        assert question == f"Remove 3 entries (1.4 kB) from {study / 'store'}? [y/N]"
        assert sentence == "vgid teachers: nothing was removed; answer y or add --yes."
    yes = vgid("teachers", "--clear", "--json", study, answer="y\n")
    assert (yes.returncode, entries(study)) == (0, 0)
    assert json.loads(yes.stdout)["entries"] == 3


def test_clear_is_refused_while_a_study_runs(study: Path):
    with Ledger(study):
        for folder in (study, study / "store"):
            sentence = refused(vgid("teachers", "--clear", "--yes", folder))
            assert sentence.startswith(f"{study}: a study is running in this folder")
        assert vgid("teachers", "--info", study).returncode == 0
    assert entries(study) == 3
    assert vgid("teachers", "--clear", "--yes", study).returncode == 0


def test_a_store_outside_a_study_leaves_nothing_beside_it(tmp_path: Path):
    ContentStore(tmp_path / "elsewhere", "vision")
    assert vgid("teachers", "--clear", "--yes", tmp_path / "elsewhere").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("option", ["--info", "--clear"])
def test_a_folder_without_a_store(tmp_path: Path, option: str):
    weights = tmp_path / "weights" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("weights")
    for folder, what in (
        (tmp_path, "the folder holds no store"),
        (tmp_path / "nowhere", "no such folder"),
        (weights, "no such folder"),
    ):
        sentence = refused(vgid("teachers", option, "--yes", "--json", folder))
        assert sentence == f"{folder}: {what}; name a study's output folder or its store.\n"
    assert weights.read_text() == "weights"


def test_exactly_one_of_the_two(study: Path):
    for options in ((), ("--info", "--clear", "--yes")):
        assert "exactly one of --info and --clear" in refused(vgid("teachers", *options, study))
    assert entries(study) == 3
    assert vgid("teachers", "--info").returncode == 2


def test_looking_at_a_store_loads_no_heavy_module(study: Path):
    code = (
        "import sys; from pathlib import Path; from vgid.models.store import clear, info\n"
        f"info(Path({str(study)!r})); clear(Path({str(study)!r}))\n"
        "print(sorted({'torch', 'transformers', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
