"""Checkpoint of a trial under way: adapter, optimizer and reports in one safetensors file.

Random states are not in it: all that is random in ``distillation`` is a function of (seed, epoch).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

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
) -> None:
    """Write a trial's state after the epochs of ``reports``, which nobody may have heard of yet."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = {"parameter": parameter.detach(), **optimizer.state[parameter]}
        tensors |= {f"{key}/{name}": value.cpu().contiguous() for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE_NAME}.{os.getpid()}.tmp"
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
            parameter.copy_(tensors[f"parameter/{name}"])
            # AdamW keeps its step count on the CPU; on a GPU every step would wait for it.
            places = {"step": "cpu", "exp_avg": parameter.device, "exp_avg_sq": parameter.device}
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(place, copy=True) for key, place in places.items()
            }
    return reports


def checkpointed_trial(folder: Path) -> str | None:
    """Whose state the folder holds; None where there is none that can be read."""
    try:
        with safe_open(folder / FILE_NAME, "pt") as file:
            return (file.metadata() or {}).get("trial_id")
    except (FileNotFoundError, SafetensorError):
        return None
