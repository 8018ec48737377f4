"""Attention of new tokens to prompts that begin alike: what they share is held and read once.

A long beginning that samples share is a segment: read once for all of them, in one matrix product
with others of its size. A sample's own are the rest of its prompt and what is generated. Each gives
a part of one exact softmax (Milakov and Gimelshein 2018, arXiv:1805.02867, section 3.1). Shape
legend: N samples that go on, G key-value heads, H query heads, Q query heads of a key-value head, E
head width, K own tokens, C segments of a stack, S samples and T tokens of a segment at most, M
samples of a stack.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from vgid.models.packing import Packed, beginning

SHARED_PROMPTS = "shared_prompts"  # the attention function's name in transformers
SHARED_TOKENS = 128
"""A shorter beginning is copied for each of its samples: that costs less than one more part."""
COMPACT = 0.75
"""Segments without a sample are dropped when this share of a stack at most goes on."""


@dataclass
class Segment:
    """Consecutive tokens of a row of packed trees that several samples' prompts share."""

    row: int
    tokens: list[int]
    samples: list[int]


# With 7 questions of 10 tokens on a portrait of 576, every step of plain decoding reads 7 x 586
# keys. Here it reads the 576 once, against the 7 queries as one matrix, and each one's own 10.
def part_paths(packed: Packed) -> tuple[list[list[Segment]], list[list[int]]]:
    """What prompts share, and each sample's own tokens, both as places in the packed row.

    Segments come by level: no sample is in two of a level, and those of the next continue them.
    """
    levels: list[list[Segment]] = []
    own: list[list[int]] = [[] for _ in packed.paths]

    def descend(samples: list[int], depth: int, level: int) -> None:
        # In lexicographic order, so what the first and the last share is shared by all.
        first, last = packed.paths[samples[0]], packed.paths[samples[-1]]
        if len(samples) == 1:
            own[samples[0]] += first[depth:]
            return
        end = beginning(first, last)
        if end - depth >= SHARED_TOKENS:
            if level == len(levels):
                levels.append([])
            levels[level].append(Segment(packed.rows[samples[0]], first[depth:end], samples))
            level += 1
        else:
            for n in samples:
                own[n] += first[depth:end]
        for more, group in itertools.groupby(samples, key=lambda n: packed.paths[n][end : end + 1]):
            if more:
                descend(list(group), end, level)

    by_path = sorted(range(len(own)), key=lambda n: (packed.rows[n], packed.paths[n]))
    for _, tree in itertools.groupby(by_path, key=lambda n: (packed.rows[n], packed.paths[n][0])):
        descend(list(tree), 0, 0)
    return levels, own


class SharedPrompts:
    """Keys and values of the prompts of samples that are decoded together, what is shared once.

    They are taken out of the caches that running the packed prompts filled (``passes``), which are
    empty then. ``room`` is the number of tokens that each sample may generate.
    """

    def __init__(self, passes: Sequence[tuple[Packed, Any]], room: int) -> None:
        alike: dict[tuple[int, int, int], list[tuple[int, Segment]]] = {}
        owns: list[list[list[int]]] = []
        first = 0
        for number, (packed, _) in enumerate(passes):
            levels, own = part_paths(packed)
            owns.append(own)
            for level, segments in enumerate(levels):
                for segment in segments:
                    segment.samples = [first + n for n in segment.samples]
                    # Padding is at most twofold, and no sample is in a stack twice.
                    size = (len(segment.tokens).bit_length(), len(segment.samples).bit_length())
                    alike.setdefault((level, *size), []).append((number, segment))
            first += len(own)
        device = passes[0][0].ids_BL.device
        self.stacks = [_Stack(segments, device) for segments in alike.values()]
        lengths = [len(tokens) for own in owns for tokens in own]
        longest = max(lengths)
        self.hidden_N11K = _padding_hidden(lengths, room).to(device)
        places = [
            (torch.tensor(packed.rows, device=device)[:, None], _padded(own, longest, device))
            for (packed, _), own in zip(passes, owns, strict=True)
        ]
        own_layers = []
        # Layer by layer, so that the packed cache and its copies are never both whole in memory.
        while passes[0][1].layers:
            layers = [cache.layers.pop(0) for _, cache in passes]
            keys = [_taken(x.keys, *at) for x, at in zip(layers, places, strict=True)]
            values = [_taken(x.values, *at) for x, at in zip(layers, places, strict=True)]
            own_layers.append(OwnLayer(keys, values, room))
            for stack in self.stacks:
                stack.take(layers)
        self.cache = Cache(layers=own_layers)  # in the order of the passes' samples

    def keep(self, going: Sequence[int]) -> list[int]:
        """Go on with these rows, which ascend; returned is the order in which they stand now.

        The last ones fill the places of those that ended, so that few are copied.
        """
        # Five rows of which 0, 2 and 4 go on become 0, 4, 2: one is copied, not two as in order.
        places = set(range(len(going)))
        last = [row for row in going if row >= len(going)]
        moved = dict(zip(sorted(places - set(going)), last, strict=True))
        order = [moved.get(row, row) for row in range(len(going))]
        rows_N = torch.tensor(order, device=self.hidden_N11K.device)
        self.cache.batch_select_indices(rows_N)
        self.hidden_N11K = self.hidden_N11K[rows_N]
        now = {before: row for row, before in enumerate(order)}
        self.stacks = [stack for stack in self.stacks if stack.keep(now)]
        return order


