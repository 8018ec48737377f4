"""What the student makes of a batch share, as the methods' losses ask for it.

The reference of a loss is the frozen base. Shape legend: S responses of the share (a sample with
two of them counts twice), R response tokens over all of them, T tokens of one sample behind its
image, D hidden width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgid.method.chunked_kl import chunked_kl
from vgid.models.backbones import Backbone
from vgid.models.packing import Packed, hidden_states


@dataclass
class DistillationBatch:
    """One rank's share of a batch, or of a part of it; weights are 0 for a placeholder."""

    packed: Packed  # prompts with responses y, of paired targets first the preferred of all
    teacher_RD: Tensor  # the teacher's hidden states that predict y
    weight: float  # 1 / response tokens of the whole batch over all ranks
    fraction: float  # the samples here / samples of the whole batch


@dataclass
class View:
    """A share ``part`` of a batch under the student: ``backbone`` and the ``PeftModel`` on it."""

    backbone: Backbone
    model: Any
    part: DistillationBatch

    @cached_property
    def _hidden_RD(self) -> Tensor:
        return self.part.packed.predicting(hidden_states(self.backbone, self.part.packed))

    def kl(self) -> Tensor:
        """Forward KL from the teacher (``objectives.forward_kl``), this share of the token mean."""
        lm_head = self.backbone.model.lm_head
        kl = chunked_kl(self._hidden_RD, self.part.teacher_RD, lm_head.weight, bias_V=lm_head.bias)
        return kl * self.part.weight

    def cross_entropy(self) -> Tensor:
        """Cross-entropy of the responses, this share of the mean over tokens."""
        return -self._token_logp(self._hidden_RD).sum() * self.part.weight

    def logp(self) -> Tensor:
        """Summed log-probability of each response under the student: fp32 (or fp64) of (S,)."""
        return self._per_response(self._token_logp(self._hidden_RD))

    def ref_logp(self) -> Tensor:
        """The same under the teacher whose states the share holds, without gradient."""
        with torch.no_grad():
            teacher_RD = self.part.teacher_RD.to(self.backbone.device)
            return self._per_response(self._token_logp(teacher_RD))

    def of_batch(self, mean: Tensor) -> Tensor:
        """This share of the batch's mean over samples, from the mean over the share's samples."""
        return mean * self.part.fraction

    def layer_hidden(self, layer: int) -> list[Tensor]:
        """The output of layer ``layer`` (1 is the first) behind the image: (T, D) for each sample.

        What stands first in every sequence would be pulled to the target by forget samples and held
        by retain samples. No layer above is run.
        """
        with _truncated(self.backbone, layer):
            states_BLD = hidden_states(self.backbone, self.part.packed)
        packed = self.part.packed
        image_BL = (packed.ids_BL == self.backbone.processor.image_token_id).tolist()
        found = []
        for row, path in zip(packed.rows, packed.paths, strict=True):
            seen = [k for k, place in enumerate(path) if image_BL[row][place]]
            found.append(states_BLD[row, path[seen[-1] + 1 if seen else 0 :]])
        return found

    def ref_layer_hidden(self, layer: int) -> list[Tensor]:
        """The same of the frozen base, without gradient."""
        # A second copy of the base would double the memory; LoRA off is the base, bit for bit.
        with torch.no_grad(), self.model.disable_adapter():
            return self.layer_hidden(layer)

    def _token_logp(self, hidden_RD: Tensor) -> Tensor:
        logits_RV = self.backbone.model.lm_head(hidden_RD)
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        return -F.cross_entropy(logits_RV, self.part.packed.response_ids_R, reduction="none")

    def _per_response(self, logp_R: Tensor) -> Tensor:
        lengths = list(map(len, self.part.packed.responses))
        return torch.stack([logp.sum() for logp in logp_R.split(lengths)])


@contextmanager
def _truncated(backbone: Backbone, layers: int) -> Iterator[None]:
    """The language model without its final norm and all but its first ``layers`` layers."""
    core = backbone.model.model.language_model
    whole, norm = core.layers, core.norm
    # Sliced rather than hooked: the layers above are then not run at all, forward or backward.
    core.layers, core.norm = whole[:layers], nn.Identity()
    try:
        yield
    finally:
        core.layers, core.norm = whole, norm
