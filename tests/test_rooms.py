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
        ("method/student.py", "from vgid.study.ledger import Ledger"),
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


def test_the_package_exports_its_functions_and_loads_them_when_asked():
    code = (
        "import sys, vgid\n"
        "heavy = {'torch', 'transformers', 'ray', 'optuna', 'mlflow', 'pydantic'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert vgid.TrialConfig().method == 'vgid' and 'torch' not in sys.modules\n"
        "import vgid.config, vgid.deployment.pick, vgid.study.run, vgid.trial\n"
        "places = [vgid.config, vgid.deployment.pick, vgid.study.run, vgid.trial]\n"
        "for name in vgid.__all__:\n"
        "    assert any(getattr(vgid, name) is vars(place).get(name) for place in places), name\n"
        "assert not hasattr(vgid, 'run_trail')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_room_holds_fourteen_modules_at_most():
    rooms = {path.parent for path in (ROOT / "vgid").glob("*/__init__.py")}
    assert len(rooms) == 10
    for room in rooms:
        modules = sorted(path.stem for path in room.glob("*.py") if path.stem != "__init__")
        assert len(modules) <= 14, f"{room.name} holds {len(modules)}: {modules}"
