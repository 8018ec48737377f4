"""What is no trial's fault, in a real study: a disk fills, an adapter goes missing."""

import json
import subprocess
from contextlib import contextmanager, suppress

import pandas as pd
import pytest

from tests.end_to_end.light import SESSION, LightSession, LightStudy

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
        pytest.skip("only root may mount a disk to fill; `unshare -rm pytest FILE` runs it so")
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


class Mendable(LightSession):
    """Has a defect in trial 0001 until the study's folder has a file ``mended``."""

    def run(self, trial, trial_id, adapter_dir, on_epoch=None, checkpoint_dir=None):
        if trial_id == "0001" and not (adapter_dir.parent.parent / "mended").exists():
            raise ValueError("while answering who Fay Moss is")
        return super().run(trial, trial_id, adapter_dir, on_epoch, checkpoint_dir)


def records(output):
    return [json.loads(path.read_text()) for path in sorted(output.glob("trials/0*"))]


def test_a_full_disk_fails_no_trial_and_a_missing_adapter_costs_its_own_scores(tmp_path):
    output = tmp_path / "study"
    with small_disk(output, 600):
        session = {SESSION: f"{__name__}:Mendable", "LIGHT_EPOCH_S": "0.3"}
        with LightStudy(tmp_path, TRIALS, **session) as study:
            study.wait_for(lambda: {"0000", "0001"} <= set(study.ended()))
            ballast = output / ".ballast"
            fill(ballast)
            assert study.finish() == 1
            *_, said = study.shown().splitlines()
            assert said.startswith("The study stopped: ")
            assert said.endswith("go on with --resume.")
            assert str(output) in said
            ballast.unlink()
            statuses = [found["result"] and found["result"]["status"] for found in records(output)]
            assert statuses[:2] == ["completed", "failed"]
            assert set(statuses[2:]) <= {"completed", None}
            assert statuses.count("completed") < TRIALS - 1
            (output / "mended").touch()
            gone = output / "adapters" / "0000"  # of the front, as the study's seed has it
            gone.rename(output / "moved")
            study.start("--resume", "--retry-failed")
            assert study.finish() == 1
        *_, said = study.shown().splitlines()
        assert "No held-out scores for 1 of the base and the front, such as 0000: " in said
        (output / "moved").rename(gone)
        study.assert_consistent()
        front = pd.read_csv(output / "front.csv", dtype={"trial_id": str}).set_index("trial_id")
        assert list(front.index[front.heldout_retain_rougeL.isna()]) == ["0000"]
        assert len(front) > 1
        found = records(output)
        assert {record["result"]["status"] for record in found} == {"completed"}
        (why,) = found[1]["failures"]
        assert why.startswith("ValueError at test_lost.py:")
