"""How several workers train one model: each the whole of it (DDP), or dealt out over them (FSDP2).

Dealt out, a worker keeps a part of every decoder layer, and a layer is put together while it is
run. A trial's base, which is frozen, is so only while it trains, and only where a worker could not
hold it beside what a step keeps; LoRA is whole on every worker. All that learns in
``vgid finetune --full`` is dealt out, gradients and optimizer states included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vgid.config import TrialConfig
from vgid.errors import LossNotFiniteError
from vgid.method.workers import Workers, whole
from vgid.models.backbones import Backbone
from vgid.models.memory import device_bytes

SPARED = 0.1
"""Share of a GPU's memory that is left to fragments, kernels' own and what is not counted."""


@contextmanager
def parted(backbone: Backbone, trial: TrialConfig, workers: Workers) -> Iterator[None]:
    """Inside, a base that a worker could not hold whole beside a step is dealt out.

    Outside it is whole: there each worker answers questions of its own, as many as it has, and no
    layer could be put together.
    """
    core = backbone.model.model.language_model
    if workers.count == 1 or not (_dealt(core) or _too_large(backbone, trial, workers)):
        yield
        return
    if not _dealt(core):
        # Not of embeddings, which are looked up outside the language model's forward pass, nor of
        # an adapter, which is whole on each worker and gone after its trial.
        adapter = {p for p in core.parameters() if p.requires_grad}
        _deal(core, backbone, workers, ignored={*core.embed_tokens.parameters(), *adapter})
    part_again(backbone)
    try:
        yield
    except LossNotFiniteError:  # all workers meet it; another's error must not wait for them
        make_whole(backbone)
        raise
    make_whole(backbone)


def part_again(backbone: Backbone) -> None:
    """Deal a base out again that ``make_whole`` put together; nothing if it never was."""
    for module in _dealt(backbone.model.model.language_model):
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def make_whole(backbone: Backbone) -> None:
    """Put a base together that was dealt out; all workers at a time, if it is not whole yet."""
    for module in _dealt(backbone.model.model.language_model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def deal_out(backbone: Backbone, workers: Workers) -> None:
    """Deal the decoder layers of a model out that learns itself; ``spread`` does the rest."""
    _deal(None, backbone, workers)


def spread(student: nn.Module, backbone: Backbone, workers: Workers) -> nn.Module:
    """The student as the workers train it together; its forward pass is the loss."""
    if workers.count == 1:
        return student
    if any(isinstance(p, DTensor) and p.requires_grad for p in student.parameters()):
        _deal(student, backbone, workers, {p for p in student.parameters() if not p.requires_grad})
        return student
    # Same seed, same adapter on every rank: nothing to broadcast, least of all the base.
    return DistributedDataParallel(student, init_sync=False)


def gathered(model: nn.Module, dtype: torch.dtype, workers: Workers) -> dict[str, Tensor]:
    """A model's weights in ``dtype`` in the memory of the first worker, which has them alone."""
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter.detach())  # one after the other: a GPU never has all of them
        if workers.rank == 0:
            weights[name] = tensor.to("cpu", dtype)
    return weights


def _too_large(backbone: Backbone, trial: TrialConfig, workers: Workers) -> bool:
    from vgid.method.profile_prompts import step_bytes  # which needs the loop, that needs this

    there = device_bytes(backbone.device)
    weights = sum(p.nbytes for p in backbone.model.parameters())
    needed = weights + step_bytes(backbone, trial, workers.count)
    return there is not None and needed > (1 - SPARED) * there


def _dealt(core: Any) -> list[Any]:
    """The modules of a language model that are dealt out, itself the root."""
    return [module for module in (core, *core.layers) if hasattr(module, "unshard")]


def _deal(
    root: Any, backbone: Backbone, workers: Workers, ignored: set[nn.Parameter] | None = None
) -> None:
    """Deal out the decoder layers, if they are not yet, and behind them what else ``root`` has.

    What is ``ignored`` of either stays whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(backbone.device.type, (workers.count,))
    core = backbone.model.model.language_model
    # What learns is in fp32 and computes in the precision of what is frozen.
    frozen = next(p.dtype for p in backbone.model.parameters() if not p.requires_grad)
    precision = MixedPrecisionPolicy(frozen, torch.float32)
    how: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "ignored_params": ignored}
    if not any(hasattr(layer, "unshard") for layer in core.layers):
        for layer in core.layers:
            fully_shard(layer, **how)
    if root is not None:
        # A root, so that one layer is fetched while the one before is run.
        fully_shard(root, **how)
