"""What a backbone answers, and how likely it finds a given answer: both with shared beginnings.

Prompts run once as trees, then all questions advance together. Shape legend: N samples, R response
tokens over all samples, D hidden width, V vocabulary, A position axes, B rows, L tokens of a row, M
places that are read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded, Query, encode
from vgid.models.packing import Packed, beginning, hidden_states, pack, rotary_positions
from vgid.models.prefix_attention import SharedPrompts, attending_to_shared_prompts

MAX_NEW_TOKENS = 50  # of the benchmark's protocol
MAX_BATCH_TOKENS = 32_768
"""Tokens of a batch at most: shared ones once, the rest and the responses to come as padded. This
many fill 16 GiB of LLaVA-1.5-7B's key-value cache."""

PASS_TOKENS = 1024  # after which a pass may end: more fill memory without computing faster
REPEATED_TOKENS = 32
"""A pass ends only where the next prompt would repeat no more than this of it."""

COMPACT = 0.9
"""Ended rows are dropped when at most this share goes on: the last rows fill their places."""


@dataclass(frozen=True)
class ResponseScore:
    """How a model, forced along one response, rates each of its tokens."""

    logprobs_R: Tensor  # nats, fp32
    correct_R: Tensor  # whether the token is the model's own first choice


# Of the last layer's states only those that predict a token are ever used. So its attention runs on
# all tokens, and what is behind it on these: with few layers, a tenth of a forward pass less.
class _LastLayer(nn.Module):
    """A pre-norm decoder layer (Llama's, Qwen2's), its feed-forward part at some places only."""

    def __init__(self, layer: Any, rows: Sequence[int], places: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.rows, self.places = list(rows), list(places)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        layer = self.layer
        attended_BLD, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_states), **kwargs
        )
        read_MD = (hidden_states + attended_BLD)[self.rows, self.places]
        output_MD: Tensor = read_MD + layer.mlp(layer.post_attention_layernorm(read_MD))
        return output_MD[None]


@contextmanager
def reading_at(language_model: Any, rows: Sequence[int], places: Sequence[int]) -> Iterator[None]:
    """Inside, the last hidden states are those of these tokens of these rows only: (1, M, D)."""
    layers = language_model.layers
    whole = layers[-1]
    layers[-1] = _LastLayer(whole, rows, places)
    try:
        yield
    finally:
        layers[-1] = whole


def greedy_tokens(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 64,
) -> list[list[int]]:
    """Greedy responses as token ids, without the end-of-sequence token.

    In fp32 they equal those of one prompt at a time, without a checkpoint's settings of sampling or
    repetition. ``batch_size`` prompts are decoded together, fewer long ones (``MAX_BATCH_TOKENS``).
    """
    responses: dict[int, list[int]] = {}
    with _evaluating(backbone.model):
        for rows in _batches(encoded, max_new_tokens, batch_size):
            decoded = _decode(backbone, [encoded[row] for row in rows], max_new_tokens)
            responses.update(zip(rows, decoded, strict=True))
    return [responses[row] for row in range(len(encoded))]


