"""What is no trial's fault, in a real study: a disk fills, an adapter goes missing."""

import json
import subprocess
from contextlib import contextmanager, suppress

import pytest

from tests.end_to_end.light import LightStudy

TRIALS = 6


@contextmanager
def small_disk(folder, megabytes):
    """A disk of its own at ``folder``; skips where this user may not mount one."""
    folder.mkdir()
    size = ["-o", f"size={megabytes}m"]
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", *size, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast):
    """Leave no block of a disk."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def test_a_full_disk_fails_no_trial_and_a_missing_adapter_costs_its_own_scores(tmp_path):
    output = tmp_path / "study"
    with small_disk(output, 600):
        study = LightStudy(tmp_path, TRIALS, LIGHT_EPOCH_S="0.3")
        with study:
            study.wait_for(study.ended)
            ballast = output / ".ballast"
            fill(ballast)
            code = study.finish()
            print(code, study.shown(), study.log())
            assert code == 1
            ballast.unlink()
            study.start("--resume")
            assert study.finish() == 0
        study.assert_consistent()
        summary = json.loads((output / "study.json").read_text())
        assert summary["counts"]["completed"] == TRIALS
