"""Sessions that run the real trial and misbehave on cue; shipped to the workers by value."""

import ctypes
import errno
import gc
import os
import signal
from pathlib import Path

import psutil

from vgid.cluster.mailbox import Job
from vgid.trial import TrialSession

SOMEONE = "Fay Moss"
"""Stands in messages of exceptions, and in no line that a traceback quotes."""


class Watched(TrialSession):
    """The real session; its results also tell the process and its memory."""

    def run(self, trial, trial_id, adapter_dir, on_epoch=None, checkpoint_dir=None):
        result = super().run(trial, trial_id, adapter_dir, on_epoch, checkpoint_dir)
        # What is free goes back to the kernel, so that only what is still held counts: without it
        # the resident size wanders by tens of MiB, with the order of allocations.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        seen = {"pid": float(os.getpid()), "rss": float(psutil.Process().memory_info().rss)}
        return result.model_copy(update={"metrics": result.metrics | seen})


class Mortal(Watched):
    """Is killed once, between the second and the third epoch of the trial called ``killed``."""

    def run(self, trial, trial_id, adapter_dir, on_epoch=None, checkpoint_dir=None):
        mark = Path(self.request.store) / f"{trial_id}.was-killed"

        def mortal(report):
            goes_on = on_epoch(report)
            if trial_id == "killed" and report.epoch == 2 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return goes_on

        return super().run(trial, trial_id, adapter_dir, mortal, checkpoint_dir)


class Fragile(TrialSession):
    """Has a defect in trial 0002, with a name in the message, and once loses a disk in 0003.

    Its base knows little.
    """

    def base_scores(self, part, seed=None):
        known = super().base_scores(part, seed)
        little = {"value": 0.2, "low": 0.1, "high": 0.3}
        return known | {"forget_rougeL": known["forget_rougeL"].model_copy(update=little)}

    def run(self, trial, trial_id, adapter_dir, on_epoch=None, checkpoint_dir=None):
        if trial_id == "0002":
            raise ValueError(f"while answering who {SOMEONE} is")
        mark = Path(self.request.store) / "was-lost"
        if trial_id == "0003" and not mark.exists():
            mark.touch()
            raise OSError(errno.EIO, f"while reading who {SOMEONE} is")
        return super().run(trial, trial_id, adapter_dir, on_epoch, checkpoint_dir)


class Homeless(TrialSession):
    """Has no memory for the base, with a name in the message, and so none for a trial either."""

    def base_scores(self, part, seed=None):
        message = f"out of memory while asking who {SOMEONE} is"
        raise RuntimeError(message)


def trial_job(root: Path, name: str, config) -> Job:
    return Job(
        id=name,
        kind="trial",
        trial=config,
        adapter=root / "adapters" / name,
        checkpoints=root / "checkpoints" / name,
    )
