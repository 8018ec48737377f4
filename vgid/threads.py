"""Torch threads of whatever computes beside a study: as many as its workers have."""

from collections.abc import Iterator
from contextlib import contextmanager

from vgid.plan import CPUS_PER_WORKER


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
