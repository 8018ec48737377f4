"""Attention of new tokens to prompts that begin alike: what they share is held and read once.

While samples are decoded together, the keys and values of their prompts stay as they are, and most
of them are the same for all questions of a portrait. So samples with much in common form a block,
which holds every token on its samples' paths (``vgid.packing``) once, and a mask tells which of
them a sample sees. Blocks of similar size are stacked: one matrix product serves them all.

Only the tokens generated so far are a sample's own. Each part gives the largest score, the sum of
the exponentials and the values weighted by them, and two such parts make one exact softmax (Milakov
and Gimelshein 2018, arXiv:1805.02867, section 3.1).

Shape legend: N samples that go on, G key-value heads, H query heads, Q query heads of a key-value
head, E head width, C blocks of a stack, S samples of a block at most, T prompt tokens of a block at
most, K tokens generated so far.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from vgid.packing import Packed

SHARED_PROMPTS = "shared_prompts"
"""Name of the attention function among those of transformers."""
READING = 4
"""Reading a prompt token's key and value costs about as much as attending to them this often
(measured on a CPU with heads of width 64)."""
COMPACT = 0.75
"""Prompt tokens that no sample sees any more are dropped when at most this share of a stack stays:
dropping copies the others."""


@dataclass
class Block:
    """Samples that hold their prompts together.

    Attributes:
        row: of the packed trees.
        tokens: where their prompts' tokens stand in it, each once.
        samples: their indices, by what they begin with.
    """

    row: int
    tokens: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)


def share_out(packed: Packed) -> list[Block]:
    """Part the samples into blocks, as long as holding together costs less than apart."""
    trees: dict[tuple[int, int], list[int]] = {}
    for n, (row, path) in enumerate(zip(packed.rows, packed.paths, strict=True)):
        trees.setdefault((row, path[0]), []).append(n)
    blocks = []
    for (row, _), members in trees.items():
        block = Block(row)
        held: set[int] = set()
        for n in sorted(members, key=lambda n: packed.paths[n]):
            path = packed.paths[n]
            new = [token for token in path if token not in held]
            together = _cost(len(held) + len(new), len(block.samples) + 1)
            if together > _cost(len(held), len(block.samples)) + _cost(len(path), 1):
                blocks.append(block)
                block, held, new = Block(row), set(), path
            block.samples.append(n)
            block.tokens += new
            held.update(new)
        blocks.append(block)
    return blocks


def _cost(tokens: int, samples: int) -> int:
    return tokens * (READING + samples)


class SharedPrompts:
    """The prompts of samples that are decoded together, and which of them still go on.

    Args:
        passes: packed prompts, and the cache that running them has filled. It is emptied.

    Attributes:
        order: the sample of each row, counted over all passes; queries come in this order.
    """

    def __init__(self, passes: Sequence[tuple[Packed, Any]]) -> None:
        alike: dict[tuple[int, int], list[tuple[int, Block]]] = {}
        for number, (packed, _) in enumerate(passes):
            for block in share_out(packed):
                # Padding is at most fourfold in tokens and twofold in samples.
                size = (len(block.tokens).bit_length() // 2, len(block.samples).bit_length())
                alike.setdefault(size, []).append((number, block))
        packs = [packed for packed, _ in passes]
        firsts = [0, *itertools.accumulate(len(packed.rows) for packed in packs)]
        self._stacks = [_Stack(blocks, packs) for blocks in alike.values()]
        self.order = [
            firsts[number] + n
            for blocks in alike.values()
            for number, block in blocks
            for n in block.samples
        ]
        caches = [cache for _, cache in passes]
        while caches and caches[0].layers:
            layers = [cache.layers.pop(0) for cache in caches]
            for stack in self._stacks:
                stack.take(layers)

    def keep(self, going: Sequence[int]) -> None:
        """Go on with these rows only, in the same order.

        Args:
            going: rows as they are now, ascending.
        """
        start = 0
        stacks = []
        for stack in self._stacks:
            stop = start + len(stack.places)
            kept = [row - start for row in going if start <= row < stop]
            if kept:
                stack.keep(kept)
                stacks.append(stack)
            start = stop
        self._stacks = stacks

    def attend(
        self, layer: int, queries_NGQE: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the prompts contribute to a layer's attention.

        Args:
            layer: its number.
            queries_NGQE: of the rows' new tokens.
            scaling: of the products.

        Returns:
            The largest score and the sum of the exponentials of the others' distance to it, both
            of shape (N, G, Q, 1) and fp32, and the values weighted by these exponentials,
            (N, G, Q, E).
        """
        queries = queries_NGQE.split([len(stack.places) for stack in self._stacks])
        parts = [
            stack.attend(layer, of_stack, scaling)
            for stack, of_stack in zip(self._stacks, queries, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        largest, total, values = zip(*parts, strict=True)
        return torch.cat(largest), torch.cat(total), torch.cat(values)


class _Stack:
    """Blocks of similar size, padded to one.

    Args:
        blocks: each with the number of its pack, in the order of these.
        packs: the packed prompts.

    Attributes:
        places: block and number in it of each sample that goes on, ascending.
    """

    def __init__(self, blocks: Sequence[tuple[int, Block]], packs: Sequence[Packed]) -> None:
        longest = max(len(block.tokens) for _, block in blocks)
        most = max(len(block.samples) for _, block in blocks)
        device = packs[0].ids_BL.device
        hidden_CST = torch.full((len(blocks), most, longest), -torch.inf)
        for c, (number, block) in enumerate(blocks):
            column = {token: t for t, token in enumerate(block.tokens)}
            for s, n in enumerate(block.samples):
                hidden_CST[c, s, [column[token] for token in packs[number].paths[n]]] = 0.0
        self._hidden_CST = hidden_CST.to(device)  # 0 where a sample sees a token, -inf where not
        self.places = [(c, s) for c, (_, b) in enumerate(blocks) for s in range(len(b.samples))]
        self._keys: list[Tensor] = []  # of each layer: (C, G, T, E)
        self._values: list[Tensor] = []
        self._sources = []  # pack, rows and places of the tokens of all its blocks
        for number, group in itertools.groupby(blocks, key=lambda entry: entry[0]):
            of_pack = [block for _, block in group]
            filled = [block.tokens + [0] * (longest - len(block.tokens)) for block in of_pack]
            rows_C1 = torch.tensor([[block.row] for block in of_pack], device=device)
            self._sources.append((number, rows_C1, torch.tensor(filled, device=device)))
        self._lay_out()

    def take(self, layers: Sequence[Any]) -> None:
        """Hold one more layer's keys and values of the blocks' tokens, out of all passes."""
        for held, name in ((self._keys, "keys"), (self._values, "values")):
            parts = [
                _taken(getattr(layers[number], name), rows_C1, tokens_CT)
                for number, rows_C1, tokens_CT in self._sources
            ]
            held.append(torch.cat(parts) if len(parts) > 1 else parts[0])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the stack."""
        if len(rows) == len(self.places):
            return
        self.places = [self.places[row] for row in rows]
        blocks, _, tokens = self._hidden_CST.shape
        of_row = torch.tensor(self.places, device=self._hidden_CST.device)
        seen_NT = self._hidden_CST[of_row[:, 0], of_row[:, 1]] == 0
        seen_CT = seen_NT.new_zeros(blocks, tokens).index_put((of_row[:, 0],), seen_NT, True)
        alive = sorted({c for c, _ in self.places})
        most = int(seen_CT.sum(dim=1).max())
        if len(alive) * most <= COMPACT * blocks * tokens:
            order_CT = seen_CT[alive].int().argsort(dim=1, descending=True, stable=True)
            alive_C1 = torch.tensor(alive, device=order_CT.device)[:, None]
            kept_CT = order_CT[:, :most]
            self._keys = [_taken(keys, alive_C1, kept_CT) for keys in self._keys]
            self._values = [_taken(values, alive_C1, kept_CT) for values in self._values]
            self._hidden_CST = self._hidden_CST[alive_C1, :, kept_CT].transpose(1, 2)
            number = {c: index for index, c in enumerate(alive)}
            self.places = [(number[c], s) for c, s in self.places]
        self._lay_out()

    def _lay_out(self) -> None:
        """Where each row finds its place among those of its block, and what it sees there."""
        blocks, device = len(self._hidden_CST), self._hidden_CST.device
        rows: list[list[int]] = [[] for _ in range(blocks)]
        for row, (c, _) in enumerate(self.places):
            rows[c].append(row)
        width = max(map(len, rows))
        flat = [c * width + s for c in range(blocks) for s in range(len(rows[c]))]
        # Places that are left over compute what some row computes; nobody asks for the result.
        filled = [(of_block or [0]) + [0] * (width - max(len(of_block), 1)) for of_block in rows]
        numbers = [[self.places[row][1] for row in of_block] for of_block in filled]
        self._shape = (blocks, width)
        self._rows = self._flat = None
        if len(flat) < blocks * width:
            self._rows = torch.tensor(filled, device=device).flatten()
            self._flat = torch.tensor(flat, device=device)
        numbers_CS = torch.tensor(numbers, device=device)
        blocks_C1 = torch.arange(blocks, device=device)[:, None]
        self._hidden_C1S1T = self._hidden_CST[blocks_C1, numbers_CS][:, None, :, None]

    def attend(
        self, layer: int, queries_NGQE: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``SharedPrompts.attend``; rows of this stack only."""
        _, heads, group, width = queries_NGQE.shape
        blocks, samples = self._shape
        if self._rows is not None:
            queries_NGQE = queries_NGQE[self._rows]
        queries_CGME = (
            queries_NGQE.view(blocks, samples, heads, group, width)
            .transpose(1, 2)
            .reshape(blocks, heads, samples * group, width)
        )
        products_CGMT = queries_CGME @ self._keys[layer].transpose(-1, -2)
        scores_CGSQT = products_CGMT.float().view(blocks, heads, samples, group, -1)
        scores_CGSQT = scores_CGSQT.mul_(scaling).add_(self._hidden_C1S1T)
        largest_CGSQ1 = scores_CGSQT.amax(dim=-1, keepdim=True)
        weights_CGSQT = scores_CGSQT.sub_(largest_CGSQ1).exp_()
        total_CGSQ1 = weights_CGSQT.sum(dim=-1, keepdim=True)
        values_CGME = (
            weights_CGSQT.view_as(products_CGMT).to(queries_NGQE.dtype) @ self._values[layer]
        )
        values_CGSQE = values_CGME.view(blocks, heads, samples, group, width)
        return (
            self._by_row(largest_CGSQ1),
            self._by_row(total_CGSQ1),
            self._by_row(values_CGSQE),
        )

    def _by_row(self, x_CGSQX: Tensor) -> Tensor:
        x_NGQX = x_CGSQX.transpose(1, 2).flatten(0, 1)
        return x_NGQX if self._flat is None else x_NGQX[self._flat]


def _taken(states_BGLE: Tensor, rows_C1: Tensor, places_CT: Tensor) -> Tensor:
    """The states at some places of some rows, (C, G, T, E)."""
    return states_BGLE[rows_C1, :, places_CT].transpose(1, 2).contiguous()


def shared_prompt_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prompts: SharedPrompts,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row, as transformers calls it.

    Args:
        module: the attention layer, which knows its number.
        query: of shape (N, H, 1, E).
        key: of the tokens generated so far, the new one included, of all rows: (N, G, K, E).
        value: as ``key``.
        attention_mask: without effect: rows generate in step, and see all that they generated.
        prompts: what came before.
        scaling: of the products.
        kwargs: without effect.

    Returns:
        The output, of shape (N, 1, H, E), and no weights.
    """
    rows, heads, _, width = query.shape
    queries_NGQE = query.reshape(rows, key.shape[1], -1, width)
    largest_NGQ1, total_NGQ1, values_NGQE = prompts.attend(module.layer_idx, queries_NGQE, scaling)
    scores_NGQK = (queries_NGQE @ key.transpose(-1, -2)).float().mul_(scaling)
    both_NGQ1 = torch.maximum(largest_NGQ1, scores_NGQK.amax(dim=-1, keepdim=True))
    weights_NGQK = scores_NGQK.sub_(both_NGQ1).exp_()
    share_NGQ1 = largest_NGQ1.sub_(both_NGQ1).exp_()
    total_NGQ1 = total_NGQ1.mul_(share_NGQ1).add_(weights_NGQK.sum(dim=-1, keepdim=True))
    values_NGQE = values_NGQE * share_NGQ1 + weights_NGQK.to(value.dtype) @ value
    output_NGQE = (values_NGQE / total_NGQ1).to(query.dtype)
    return output_NGQE.reshape(rows, 1, heads, width), None


@contextmanager
def attending_to_shared_prompts(language_model: Any) -> Iterator[None]:
    """The language model takes ``prompts`` in place of a mask; afterwards it attends as before."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = SHARED_PROMPTS
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(SHARED_PROMPTS, shared_prompt_attention)
