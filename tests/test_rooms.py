"""The rooms of the package: ``make lint`` holds that imports only go down."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [command, "--no-cache"], cwd=folder, check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("method/views.py", "from vgid.study.ledger import Ledger"),
        ("data/layout.py", "import vgid.models.backbones"),  # side by side is not down
        (
            "deployment/rules.py",
            "def late():\n    from vgid.paper import claims\n    return claims",
        ),
        ("results.py", "from vgid.data.layout import Defect"),
    ],
)
def test_an_import_that_goes_up_is_caught(tmp_path, room, line):
    shutil.copytree(ROOT / "vgid", tmp_path / "vgid", ignore=shutil.ignore_patterns("weights"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert linted(tmp_path).returncode == 0
    module = tmp_path / "vgid" / room
    module.write_text(f"{module.read_text()}\n{line}\n")
    done = linted(tmp_path)
    assert done.returncode == 1
    assert f"vgid.{room.removesuffix('.py').replace('/', '.')}" in done.stdout
