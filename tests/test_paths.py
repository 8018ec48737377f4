"""Paths that go astray, at every command line that writes a folder: one sentence, nothing made."""

import sys
from pathlib import Path

import pytest

from studies import compare_methods, paper_tables, pareto_search
from vgid import cli
from vgid.config import StudyConfig

ADDRESSES = ("s3://bucket/study", "gs://bucket/study", "http://host/study", "file:///tmp/study")


def vgid(arguments):
    """The ``vgid`` command, as from a shell."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["vgid", *arguments])
        cli.main()
    return stopped.value.code


COMMANDS = {
    "study": lambda path: pareto_search.main(["--output", path]),
    "comparison": lambda path: compare_methods.main(["--output", path]),
    "tables": lambda path: paper_tables.main(["--output", path]),
    "pick": lambda path: vgid(["pick", "--study", "s", "--output", path]),
    "unlearn": lambda path: vgid(["unlearn", "--data", "d", "--output", path]),
    "export": lambda path: vgid(["export", "deployment.yaml", path]),
    "data make": lambda path: vgid(["data", "make", path]),
    "data fetch": lambda path: vgid(["data", "fetch", path]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("path", [*ADDRESSES, "~nobody-here/study", "x" * 300])
def test_no_command_writes_where_no_folder_can_be(tmp_path, monkeypatch, capsys, command, path):
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[command](path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("is an address; name a folder on a disk or on NFS" in said) == (path in ADDRESSES)
    assert ("cannot be used" in said) == (path not in ADDRESSES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_written_into_the_package_of_a_ray_job(tmp_path, monkeypatch, capsys, command):
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1a2b"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    assert COMMANDS[command]("runs/first") == 2
    said = capsys.readouterr().err
    assert "runs/first lies in this Ray job's temporary package folder; give an abs" in said
    assert said.count("\n") == 1
    assert not list(package.iterdir())


@pytest.mark.parametrize("command", ["study", "comparison"])
@pytest.mark.parametrize("character", ["?", "#", "%"])
def test_a_study_lies_where_ray_and_mlflow_find_it(tmp_path, capsys, command, character):
    assert COMMANDS[command](str(tmp_path / f"what{character}20")) == 2
    said = capsys.readouterr().err
    assert f"what{character}20 has a '{character}'" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = StudyConfig(output=Path("a: b & c"), data=Path("~/data"))
    assert config.output == tmp_path / "a: b & c"
    assert config.data == Path("/home/someone/data")


@pytest.mark.parametrize(
    "command",
    [
        lambda path: vgid(["pick", "--study", path]),
        lambda path: vgid(["verify", path]),
        lambda path: vgid(["teachers", "--info", path]),
        lambda path: vgid(["report", path, "--subject", "A1"]),
        lambda path: pareto_search.main(["--model-path", path, "--dry-run"]),
    ],
)
def test_what_cannot_be_looked_for_is_one_sentence(command, capsys):
    assert command("x" * 300) == 2
    said = capsys.readouterr().err
    assert "File name too long; name another path" in said and said.count("\n") == 1


def test_a_study_is_not_put_below_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert pareto_search.main(["--output", str(tmp_path / "file" / "study"), "--dry-run"]) == 2
    assert "file: is a file; name a folder with --output." in capsys.readouterr().err
