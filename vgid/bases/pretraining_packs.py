"""Several questions about one picture in one sequence, exactly as if each were asked alone.

The questions share the prompt's beginning: picture and instruction. A block mask hides them from
each other, and each continues the positions of the shared prefix.

Shape legend: B packs, L tokens of the longest, A position axes, N pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vgid.bases.recipe import Obedience, Pack
from vgid.models.backbones import PromptFrame
from vgid.models.encoding import IGNORE
from vgid.prompts import with_instruction


class Architecture(Protocol):
    """What the trainer has to know about a model; ``tiny_llava`` and ``tiny_qwen`` are two.

    Attributes:
        FRAME: the prompt frame.
        IMAGE: the image token.
        IMAGE_TOKENS: image tokens of a portrait.
        LANGUAGE_STEPS: optimizer steps of stage 2.
        OBEDIENCE: how the recipe takes an instruction beside an intact picture.
    """

    FRAME: PromptFrame
    IMAGE: str
    IMAGE_TOKENS: int
    LANGUAGE_STEPS: int
    OBEDIENCE: Obedience

    def corpus(self, extra: Sequence[str]) -> list[str]:
        """Texts that the tokenizer learns from, ``extra`` among them."""
        ...

    def build_tokenizer(self, texts: list[str]) -> Any:
        """The tokenizer learned from ``texts``."""
        ...

    def build_processor(self, tokenizer: Any) -> Any:
        """The processor around a tokenizer."""
        ...

    def build_model(self, tokenizer: Any, seed: int) -> Any:
        """The untrained model."""
        ...

    def pixel_values(self, processor: Any, pictures: Sequence[Any]) -> Tensor:
        """What the tower takes, N pictures along the first axis."""
        ...

    def tower(self, model: Any) -> nn.Module:
        """What stage 1 trains and freezes."""
        ...

    def projector(self, model: Any) -> nn.Module:
        """What stage 2 trains besides the language model: from features to image tokens."""
        ...

    def tower_features(self, model: Any, pixels: Tensor) -> Tensor:
        """What the projector takes, N pictures along the first axis, in image token order."""
        ...

    def positions(self, model: Any, ids: Sequence[int]) -> Tensor:
        """Rotary positions of a prompt that shows at most one portrait: (A, L)."""
        ...

    def save(self, model: Any, processor: Any, folder: Path) -> None:
        """Write everything that ``backbones.load`` reads."""
        ...


@dataclass(frozen=True)
class PackedBatch:
    """Packs as tensors.

    Attributes:
        ids_BL: token ids.
        labels_BL: response tokens, ``IGNORE`` elsewhere.
        positions_ABL: position ids, continued from the shared prefix in every turn.
        mask_B1LL: True where a query position (third axis) may see a key position.
    """

    ids_BL: Tensor
    labels_BL: Tensor
    positions_ABL: Tensor
    mask_B1LL: Tensor


class PackEncoder:
    """Turns packs into token ids that equal those of the whole prompts, turn by turn."""

    def __init__(self, architecture: Architecture, model: Any, tokenizer: Any) -> None:
        self.architecture = architecture
        self.model = model
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self._positions: dict[tuple[int, ...], Tensor] = {}

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def pieces(self, pack: Pack) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Ids of the shared prefix, and by turn of the question and of the response.

        Cut where the tokenizer cuts words anyway: behind a line break or a special token, or in
        front of a space.
        """
        parts = self.architecture
        frame = parts.FRAME.text if pack.picture is None else parts.FRAME.image
        before, after = frame.split("{text}")
        opening = before.rstrip(" ").replace(parts.IMAGE, parts.IMAGE * parts.IMAGE_TOKENS)
        space = before[len(before.rstrip(" ")) :]
        if pack.style is not None:
            opening, space = f"{opening}{space}{with_instruction('', pack.style)}", ""
        prefix = [*self.tokenizer("")["input_ids"], *self._ids(opening)]
        turns = [
            (
                self._ids(f"{space}{text}{after}"),
                [*self._ids(parts.FRAME.separator + response), self.tokenizer.eos_token_id],
            )
            for text, response in pack.turns
        ]
        return prefix, turns

    def collate(self, packs: Sequence[Pack]) -> PackedBatch:
        """Pad packs on the right to one batch."""
        ids, labels, segments, positions = zip(*map(self._row, packs), strict=True)
        length = max(map(len, ids))

        def padded(rows: Sequence[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        # Segment 0 is the prefix, turns count from 1, padding is a segment of its own.
        segments_BL = padded(segments, -1)
        same = segments_BL[:, :, None] == segments_BL[:, None, :]
        prefix = segments_BL[:, None, :] == 0
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return PackedBatch(
            padded(ids, self.tokenizer.pad_token_id),
            padded(labels, IGNORE),
            torch.stack([nn.functional.pad(p, (0, length - p.shape[1])) for p in positions], 1),
            ((same | prefix) & causal)[:, None],
        )

    def _row(self, pack: Pack) -> tuple[list[int], list[int], list[int], Tensor]:
        """Ids, labels, segments and positions of a pack."""
        prefix, turns = self.pieces(pack)
        start = len(prefix)
        ids, labels, segments = list(prefix), [IGNORE] * start, [0] * start
        before_AL = self._prefix_positions(prefix)
        axes = len(before_AL)
        positions = [before_AL]
        for number, (question, response) in enumerate(turns, 1):
            length = len(question) + len(response)
            ids += question + response
            labels += [IGNORE] * len(question) + response
            segments += [number] * length
            # Text goes on behind the largest position so far, in all axes alike.
            positions.append((before_AL.max() + 1 + torch.arange(length)).expand(axes, -1))
        return ids, labels, segments, torch.cat(positions, 1)

    def _prefix_positions(self, prefix: list[int]) -> Tensor:
        key = tuple(prefix)
        if key not in self._positions:
            self._positions[key] = self.architecture.positions(self.model, prefix)
        return self._positions[key]
