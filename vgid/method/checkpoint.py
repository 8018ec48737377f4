"""Checkpoint of a trial under way: adapter, optimizer state and reports in one safetensors file.

It is written to a temporary name and renamed, so a crash leaves the last whole one. Random states
are not in it: everything random in ``distillation`` is a function of (seed, epoch).
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


def save_checkpoint(
    folder: Path,
    trial_id: str,
    epochs_done: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    reports: Sequence[EpochReport] = (),
) -> None:
    """Write the state after ``epochs_done`` epochs of trial ``trial_id`` to ``folder``.

    The epochs' reports go with it: whoever was to hear of the last one may be killed before.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE_NAME}.{os.getpid()}.tmp"
    metadata = {
        "trial_id": trial_id,
        "epochs_done": str(epochs_done),
        "reports": json.dumps([report.model_dump() for report in reports]),
    }
    save_file(tensors, temporary, metadata)
    temporary.replace(folder / FILE_NAME)


def load_checkpoint(
    folder: Path,
    trial_id: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> int:
    """Load the state of trial ``trial_id`` into its parameters, optimizer and schedule.

    Returns:
        The number of epochs already done: 0 if the folder holds no state of this trial, or one
        that is not that of these very parameters; the trial then begins anew.
    """
    try:
        with safe_open(folder / FILE_NAME, "pt") as file:
            metadata = file.metadata() or {}
            epochs_done = metadata.get("epochs_done", "")
            if metadata.get("trial_id") != trial_id or not epochs_done.isdecimal():
                return 0
            _reports(metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, ValueError, RecursionError):
        return 0
    shapes = {
        f"{kind}/{name}": torch.Size() if kind == "step" else parameter.shape
        for name, parameter in parameters.items()
        for kind in ("parameter", "step", "exp_avg", "exp_avg_sq")
    }
    # Of another LoRA rank, say: another trial's, under the same id.
    if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
        return 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(
                    # AdamW keeps its step count on the CPU; on a GPU every step would wait for it.
                    "cpu" if key == "step" else parameter.device,
                    copy=True,
                )
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    steps = int(next(iter(optimizer.state.values()))["step"])
    # Set by hand: all that the schedule knows is how many steps were taken, which the optimizer
    # counts too.
    schedule.last_epoch = steps
    for group, base, factor in zip(
        optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(steps)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return int(epochs_done)


def checkpoint_reports(folder: Path) -> list[EpochReport]:
    """The reports that were saved with a checkpoint, which ``load_checkpoint`` has accepted."""
    with safe_open(folder / FILE_NAME, "pt") as file:
        return _reports(file.metadata())


def _reports(metadata: Mapping[str, str]) -> list[EpochReport]:
    return _REPORTS.validate_json(metadata.get("reports", "[]"))
