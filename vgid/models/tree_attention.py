"""Attention in packed rows: each block of queries meets the keys that it sees, and no others.

Shape legend: B rows, L tokens of a row, H query heads, G key-value heads, E head width, Q queries
of a block, K keys that it sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREES = "packed_trees"  # the attention function's name in transformers
BLOCK = 128
"""Queries of a block at most. Fewer leave less to the mask, but every block is a kernel's call."""
ALIGNED = 8  # rows of a mask begin at multiples of it, else kernels on a GPU make a copy


@dataclass(frozen=True)
class Block:
    """Neighbouring queries of a tree."""

    keys: list[slice]  # where the keys stand in the tree, one stretch after the other
    mask_QK: Tensor = field(repr=False)  # 0 where a query sees a key, -inf where not


@dataclass(frozen=True)
class Tree:
    """Tokens below one root, and the blocks of nearly equal size that they part into."""

    tokens: int
    blocks: list[Block]


# A portrait (0, 1) with two questions behind it, A (2, 3) and B (4, 5), in blocks of two queries:
#
#     place   0  1  2  3  4  5       queries 0 1 meet the keys 0 1
#     ends    6  6  4  4  6  6       queries 2 3 meet the keys 0 1 2 3
#                                    queries 4 5 meet the keys 0 1 and 4 5, two stretches
#
# Under one mask over the row, B's queries would be multiplied with A's keys and all other trees'.
def lay_out(ends_BL: Tensor, dtype: torch.dtype, block: int = BLOCK) -> list[Tree]:
    """The trees of packed rows (``Packed.ends_BL``), row after row, which hold every place once."""
    rows, length = ends_BL.shape
    offsets_B1 = length * np.arange(rows)[:, None]
    ends = (ends_BL.cpu().numpy() + offsets_B1).ravel()
    trees = []
    start = 0
    while start < len(ends):
        stop = int(ends[start])
        trees.append(_tree(ends[start:stop] - start, block, dtype, ends_BL.device))
        start = stop
    return trees


def _tree(ends: Any, block: int, dtype: torch.dtype, device: torch.device) -> Tree:
    """Part a tree into blocks; ``ends`` and all places are counted from its root."""
    tokens = len(ends)
    blocks = []
    for places_Q in np.array_split(np.arange(tokens), -(-tokens // block)):
        first = places_Q[0]
        # A subtree is one stretch: who is before the block and above a query is above its first.
        ancestors = np.flatnonzero(ends[:first] > first)
        places_K = np.concatenate([ancestors, places_Q])
        seen_QK = (places_K <= places_Q[:, None]) & (places_Q[:, None] < ends[places_K])
        # A block may hold the end of A and the beginning of B, so a mask remains.
        aligned = -(-len(places_K) // ALIGNED) * ALIGNED
        mask_QK = torch.full((len(places_Q), aligned), -torch.inf, dtype=dtype)
        mask_QK[:, : len(places_K)].masked_fill_(torch.from_numpy(seen_QK), 0.0)
        mask_QK = mask_QK.to(device)[:, : len(places_K)]  # a view copied would be packed tight
        stretches = np.split(places_K, np.flatnonzero(np.diff(places_K) > 1) + 1)
        keys = [slice(int(s[0]), int(s[-1]) + 1) for s in stretches]
        blocks.append(Block(keys, mask_QK))
    return Tree(tokens, blocks)


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    trees: Sequence[Tree] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: output of shape (B, L, H, E), and no weights.

    Queries have the shape (B, H, L, E), keys and values (B, G, L, E), H a multiple of G. Without
    ``trees`` it is plain SDPA, and only there ``attention_mask`` has an effect.
    """
    if trees is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    sizes = [tree.tokens for tree in trees]
    # One split, whose gradient is one concatenation: that of a slice is as long as all rows.
    split = [
        # Rows end to end: trees then need no row numbers, and padding is a tree like the others.
        x.transpose(0, 1).flatten(1, 2)[None].split(sizes, dim=2)
        for x in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    ]
    outputs = []
    for tree, queries, keys, values in zip(trees, *split, strict=True):
        of_blocks = queries.split([len(block.mask_QK) for block in tree.blocks], dim=2)
        for block, of_block in zip(tree.blocks, of_blocks, strict=True):
            output = scaled_dot_product_attention(
                of_block,
                _taken(keys, block.keys),
                _taken(values, block.keys),
                attn_mask=block.mask_QK,
                dropout_p=dropout,
                scale=scaling,
            )
            outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1).view(rows, length, heads, width), None


def _taken(states: Tensor, stretches: list[slice]) -> Tensor:
    parts = [states[:, :, stretch] for stretch in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def attend_by_trees(model: Any) -> None:
    """Let a model's language model attend by trees where it is given any; its tower does not."""
    model.set_attn_implementation({"text_config": TREES})


AttentionInterface.register(TREES, tree_attention)
AttentionMaskInterface.register(TREES, sdpa_mask)
