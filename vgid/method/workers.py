"""The workers of a trial: how they deal work out among them, and tell each other what came of it.

Each is a process with the whole model and all data. What crosses between them are results, over
torch's process group; so all of them must make the same calls here, in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


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


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be dealt out over the workers (``vgid.method.sharding``), put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


ALONE = Workers()
