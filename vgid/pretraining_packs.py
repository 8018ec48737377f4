"""Several questions about one picture in one sequence, exactly as if each were asked alone.

The questions share the prompt's beginning: picture and instruction. A block mask hides them from
each other, and each continues the positions of the shared prefix.

Shape legend: B packs, L tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgid.embedded_model import IMAGE, IMAGE_TOKENS
from vgid.embedded_recipe import Pack
from vgid.encoding import IGNORE
from vgid.prompts import with_instruction


@dataclass(frozen=True)
class PackedBatch:
    """Packs as tensors.

    Attributes:
        ids_BL: token ids.
        labels_BL: response tokens, ``IGNORE`` elsewhere.
        positions_BL: position ids, continued from the shared prefix in every turn.
        mask_B1LL: True where a query position (third axis) may see a key position.
    """

    ids_BL: Tensor
    labels_BL: Tensor
    positions_BL: Tensor
    mask_B1LL: Tensor


class PackEncoder:
    """Turns packs into token ids that equal those of the whole prompts, turn by turn."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def pieces(self, pack: Pack) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Ids of the shared prefix, and by turn of the question and of the response.

        Cut where the tokenizer cuts words anyway: behind a line break or in front of a space.
        """
        opening = "USER:" if pack.picture is None else f"USER: {IMAGE * IMAGE_TOKENS}\n"
        space = " " if pack.picture is None else ""
        if pack.style is not None:
            opening, space = f"{opening}{space}{with_instruction('', pack.style)}", ""
        prefix = [self.tokenizer.bos_token_id, *self._ids(opening)]
        turns = [
            (
                self._ids(f"{space}{text}\nASSISTANT:"),
                [*self._ids(f" {response}"), self.tokenizer.eos_token_id],
            )
            for text, response in pack.turns
        ]
        return prefix, turns

    def collate(self, packs: Sequence[Pack]) -> PackedBatch:
        """Pad packs on the right to one batch."""
        rows = [self._row(pack) for pack in packs]
        length = max(len(row[0]) for row in rows)

        def padded(column: int, value: int) -> Tensor:
            return torch.tensor(
                [row[column] + [value] * (length - len(row[column])) for row in rows]
            )

        # Segment 0 is the prefix, turns count from 1, padding is a segment of its own.
        segments_BL = padded(3, -1)
        same = segments_BL[:, :, None] == segments_BL[:, None, :]
        prefix = segments_BL[:, None, :] == 0
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return PackedBatch(
            padded(0, self.tokenizer.pad_token_id),
            padded(1, IGNORE),
            padded(2, 0),
            ((same | prefix) & causal)[:, None],
        )

    def _row(self, pack: Pack) -> tuple[list[int], list[int], list[int], list[int]]:
        prefix, turns = self.pieces(pack)
        start = len(prefix)
        ids, labels = list(prefix), [IGNORE] * start
        positions, segments = list(range(start)), [0] * start
        for number, (question, response) in enumerate(turns, 1):
            length = len(question) + len(response)
            ids += question + response
            labels += [IGNORE] * len(question) + response
            positions += range(start, start + length)
            segments += [number] * length
        return ids, labels, positions, segments
