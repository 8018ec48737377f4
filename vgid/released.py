"""The variant of VGID that its public script runs, for comparison with the paper's method.

It differs from the paper (facts from the script): no unlearning instruction; noise drawn with
``rand_like`` in normalised pixel space, anew for each batch; teacher-forced reference answers; KL
over every position, prompt and padding included, divided by the batch size only; two optimizer
steps a pair of batches, forget then retain, instead of one for the summed loss. Its defaults are
alpha = beta = 1, learning rate 5e-4, 5 epochs, batches of 4, LoRA of rank 16 with dropout 0.05.

The one liberty taken: the teacher is the same weights with the adapter off, not a second copy.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgid.backbones import Backbone
from vgid.config import TrialConfig
from vgid.distillation import DistillationSet, LossNotFiniteError, epoch_batches, retain_batch
from vgid.encoding import Batch, Encoded, collate
from vgid.results import EpochReport


def full_position_kl(teacher_logits_BLV: Tensor, student_logits_BLV: Tensor) -> Tensor:
    """KL(teacher || student) summed over all positions, divided by the batch size; a scalar."""
    return F.kl_div(
        F.log_softmax(student_logits_BLV.float(), dim=-1),
        F.softmax(teacher_logits_BLV.float(), dim=-1),
        reduction="batchmean",
    )


def with_normalised_noise(batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """Model inputs whose images are uniform noise in [0, 1) of NORMALISED pixel space."""
    inputs = dict(batch.inputs)
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"]
        noise = torch.rand(pixels.shape, generator=generator, dtype=torch.float32)
        inputs["pixel_values"] = noise.to(pixels)
    return inputs


def distill_released(
    backbone: Backbone,
    model: Any,
    forget: Sequence[tuple[Encoded, list[int]]],
    retain: Sequence[tuple[Encoded, list[int]]],
    config: TrialConfig,
) -> Iterator[EpochReport]:
    """Train the attached adapter in place as the public script does; one process.

    Args:
        backbone: the frozen base that ``model`` wraps.
        model: the ``PeftModel`` with a fresh adapter.
        forget: original prompts with the token ids of the reference answers.
        retain: the same for the retain set.
        config: the trial; its noise type, sigma, prompt style and response source are not used.

    Raises:
        LossNotFiniteError: NaN or infinite loss.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    per_epoch = math.ceil(len(forget) / config.batch_size)
    sets = [
        DistillationSet([prompt for prompt, _ in data], [], ["generation"] * len(data))
        for data in (forget, retain)
    ]
    for epoch in range(config.epochs):
        model.train()
        torch.manual_seed(config.seed * 100_003 + epoch)  # LoRA dropout
        noise = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        sums, norm = [0.0, 0.0], 0.0
        batches = epoch_batches(sets[0], config, epoch)
        for k, indices in enumerate(batches):
            step = epoch * per_epoch + k
            others = retain_batch(sets[1], config, step)
            for which, (data, chosen, weight) in enumerate(
                ((forget, indices, config.alpha), (retain, others, config.beta))
            ):
                pairs = [data[i] for i in chosen]
                batch = collate(backbone, [p for p, _ in pairs], [r for _, r in pairs])
                seen = with_normalised_noise(batch, noise) if which == 0 else batch.inputs
                with torch.no_grad(), model.disable_adapter():
                    teacher_logits = backbone.model(**seen).logits
                kl = full_position_kl(teacher_logits, backbone.model(**batch.inputs).logits)
                optimizer.zero_grad(set_to_none=True)
                (weight * kl).backward()
                norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
                if not math.isfinite(norm) or not math.isfinite(kl.item()):
                    raise LossNotFiniteError(
                        f"loss or gradient is not finite at step {step + 1} (epoch {epoch + 1})"
                    )
                optimizer.step()
                sums[which] += kl.item()
        model.eval()
        forget_loss, retain_loss = (s / len(batches) for s in sums)
        yield EpochReport(
            epoch=epoch + 1,
            epochs=config.epochs,
            step=(epoch + 1) * per_epoch,
            metrics={
                "forget_loss": forget_loss,
                "retain_loss": retain_loss,
                "loss": config.alpha * forget_loss + config.beta * retain_loss,
                "learning_rate": config.learning_rate,
                "grad_norm": norm,
            },
        )