def _decode(backbone: Backbone, prompts: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
    model, ends = backbone.model, _end_tokens(backbone)
    language_model = model.model.language_model
    passes: list[tuple[Packed, Any]] = []
    states: list[Tensor] = []
    rows: list[int] = []  # prompt of each row
    for part in _passes(prompts):
        packed = pack(backbone, [prompts[n] for n in part], max_row_tokens=MAX_BATCH_TOKENS)
        trees = DynamicCache(config=model.config.get_text_config())
        with reading_at(language_model, *packed.last_places):
            states.append(hidden_states(backbone, packed, trees)[0])
        passes.append((packed, trees))
        rows += part
    shared = SharedPrompts(passes, max_new_tokens)
    hidden_ND = torch.cat(states)
    positions_AN = torch.stack([prompts[n].positions_AL[:, -1] for n in rows], 1)
    positions_AN = positions_AN.to(backbone.device)
    responses: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    for step in range(1, max_new_tokens + 1):
        logits_NV = model.lm_head(hidden_ND)
        # A response is text; an image token in it could not be shown to the model again.
        logits_NV[:, backbone.processor.image_token_id] = -float("inf")
        tokens_N = logits_NV.argmax(dim=-1)
        for n, token in zip(rows, tokens_N.tolist(), strict=True):
            if token in ends:
                ended.add(n)
            elif n not in ended:
                responses[n].append(token)
        going = [row for row, n in enumerate(rows) if n not in ended]
        if not going or step == max_new_tokens:
            break
        # Rows that ended are computed until enough have: dropping one costs a copy of others.
        if len(going) <= COMPACT * len(rows):
            going = shared.keep(going)
            rows = [rows[row] for row in going]
            tokens_N, positions_AN = tokens_N[going], positions_AN[:, going]
        # Not from the row's length: in Qwen an image takes as many positions as its longer side.
        positions_AN = positions_AN + 1
        with attending_to_shared_prompts(language_model):
            hidden_ND = language_model(
                inputs_embeds=model.get_input_embeddings()(tokens_N[:, None]),
                position_ids=rotary_positions(positions_AN[..., None]),
                use_cache=True,
                cache=shared.cache,
                prompts=shared,
            ).last_hidden_state[:, -1]
    return responses


def response_text(backbone: Backbone, tokens: Sequence[int]) -> str:
    """A response's text, without special tokens and surrounding white space."""
    return str(backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def greedy_decode(
    backbone: Backbone, queries: Sequence[Query], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str]:
    """Greedy responses to ``queries`` as texts; see ``greedy_tokens``."""
    tokens = greedy_tokens(backbone, encode(backbone, queries), max_new_tokens)
    return [response_text(backbone, response) for response in tokens]


def score_responses(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    responses: Sequence[Sequence[int]],
    batch_size: int = 64,
) -> list[ResponseScore]:
    """Rate given responses token by token, on the CPU; an empty response is a ``ValueError``."""
    if not all(responses):
        raise ValueError("an empty response has no tokens to score")
    longest = max(map(len, responses), default=0)
    scores: dict[int, ResponseScore] = {}
    with _evaluating(backbone.model):
        for rows in _batches(encoded, longest, batch_size):
            for part in _passes([encoded[i] for i in rows]):
                chosen = [rows[n] for n in part]
                answers = [responses[i] for i in chosen]
                rated = _rate(backbone, [encoded[i] for i in chosen], answers)
                scores.update(zip(chosen, rated, strict=True))
    return [scores[row] for row in range(len(encoded))]


def _rate(
    backbone: Backbone, prompts: Sequence[Encoded], responses: Sequence[Sequence[int]]
) -> list[ResponseScore]:
    packed = pack(backbone, prompts, responses, max_row_tokens=MAX_BATCH_TOKENS)
    with reading_at(backbone.model.model.language_model, *packed.predicting_places):
        (hidden_RD,) = hidden_states(backbone, packed)
    logits_RV = backbone.model.lm_head(hidden_RD).float()
    targets_R = packed.response_ids_R
    correct_R = (logits_RV.argmax(dim=-1) == targets_R).cpu()
    logprobs_R = -torch.nn.functional.cross_entropy(logits_RV, targets_R, reduction="none").cpu()
    sizes = list(map(len, responses))
    return list(map(ResponseScore, logprobs_R.split(sizes), correct_R.split(sizes)))


def _passes(prompts: Sequence[Encoded]) -> Iterator[list[int]]:
    """Indices of prompts that are run in one pass: parted only where little is shared."""
    part: list[int] = []
    tokens = 0
    before: list[int] = []
    # In the order in which packing lays them out, so that neighbours share as much as they can.
    for n in sorted(range(len(prompts)), key=lambda n: prompts[n].identity):
        identity = prompts[n].identity
        common = beginning(before, identity)
        if part and tokens >= PASS_TOKENS and common <= REPEATED_TOKENS:
            yield part
            part, tokens, common = [], 0, 0
        part.append(n)
        tokens += len(identity) - common
        before = identity
    if part:
        yield part


def _batches(encoded: Sequence[Encoded], more: int, batch_size: int) -> Iterator[list[int]]:
    """Indices in batches; ``more`` tokens come behind each prompt at most."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, prompt in enumerate(encoded):
        groups.setdefault(tuple(p.key for p in prompt.pictures), []).append(index)

    def length(index: int) -> int:
        return len(encoded[index].prompt_ids) + more

    batch: list[int] = []
    shared = longest = 0  # tokens that are there once, tokens of the longest remainder
    before: list[int] = []
    # By length, since a batch's remainders are padded to the longest of them.
    for group in sorted(groups.values(), key=lambda group: max(map(length, group))):
        start = min(encoded[index].identity for index in group)
        common = beginning(start, max(encoded[index].identity for index in group))
        shared += common - min(common, beginning(before, start))
        before = start
        for index in sorted(group, key=length):
            longest = max(longest, length(index) - common)
            tokens = shared + (len(batch) + 1) * longest
            if batch and (len(batch) == batch_size or tokens > MAX_BATCH_TOKENS):
                yield batch
                batch, shared, longest = [], common, length(index) - common
            batch.append(index)
    if batch:
        yield batch


def _end_tokens(backbone: Backbone) -> frozenset[int]:
    """Every token that ends a response: the tokenizer's and those of the checkpoint."""
    configured = backbone.model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset({backbone.processor.tokenizer.eos_token_id, *several})


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