class OwnLayer(DynamicLayer):
    """A layer's keys and values of each sample's own tokens, in place: fresh memory costs more."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], room: int) -> None:
        super().__init__()
        self.length = keys[0].shape[2]
        self.keys, self.values = _with_room(keys, room), _with_room(values, room)
        self.dtype, self.device, self.is_initialized = keys[0].dtype, keys[0].device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens; returns the views of all states up to them."""
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows; only those that change their place are copied."""
        places = torch.arange(len(indices), device=indices.device)
        moved = (indices != places).nonzero().flatten()
        for states_NGKE in (self.keys, self.values):
            states_NGKE[moved, :, : self.length] = states_NGKE[indices[moved], :, : self.length]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length


class _Stack:
    """Segments of similar size, padded to one, each with the number of its pass, in their order."""

    def __init__(self, segments: Sequence[tuple[int, Segment]], device: Any) -> None:
        lengths = [len(segment.tokens) for _, segment in segments]
        longest = max(lengths)
        self._hidden_C11T = _padding_hidden(lengths).to(device)
        self._sources = []  # pass, rows and places of all its segments
        for number, group in itertools.groupby(segments, key=lambda entry: entry[0]):
            of_pass = [segment for _, segment in group]
            rows_C1 = torch.tensor([[segment.row] for segment in of_pass], device=device)
            places_CT = _padded([segment.tokens for segment in of_pass], longest, device)
            self._sources.append((number, rows_C1, places_CT))
        self._keys: list[Tensor] = []  # of each layer: (C, G, T, E)
        self._values: list[Tensor] = []
        self._rows = [segment.samples for _, segment in segments]  # of each segment
        self._lay_out()

    def take(self, layers: Sequence[Any]) -> None:
        """Hold one more layer's keys and values, out of all passes."""
        for held, name in ((self._keys, "keys"), (self._values, "values")):
            parts = [_taken(getattr(layers[number], name), *at) for number, *at in self._sources]
            held.append(torch.cat(parts))

    def keep(self, now: Mapping[int, int]) -> bool:
        """Go on with the rows that have a new number; tells whether any is left."""
        self._rows = [[now[row] for row in rows if row in now] for rows in self._rows]
        alive = [c for c, rows in enumerate(self._rows) if rows]
        if not alive:
            return False
        if len(alive) <= COMPACT * len(self._rows):
            self._rows = [self._rows[c] for c in alive]
            self._hidden_C11T = self._hidden_C11T[alive]
            self._keys = [keys_CGTE[alive] for keys_CGTE in self._keys]
            self._values = [values_CGTE[alive] for values_CGTE in self._values]
        self._lay_out()
        return True

    def _lay_out(self) -> None:
        """The rows of each segment side by side, all segments as wide as the widest."""
        width = max(map(len, self._rows))
        # Places that are left over compute what some row computes; nobody asks for the result.
        filled = [(rows or [0]) + [0] * (width - max(len(rows), 1)) for rows in self._rows]
        flat = [c * width + s for c, rows in enumerate(self._rows) for s in range(len(rows))]
        device = self._hidden_C11T.device
        self._shape = (len(filled), width)
        self._filled_CS = torch.tensor(filled, device=device).flatten()
        self._flat_M = torch.tensor(flat, device=device)
        self._rows_M = self._filled_CS[self._flat_M]

    def add(self, layer: int, queries_NGQE: Tensor, scaling: float, sums: "Sums") -> None:
        """Add what the samples of the segments find there to the sums of all rows."""
        _, heads, group, width = queries_NGQE.shape
        segments, samples = self._shape
        queries_CGME = (
            queries_NGQE[self._filled_CS]
            .view(segments, samples, heads, group, width)
            .transpose(1, 2)
            .reshape(segments, heads, samples * group, width)
        )
        keys_CGTE, values_CGTE = self._keys[layer], self._values[layer]
        found = attended(queries_CGME, keys_CGTE, values_CGTE, self._hidden_C11T, scaling)
        sums.add(found.each(self._by_row), self._rows_M)

    def _by_row(self, x_CGMX: Tensor) -> Tensor:
        segments, samples = self._shape
        heads, _, width = x_CGMX.shape[1:]
        x_CGSQX = x_CGMX.reshape(segments, heads, samples, -1, width)
        return x_CGSQX.transpose(1, 2).flatten(0, 1)[self._flat_M]


