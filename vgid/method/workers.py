"""The workers of a trial: how they deal work out among them, and tell each other what came of it.

Each is a process with the whole model and all data. What crosses between them are results, over
torch's process group; so all of them must make the same calls here, in the same order.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessException, spawn

from vgid.config import Config
from vgid.errors import InputError

T = TypeVar("T")
R = TypeVar("R", bound=Config)


@dataclass(frozen=True)
class Workers:
    """A trial's workers, seen from the one of ``rank``."""

    rank: int = 0
    count: int = 1

    def mine(self, work: Sequence[T]) -> Sequence[T]:
        """This worker's share, dealt out in turn: neighbours cost alike."""
        return work[self.rank :: self.count]

    def together(self, mine: list[T]) -> list[T]:
        """What all workers have, one worker's behind the other's."""
        if self.count == 1:
            return mine
        shares: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(shares, mine)
        return [each for share in shares for each in share]

    def first(self, value: T) -> T:
        """What the first worker has, on all of them."""
        told = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(told, src=0)
        return told[0]

    def sum(self, values: Tensor) -> Tensor:
        """The workers' sum of a tensor, on the CPU."""
        if self.count > 1:
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            values = values.to(device)
            torch.distributed.all_reduce(values)
        return values.cpu()


def in_processes(work: Callable[..., R], count: int, result: type[R], *arguments: Any) -> R:
    """What ``work(*arguments, workers)`` gives in the first of ``count`` processes of its own.

    They share this machine's GPUs, one each, or its cores. An ``InputError`` of one is raised here.
    """
    # Torch tells that it ends the others when one has failed, and what failed is said anyway.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            spawn(_process, (work, count, folder, arguments), count)
        except ProcessException:
            if (folder / "refused").exists():
                raise InputError((folder / "refused").read_text()) from None
            raise
        return result.model_validate_json((folder / "result").read_text())


def _process(
    rank: int, work: Callable[..., Config], count: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(rank)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    meeting = f"file://{folder / 'meeting'}"
    backend = "nccl" if gpus else "gloo"
    torch.distributed.init_process_group(backend, meeting, rank=rank, world_size=count)
    try:
        made = work(*arguments, Workers(rank, count))
    except InputError as error:
        (folder / "refused").write_text(str(error))
        raise
    if rank == 0:
        (folder / "result").write_text(made.model_dump_json())
    torch.distributed.barrier()  # who leaves first would take the group along
    torch.distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be dealt out over the workers (``vgid.method.sharding``), put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


ALONE = Workers()
