"""Checkpoint of a trial under way: adapter, optimizer state and reports in one safetensors file.

It is written to a temporary name and renamed, so a crash leaves the last whole one. Random states
are not in it: everything random in ``distillation`` is a function of (seed, epoch).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vgid.results import EpochReport

FILE_NAME = "state.safetensors"


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
            metadata = file.metadata()
            if metadata["trial_id"] != trial_id:
                return 0
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return 0
    kinds = ("parameter", "step", "exp_avg", "exp_avg_sq")
    if tensors.keys() != {f"{kind}/{name}" for name in parameters for kind in kinds} or any(
        tensors[f"parameter/{name}"].shape != x.shape for name, x in parameters.items()
    ):
        return 0
    epochs_done = int(metadata["epochs_done"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(
                    "cpu" if key == "step" else parameter.device, copy=True
                )
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    steps = int(next(iter(optimizer.state.values()))["step"])
    schedule.last_epoch = steps
    for group, base, factor in zip(
        optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(steps)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return epochs_done


def checkpoint_reports(folder: Path) -> list[EpochReport]:
    """The reports that were saved with a checkpoint, which ``load_checkpoint`` has accepted."""
    with safe_open(folder / FILE_NAME, "pt") as file:
        kept = json.loads(file.metadata().get("reports", "[]"))
    return [EpochReport.model_validate(report) for report in kept]
