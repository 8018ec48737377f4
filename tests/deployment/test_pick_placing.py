"""Deployments come into place whole or not at all."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.deployment.conftest import contents
from tests.deployment.made_up_deployment import deploy
from vgid.deployment.audit import report
from vgid.deployment.record import hash_files, read_deployment
from vgid.errors import InputError
from vgid.files import READY, recover, staged
from vgid.models.adapter_files import FILES

NAMES = ("tiny", "tiny.yaml")
SEVERAL = ("small", "small.yaml", *NAMES, "comparison.html")


def fill(folder, text, names=NAMES):
    for name in names:
        if "." in name:
            (folder / name).write_text(text)
        else:
            (folder / name / "adapter").mkdir(parents=True)
            (folder / name / "adapter" / "weights").write_text(text)


@pytest.fixture
def deployments(tmp_path):
    with staged(tmp_path / "deployments", NAMES) as staging:
        fill(staging, "first")
    return tmp_path / "deployments"


def test_the_first_comes_into_place_and_the_next_replaces_it(deployments):
    first = contents(deployments)
    assert {first[name] for name in ("tiny.yaml", "tiny/adapter/weights")} == {b"first"}
    with staged(deployments, NAMES) as staging:
        fill(staging, "second")
        assert contents(deployments / "tiny") == {"adapter/weights": b"first"}
    second = contents(deployments)
    assert second.keys() == first.keys()
    assert {second[name] for name in ("tiny.yaml", "tiny/adapter/weights")} == {b"second"}


def test_what_fails_changes_nothing(deployments):
    before = contents(deployments)
    with pytest.raises(KeyboardInterrupt), staged(deployments, NAMES) as staging:
        fill(staging, "second")
        raise KeyboardInterrupt
    assert contents(deployments) == before
    with pytest.raises(InputError), staged(deployments, NAMES) as staging:
        fill(staging, "second")
        (staging / "tiny.yaml").unlink()  # so that moving breaks off in the middle
    assert contents(deployments) == before


def test_what_fails_at_first_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="stop"), staged(tmp_path / "new", NAMES):
        raise ValueError("stop")
    assert not (tmp_path / "new").exists()


def test_two_at_once_are_refused(deployments):
    with staged(deployments, NAMES) as staging:
        fill(staging, "second")
        with pytest.raises(InputError, match="another pick"), staged(deployments, NAMES):
            pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output"), staged(tmp_path / "file" / "x", NAMES):
        pass


EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "open")


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do the work in a process that dies, like one that is killed, at its ``step``-th file event.

    Returns:
        Whether it did; False if the work was done before.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where threads run
        pid = os.fork()
    if pid == 0:
        left = step

        def count(event: str, _arguments: object) -> None:
            nonlocal left
            if event in EVENTS:
                left -= 1
                if left == 0:
                    os._exit(9)

        try:
            sys.addaudithook(count)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9


def place(folder: Path, text: str) -> None:
    with staged(folder, SEVERAL) as staging:
        fill(staging, text, SEVERAL)


def whole(folder: Path) -> str:
    """The text of all that is there, which is everything and of one placing."""
    found = {n: text.decode() for n, text in contents(folder).items() if not n.startswith(".")}
    expected = {n if "." in n else f"{n}/adapter/weights" for n in SEVERAL}
    assert found.keys() == expected and len(set(found.values())) == 1
    return found["tiny.yaml"]


def belongs(folder: Path) -> None:
    """No deployment file stands beside an adapter that is not its own."""
    for name in ("small", "tiny"):
        if (folder / f"{name}.yaml").exists():
            weights = folder / name / "adapter" / "weights"
            assert weights.read_text() == (folder / f"{name}.yaml").read_text()


@pytest.fixture
def kills(tmp_path: Path) -> Iterator[Path]:
    """Folders of a first placing, over which a second one was killed, at every step of it."""
    place(tmp_path / "first", "first")

    def at_every_step() -> Iterator[Path]:
        for step in range(1, 200):
            folder = tmp_path / str(step) / "deployments"
            shutil.copytree(tmp_path / "first", folder)
            if not killed_at(step, lambda folder=folder: place(folder, "second")):
                assert whole(folder) == "second" and step > 20
                return
            yield folder
        raise AssertionError("it did not come to an end")

    return at_every_step()


def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_the_next_finds_it(kills):
    seen = []
    for folder in kills:
        belongs(folder)
        if not (folder / READY).exists():
            whole(folder)  # nobody needs to do anything
        recover(folder)
        seen.append(whole(folder))
        place(folder, "third")
        assert whole(folder) == "third"
        assert {path.name for path in folder.iterdir()} == {*SEVERAL, ".lock"}
    changes = sum(a != b for a, b in pairwise(seen))
    assert (seen[0], seen[-1], changes) == ("first", "second", 1)


def test_a_recovery_may_be_killed_as_well(tmp_path):
    place(tmp_path / "first", "first")
    fill(tmp_path / "first" / READY, "second", SEVERAL)
    for step in range(1, 200):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "first", folder)
        killed = killed_at(step, lambda folder=folder: recover(folder))
        belongs(folder)
        recover(folder)
        assert whole(folder) == "second"
        if not killed:
            break
    assert 15 < step < 199


def test_what_cannot_be_moved_is_undone(deployments, monkeypatch):
    before = contents(deployments)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "tiny.yaml" and path.parent.name == READY:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(InputError, match="No space left"), staged(deployments, NAMES) as staging:
        fill(staging, "second")
    assert contents(deployments) == before


def test_a_reader_brings_into_place_what_a_killed_pick_had_ready(tmp_path):
    kept = tmp_path / "adapter"
    kept.mkdir()
    for name in FILES:
        (kept / name).write_text(name)
    file = deploy(tmp_path, kept)
    ready = file.parent / READY
    for trial_id in ("0004", "0005"):
        fresh = deploy(tmp_path / trial_id, kept, trial_id)
        shutil.copytree(fresh.parent, ready)
        if trial_id == "0005":
            file.unlink()  # as far as the killed one came
        report("0001", [tmp_path]) if trial_id == "0005" else None
        deployment, _ = read_deployment(file)
        assert deployment.origin.trial_id == trial_id
        assert hash_files(deployment.adapter_folder(file)) == deployment.adapter.files
        assert not ready.exists()