# Why parts add up to the exact softmax: of scores 1, 3 | 2 in two parts, the first gives largest 3,
# total e^-2 + 1, the second largest 2, total 1. Measured against the common largest 3 the second's
# total is e^-1, and e^-2 + 1 + e^-1 is the denominator of the softmax over all three.
@dataclass
class Sums:
    """Attention to a part of the tokens, of a row's queries; all fp32."""

    largest: Tensor  # score of the best token, (N, G, Q, 1)
    total: Tensor  # of the exponentials of the scores' distances to it, likewise
    values: Tensor  # weighted by these exponentials, summed, (N, G, Q, E)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Sums":
        """With each tensor changed."""
        return Sums(change(self.largest), change(self.total), change(self.values))

    def add(self, part: "Sums", rows_M: Tensor) -> None:
        """Add the sums over further tokens to those of some rows."""
        before = self.each(lambda x: x[rows_M])
        largest = torch.maximum(before.largest, part.largest)
        old, new = (before.largest - largest).exp_(), (part.largest - largest).exp_()
        # Of several writes to a row one would be kept: so no stack holds a sample twice.
        self.largest[rows_M] = largest
        self.total[rows_M] = before.total * old + part.total * new
        self.values[rows_M] = before.values * old + part.values * new


def attended(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scaling: float) -> Sums:
    """Attention of queries (N, G, Q, E) to keys, values (N, G, T, E); ``hidden`` is 0 or -inf."""
    scores = (queries @ keys.transpose(-1, -2)).float().mul_(scaling).add_(hidden)
    # Never -inf, which would give NaN: a row's newest token is no padding, no segment is empty.
    largest = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return Sums(largest, total, (weights.to(values.dtype) @ values).float())


def _padding_hidden(lengths: Sequence[int], room: int = 0) -> Tensor:
    """0 for each token of rows of these lengths and for those to come, -inf for the padding."""
    longest = max(lengths)
    hidden_NK = torch.zeros(len(lengths), longest + room)
    hidden_NK[:, :longest][torch.arange(longest) >= torch.tensor(lengths)[:, None]] = -torch.inf
    return hidden_NK[:, None, None]


def _padded(places: Sequence[list[int]], longest: int, device: Any) -> Tensor:
    filled = [row + [0] * (longest - len(row)) for row in places]
    return torch.tensor(filled, dtype=torch.int64, device=device)


def _with_room(parts: Sequence[Tensor], room: int) -> Tensor:
    """States of several passes as one tensor, with room for more tokens behind theirs."""
    _, heads, tokens, width = parts[0].shape
    states_NGKE = parts[0].new_empty(sum(map(len, parts)), heads, tokens + room, width)
    torch.cat(list(parts), out=states_NGKE[:, :, :tokens])
    return states_NGKE


def _taken(states_BGLE: Tensor, rows_C1: Tensor, places_CT: Tensor) -> Tensor:
    return states_BGLE[rows_C1, :, places_CT].transpose(1, 2)


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
    """Attention of one new token a row, as transformers calls it: (N, 1, H, E), and no weights.

    Query (N, H, 1, E); keys and values (N, G, K, E) of the rows' own tokens, the new one included.
    """
    rows, heads, _, width = query.shape
    queries_NGQE = query.reshape(rows, key.shape[1], -1, width)
    hidden_N11K = prompts.hidden_N11K[..., : key.shape[2]]
    sums = attended(queries_NGQE, key, value, hidden_N11K, scaling)
    for stack in prompts.stacks:
        stack.add(module.layer_idx, queries_NGQE, scaling, sums)
    output_NGQE = (sums.values / sums.total).to(query.dtype)
    return output_NGQE.reshape(rows, 1, heads, width), None


@contextmanager
def attending_to_shared_prompts(language_model: Any) -> Iterator[None]:
    """Inside, the language model takes ``prompts`` in place of a mask."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = SHARED_PROMPTS
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(SHARED_PROMPTS, shared_prompt_attention)
