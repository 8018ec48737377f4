"""Processes of a test, and several of them as the workers of a trial: gloo on this machine.

What they import takes seconds, so they are forked by a server that has done it once for all tests.
"""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vgid.method.workers import Workers

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vgid.bases.finetune", "vgid.trial", "tests.workers"])


def run_workers(function: Callable[..., Any], count: int, folder: Path, *arguments: Any) -> list:
    """What ``function(workers, *arguments)`` gives in each of ``count`` processes.

    Args:
        function: of a module, so that another process finds it.
        count: of processes.
        folder: for where they meet, and what they hand back.
        *arguments: of the function.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(
        _work, (function, count, folder, arguments), nprocs=count, start_method="forkserver"
    )
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
    for path in (*(folder / f"{rank}.pt" for rank in range(count)), folder / "meeting"):
        path.unlink(missing_ok=True)
    return results


def _work(
    rank: int, function: Callable[..., Any], count: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meeting = f"file://{(folder / 'meeting').absolute()}"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=count)
    torch.save(function(Workers(rank, count), *arguments), folder / f"{rank}.pt")
    torch.distributed.barrier()  # who leaves first takes the group along
    torch.distributed.destroy_process_group()
