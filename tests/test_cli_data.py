import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_benchmark import SHARD, write_tiny
from vgid import cli
from vgid.data.benchmark import Benchmark


@pytest.fixture
def vgid(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command in this process, which imports what it needs once."""

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, args)])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(args, ended.value.code, said.out, said.err)

    return run


def test_make_then_check(vgid, tmp_path: Path):
    folder = tmp_path / "benchmark"
    made = vgid("data", "make", folder, "--seed", 3, "--json")
    assert (made.returncode, made.stderr) == (0, "")
    digest = Benchmark.open(folder).sha256
    assert json.loads(made.stdout) == {"data": str(folder), "seed": 3, "sha256": digest}

    checked = vgid("data", "check", folder, "--json")
    assert checked.returncode == 0
    report = json.loads(checked.stdout)
    assert report["defects"] == []
    assert report["configs"]["forget_5"]["people"] == 5

    again = vgid("data", "make", folder)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "not an empty folder" in again.stderr


def test_check_of_a_defective_benchmark(vgid, tmp_path: Path):
    root = write_tiny(tmp_path, {"retain_95": lambda rows: rows[1].update(ID="a/b")})
    (root / "Test_Set" / SHARD).write_bytes(b"torn")
    machine = vgid("data", "check", root, "--json")
    assert machine.returncode == 2
    defects = json.loads(machine.stdout)["defects"]
    assert [(d["config"], d["row"], d["field"]) for d in defects] == [
        ("retain_95", 1, "ID"),
        ("Test_Set", None, SHARD),
    ]
    assert all(set(d) == {"config", "row", "field", "problem"} for d in defects)
    person = vgid("data", "check", root)
    assert person.returncode == 2
    assert "looks like a path" in " ".join(person.stdout.split())
    assert "Traceback" not in person.stderr


def test_missing_folder_is_one_sentence(vgid, tmp_path: Path):
    result = vgid("data", "check", tmp_path / "nowhere", "--json")
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == f"{tmp_path / 'nowhere'}: no such folder; name the benchmark folder to check.\n"
    )


def test_usage_errors_and_help(vgid):
    for wrong in (("make", "x", "--seed", -1), ("weigh",), ("check",), ("check", "x", "--sed", 1)):
        done = vgid("data", *wrong)
        assert done.returncode == 2
        assert done.stderr.startswith("command line: ")
        assert done.stderr.endswith("; see --help.\n") and done.stderr.count("\n") == 1
    assert "check" in vgid("data").stdout  # without a command, the help
    listed = vgid("data", "--help")
    assert listed.returncode == 0
    assert "make" in listed.stdout and "check" in listed.stdout


def test_help_loads_no_heavy_module():
    code = (
        "import sys, vgid.cli\n"
        "sys.argv[1:] = ['finetune', '--help']\n"
        "try: vgid.cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "--gradient-checkpointing" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"
