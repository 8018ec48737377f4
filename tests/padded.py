"""Samples as plain padded sequences with labels: the reference that packs are tested against."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgid.models import encoding
from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded

IGNORE = -100  # label of what is no response, as in torch's cross-entropy


@dataclass
class Batch:
    """The model's inputs, and response token ids of shape (B, L), ``IGNORE`` elsewhere."""

    inputs: dict[str, Tensor]
    labels_BL: Tensor  # noqa: N815

    @property
    def predicts_BL(self) -> Tensor:
        """Mask of the positions whose next token is a response token, shape (B, L - 1)."""
        return self.labels_BL[:, 1:] != IGNORE

    @property
    def response_ids_R(self) -> Tensor:
        """The response tokens of all samples, one after the other."""
        return self.labels_BL[:, 1:][self.predicts_BL]


def collate(
    backbone: Backbone, encoded: Sequence[Encoded], responses: Sequence[Sequence[int]] | None = None
) -> Batch:
    answers = responses if responses is not None else [()] * len(encoded)
    inputs = encoding.collate(backbone, encoded, answers)
    labels_BL = torch.full_like(inputs["input_ids"], IGNORE)
    for row, (prompt, answer) in enumerate(zip(encoded, answers, strict=True)):
        start = len(prompt.prompt_ids)
        labels_BL[row, start : start + len(answer)] = torch.tensor(answer, dtype=torch.int64)
    return Batch(inputs, labels_BL)
