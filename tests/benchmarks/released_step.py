"""Training as VGID's public script does it, with all its costs: the baseline of ``step``.

Written afresh from a description of the script, and apart from ``vgid.method.released``, whose
teacher is the student with its adapter off. Here, as there:

- the teacher is a second model, a deep copy made before the adapter is attached, and runs in every
  step;
- the teacher of the forget set sees noise in normalised pixel space, redrawn for each batch, the
  teacher of the retain set the image itself; neither sees an instruction;
- a sequence holds one question, so a portrait is processed and encoded for each of its questions,
  by both models;
- both models give logits of the whole vocabulary at every position, and the KL divergence is
  summed over all of them, padding included, then divided by the batch size;
- a forget batch and a retain batch take an optimizer step each.

Shape legend: B samples, L tokens of the longest, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.one_at_a_time import processor_inputs
from vgid.method.samples import TrainingSample
from vgid.models.backbones import Backbone

LORA_RANK = 16
LORA_ALPHA = 16
LORA_DROPOUT = 0.05


class PairLosses(NamedTuple):
    """Unweighted KL of a forget batch and of the retain batch after it, in nats a sample."""

    forget: float
    retain: float


def all_positions_kl(teacher_logits_BLV: Tensor, student_logits_BLV: Tensor) -> Tensor:
    """KL(teacher || student) over every position, divided by the batch size; a scalar in nats."""
    return F.kl_div(
        F.log_softmax(student_logits_BLV.float(), dim=-1),
        F.softmax(teacher_logits_BLV.float(), dim=-1),
        reduction="batchmean",
    )


class ReleasedStep:
    """Teacher, student and optimizer of the public script.

    Attributes:
        teacher: the second model, frozen.
        student: the backbone's model under a LoRA adapter.
        optimizer: AdamW over the adapter.
    """

    def __init__(
        self,
        backbone: Backbone,
        batch_size: int = 4,
        learning_rate: float = 5e-4,
        alpha: float = 1.0,
        beta: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Copy the teacher, then attach an adapter to the backbone, which is used up by it.

        Args:
            backbone: the base, and from now on the student.
            batch_size: questions of a forget or retain batch at most.
            learning_rate: of AdamW.
            alpha: weight of the forget loss.
            beta: weight of the retain loss.
            seed: of adapter, dropout and noise.
        """
        from peft import LoraConfig, get_peft_model

        self.backbone = backbone
        self.batch_size = batch_size
        self.weights = (alpha, beta)
        self.seed = seed
        self.pairs = 0
        self.teacher = copy.deepcopy(backbone.model).eval().requires_grad_(False)
        torch.manual_seed(seed)
        self.student = get_peft_model(
            backbone.model,
            LoraConfig(
                r=LORA_RANK,
                lora_alpha=LORA_ALPHA,
                lora_dropout=LORA_DROPOUT,
                target_modules=backbone.spec.lora_targets,
                task_type="CAUSAL_LM",
            ),
        ).train()
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate)

    def step(
        self, forget: Sequence[TrainingSample], retain: Sequence[TrainingSample]
    ) -> list[PairLosses]:
        """Train on the questions once, a forget batch and a retain batch in turns.

        Args:
            forget: questions with reference answers, in batches of ``batch_size``.
            retain: as many batches of the retain set.

        Returns:
            The losses of each pair of batches, before its own optimizer steps.

        Raises:
            ValueError: unequal numbers of batches.
        """
        pairs = zip(self._batches(forget), self._batches(retain), strict=True)
        return [self._pair(*pair) for pair in pairs]

    def _batches(self, samples: Sequence[TrainingSample]) -> list[Sequence[TrainingSample]]:
        return [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]

    def _pair(
        self, forget: Sequence[TrainingSample], retain: Sequence[TrainingSample]
    ) -> PairLosses:
        # Dropout and noise then depend on nothing that runs between two steps.
        torch.manual_seed(self.seed * 100_003 + self.pairs)
        self.pairs += 1
        alpha, beta = self.weights
        return PairLosses(self._update(forget, alpha, True), self._update(retain, beta, False))

    def _update(self, samples: Sequence[TrainingSample], weight: float, noise: bool) -> float:
        """One optimizer step; the KL before it."""
        queries = [sample.query for sample in samples]
        inputs = processor_inputs(self.backbone, queries, [sample.answer for sample in samples])
        seen = dict(inputs)
        if noise:
            seen["pixel_values"] = torch.rand_like(inputs["pixel_values"])
        with torch.no_grad():
            teacher_logits_BLV = self.teacher(**seen).logits
        kl = all_positions_kl(teacher_logits_BLV, self.student(**inputs).logits)
        self.optimizer.zero_grad()
        (weight * kl).backward()
        self.optimizer.step()
        return kl.item()
