"""What a slot takes of a node's memory: Ray's own processes for it, and each worker's.

Too low rather than too high where it is computed: a slot that is counted as too large costs a
study time, and at worst refuses what would have run.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vgid.config import TrialConfig
from vgid.errors import InputError

RAY_BYTES = 650 * 10**6
"""Ray's processes beside the workers of one slot: Train's controller, placement group cleaner,
dataset manager and synchronisation actor, and Tune's trainable: 605 in the sum of their
proportional set sizes (``python -m tests.benchmarks.slot_memory``), and some to spare."""

WORKER_BYTES = 900 * 10**6
"""A worker of an embedded backbone: Python, torch, encoded data, a trial. 696 by the same measure
between trials, up to 907 resident in the midst of one."""


def worker_bytes(
    backbone: str, model_path: str | None, folder: Path, trial: TrialConfig, on_gpu: bool
) -> int:
    """Memory of its node that a worker takes.

    Weights pass through the node's memory on their way to a GPU. Without one they stay there, in
    fp32, and so does what a step of distillation keeps (``vgid.cost_model``).

    Args:
        backbone: name of its row.
        model_path: local folder or hub id in place of the row's own source.
        folder: where the base is.
        trial: whose batches and LoRA a step has.
        on_gpu: whether the worker has a GPU.

    Raises:
        InputError: a file of weights is damaged.
    """
    from vgid.backbones import spec

    weights = sum(map(_elements, folder.glob("*.safetensors")))
    if on_gpu:
        return WORKER_BYTES + 2 * weights
    step = 0 if spec(backbone).embedded else _step_bytes(backbone, model_path, trial)
    return WORKER_BYTES + 4 * weights + step


def _elements(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header alone."""
    try:
        with path.open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            header = json.loads(file.read(length))
        return sum(
            math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path}: is no safetensors file, or is damaged; restore it or name another folder "
            "with --model-path."
        ) from None


def _step_bytes(backbone: str, model_path: str | None, trial: TrialConfig) -> int:
    """LoRA in training, the loss's buffers, and the larger of the two terms' kept activations."""
    import torch

    from vgid.backbones import outline
    from vgid.cost_model import activation_bytes, adapter_bytes, vocabulary_bytes
    from vgid.distillation import share
    from vgid.profile_prompts import synthetic_set

    shape = outline(backbone, model_path)
    config = shape.model.config
    shape.model = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))
    text: Any = config.get_text_config()
    rank, together = trial.lora_rank, trial.questions_per_image
    kept = []
    for batch in (trial.batch_size, trial.retain_batch_size):
        part = math.ceil(batch / trial.gradient_accumulation)
        portraits = math.ceil(part / together)
        data = synthetic_set(shape, portraits, min(part, together), 0)
        pack = share(shape, data, range(len(data.prompts)), 0)[0].packed
        kept.append(
            activation_bytes(
                text, [pack], rank, trial.gradient_checkpointing, trial.lora_dropout > 0
            )
        )
    return adapter_bytes(text, rank) + vocabulary_bytes(text) + max(kept)
