"""Checkpoint of a trial under way: adapter, optimizer and reports in one safetensors file.

Random states are not in it: all that is random in ``distillation`` is a function of (seed, epoch).
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vgid.method.workers import ALONE, Workers, whole
from vgid.results import EpochReport

FILE_NAME = "state.safetensors"
_REPORTS = TypeAdapter(list[EpochReport])
_STATES = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


def save_checkpoint(
    folder: Path,
    trial_id: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    reports: Sequence[EpochReport],
    workers: Workers = ALONE,
) -> None:
    """Write a trial's state after the epochs of ``reports``, which nobody may have heard of yet.

    The first of its workers writes, and all must call: states may be dealt out over them.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = {"parameter": parameter.detach(), **optimizer.state[parameter]}
        for key, value in state.items():
            put_together = whole(value)
            if workers.rank == 0:
                tensors[f"{key}/{name}"] = put_together.cpu().contiguous()
    if workers.rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # By no process id: a worker on another node, which the study has lost, may still be writing.
    temporary = folder / f"{FILE_NAME}.{secrets.token_hex(4)}.tmp"
    told = json.dumps([report.model_dump() for report in reports])
    save_file(tensors, temporary, {"trial_id": trial_id, "reports": told})
    temporary.replace(folder / FILE_NAME)


def load_checkpoint(
    folder: Path,
    trial_id: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> list[EpochReport]:
    """Load the state of a trial; gives its epochs' reports, none if there is no such state."""
    try:
        with safe_open(folder / FILE_NAME, "pt") as file:
            metadata = file.metadata() or {}
            reports = _REPORTS.validate_json(metadata.get("reports", "[]"))
            if metadata.get("trial_id") != trial_id or not reports:
                return []
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, ValueError, RecursionError):
        return []
    shapes = {
        f"{kind}/{name}": torch.Size() if kind == "step" else parameter.shape
        for name, parameter in parameters.items()
        for kind in ("parameter", *_STATES)
    }
    # Of another LoRA rank, say: another trial's, under the same id.
    if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
        return []
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(parameter, tensors[f"parameter/{name}"]))
            # AdamW keeps its step count on the CPU; on a GPU every step would wait for it.
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].clone()
                if key == "step"
                else _like(parameter, tensors[f"{key}/{name}"])
                for key in _STATES
            }
    return reports


def _like(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """A copy of a whole tensor on the parameter's device, dealt out if the parameter is."""
    copy = tensor.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return copy
    # Every worker has read the file: there is nothing to send.
    where = parameter.device_mesh, parameter.placements
    return distribute_tensor(copy, *where, src_data_rank=None)


def checkpointed_trial(folder: Path) -> str | None:
    """Whose state the folder holds; None where there is none that can be read."""
    try:
        with safe_open(folder / FILE_NAME, "pt") as file:
            return (file.metadata() or {}).get("trial_id")
    except (FileNotFoundError, SafetensorError):
        return None
