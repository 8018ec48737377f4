"""What a slot takes of its node: cores, threads, GPUs, and memory.

Memory is computed too low rather than too high: a slot that is counted as too large costs a study
time, and at worst refuses what would have run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from vgid.config import TrialConfig
from vgid.errors import InputError

# One thread a worker everywhere: the same numbers on every machine, and faster than two threads
# where trials share the cores.
CPUS_PER_WORKER = 1
# Ray's process beside the workers of one slot, Tune's trainable: 129 MB of proportional set size
# (``python -m tests.benchmarks.slot_memory``), and some to spare.
RAY_BYTES = 150 * 10**6
# A worker of an embedded backbone: Python, torch, encoded data, a trial. 747 by the same measure
# between trials, up to 907 resident in the midst of one.
WORKER_BYTES = 900 * 10**6


@dataclass(frozen=True)
class SlotShape:
    """The resources of one slot: ``workers`` processes with ``gpus_per_worker`` GPUs each."""

    workers: int = 1
    gpus_per_worker: float = 0.0
    worker_bytes: int = WORKER_BYTES  # see the function of that name

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray resources of one worker, with its share of the memory that Ray takes for the slot."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        # Ray's own processes take no resource of their own, so the workers ask for them: else a
        # node fills with slots by what their workers need, and the kernel ends one when they
        # come up.
        memory = self.worker_bytes + RAY_BYTES // self.workers
        return {"CPU": float(CPUS_PER_WORKER), **gpus, "memory": float(memory)}

    @property
    def need(self) -> str:
        """What a worker needs, for people."""
        return told(self.per_worker)

    def fits(self, node: Mapping[str, float], names: Iterable[str] | None = None) -> int:
        """How many of its workers a node of these resources holds, by some of them or by all."""
        need = {name: self.per_worker[name] for name in names or self.per_worker}
        return min(_times(name, node.get(name, 0), each) for name, each in need.items())


def told(resources: Mapping[str, float]) -> str:
    """Ray resources for people."""
    return " and ".join(
        f"{decimal(int(value))} memory" if name == "memory" else f"{value:g} {name}"
        for name, value in resources.items()
    )


def _times(name: str, there: float, each: float) -> int:
    # A fraction of a GPU is one of a single GPU: two have no room for three times 0.6.
    if name == "GPU" and each < 1:
        return int(there) * int(1 / each)
    return int(there / each)


@contextmanager
def worker_threads() -> Iterator[None]:
    """Compute as a study's workers do: the same numbers to the last bit, kind to other programs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(CPUS_PER_WORKER)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def worker_bytes(
    backbone: str, model_path: str | None, folder: Path, trial: TrialConfig, on_gpu: bool
) -> int:
    """Memory of its node that a worker takes; ``InputError`` if weights in ``folder`` are damaged.

    On their way to a GPU, weights pass through the node's memory one after the other, and a file's
    at most are there. Without a GPU they stay, in fp32, and so does what a step of distillation
    keeps (``vgid.models.memory``).
    """
    from vgid.models.backbones import outline, spec

    weights = [_elements(path) for path in folder.glob("*.safetensors")]
    if on_gpu:
        return WORKER_BYTES + 2 * max(weights)
    step = 0
    if not spec(backbone).embedded:
        # Here, for it loads torch, which keeps a driver from starting for two seconds.
        from vgid.method.profile_prompts import step_bytes

        step = step_bytes(outline(backbone, model_path), trial)
    return WORKER_BYTES + 4 * sum(weights) + step


def _elements(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        raise InputError(
            f"{path}: is no safetensors file, or is damaged; restore it or name another folder "
            "with --model-path."
        ) from None
