"""The variant of VGID that its public script runs, for comparison with the paper's method.

It differs from the paper (facts from https://github.com/JackChen-seu/VGID, baselines/Vgid.py): no
unlearning instruction; ``rand_like`` noise in normalised pixel space, anew for each batch;
teacher-forced reference answers without an end-of-sequence token; KL over every position, prompt
and padding included, divided by the batch size only; two optimizer steps a pair of batches, forget
then retain; no gradient clipping; the raw questions of ``ft_Data``; an epoch, shuffled anew, ends
with the smaller set; LoRA of scale 1, its initial weights Gaussian; the defaults of
``vgid.config.RELEASED``.

Liberties taken: the teacher is the same weights with the adapter off, not a second copy in half
precision; LoRA is on the language model only; the retain set lacks those who are scored as unseen,
and with ``train_pairs: unheld`` both sets lack the held-out questions.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgid.config import TrialConfig
from vgid.errors import LossNotFiniteError
from vgid.method.distillation import epoch_report
from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded, collate
from vgid.results import EpochReport
from vgid.seeds import sample_generator


def full_position_kl(teacher_logits_BLV: Tensor, student_logits_BLV: Tensor) -> Tensor:
    """KL(teacher || student) summed over all positions, divided by the batch size; a scalar."""
    return F.kl_div(
        F.log_softmax(student_logits_BLV.float(), dim=-1),
        F.softmax(teacher_logits_BLV.float(), dim=-1),
        reduction="batchmean",
    )


def with_normalised_noise(
    inputs: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Model inputs whose images are uniform noise in [0, 1) of NORMALISED pixel space."""
    if "pixel_values" not in inputs:
        return inputs
    pixels = inputs["pixel_values"]
    # There [0, 1) is middle to light grey; the paper's random noise has every pixel value.
    noise = torch.rand(pixels.shape, generator=generator, dtype=torch.float32)
    return {**inputs, "pixel_values": noise.to(pixels)}


def epoch_pairs(
    forget: int, retain: int, config: TrialConfig, epoch: int
) -> list[tuple[list[int], list[int]]]:
    """The forget and the retain batch of each step of an epoch (0-based): two shuffled loaders."""
    loaders = []
    for name, count in (("forget", forget), ("retain", retain)):
        order = sample_generator(config.seed, f"released {name} epoch {epoch}").permutation(count)
        starts = range(0, count, config.batch_size)
        loaders.append([order[i : i + config.batch_size].tolist() for i in starts])
    return list(zip(*loaders, strict=False))


def retain_drawn(forget: int, retain: int, config: TrialConfig) -> Iterator[int]:
    """The retain samples of all steps, one after the other."""
    for epoch in range(config.epochs):
        for _, batch in epoch_pairs(forget, retain, config, epoch):
            yield from batch


def distill_released(
    backbone: Backbone,
    model: Any,
    forget: Sequence[tuple[Encoded, list[int]]],
    retain: Sequence[tuple[Encoded, list[int]]],
    config: TrialConfig,
) -> Iterator[EpochReport]:
    """Train the attached adapter as the public script does, on prompts and their answers' ids."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # The script's AdamW is that of an older transformers, whose eps was this.
    optimizer = torch.optim.AdamW(parameters, eps=1e-6, weight_decay=config.weight_decay)
    # Its linear decay is over the batches of both sets, but takes one step of it an epoch.
    steps = sum(math.ceil(len(data) / config.batch_size) for data in (forget, retain))
    for epoch in range(config.epochs):
        model.train()
        torch.manual_seed(config.seed * 100_003 + epoch)  # LoRA dropout
        noise = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        rate = config.learning_rate * (1 - epoch / (steps * config.epochs))
        optimizer.param_groups[0]["lr"] = rate
        losses, norm = {"forget": 0.0, "retain": 0.0}, 0.0
        pairs = epoch_pairs(len(forget), len(retain), config, epoch)
        for step, batches in enumerate(pairs, epoch * len(pairs) + 1):
            terms = zip(losses, (forget, retain), batches, (config.alpha, config.beta), strict=True)
            # A step of the optimizer for each term, where equation 5 has one for the sum.
            for term, data, chosen, weight in terms:
                prompts, responses = zip(*(data[i] for i in chosen), strict=True)
                inputs = collate(backbone, prompts, responses)
                seen = with_normalised_noise(inputs, noise) if term == "forget" else inputs
                with torch.no_grad(), model.disable_adapter():
                    teacher_logits = backbone.model(**seen).logits
                kl = full_position_kl(teacher_logits, backbone.model(**inputs).logits)
                optimizer.zero_grad(set_to_none=True)
                (weight * kl).backward()
                norm = float(nn.utils.get_total_norm([p.grad for p in parameters]))
                if not math.isfinite(norm) or not math.isfinite(kl.item()):
                    raise LossNotFiniteError(
                        f"loss or gradient is not finite at step {step} (epoch {epoch + 1})"
                    )
                optimizer.step()
                losses[term] += kl.item()
        model.eval()
        means_2 = torch.tensor(list(losses.values()), dtype=torch.float64) / len(pairs)
        yield epoch_report(config, epoch, len(pairs), means_2, rate, norm)
