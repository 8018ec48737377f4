"""What a backbone answers, and how likely it finds a given answer: both in batches.

Shape legend: B samples, L tokens of the longest, R response tokens over the whole batch, V
vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgid.backbones import Backbone
from vgid.encoding import Encoded, Query, collate, encode

MAX_NEW_TOKENS = 50
"""Longest response, in tokens, of the benchmark's protocol."""

MAX_BATCH_TOKENS = 32_768
"""Prompt tokens of a batch at most, padding included, however many samples were asked for: a
few-shot prompt of LLaVA-1.5-7B holds thousands of image tokens, and this many fill 16 GiB of its
key-value cache."""


@dataclass(frozen=True)
class ResponseScore:
    """How a model, forced along one response, rates each of its tokens.

    Attributes:
        logprobs_R: log-probability of each response token in nats, fp32.
        correct_R: whether the token is the model's own first choice.
    """

    logprobs_R: Tensor
    correct_R: Tensor


def greedy_tokens(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 64,
) -> list[list[int]]:
    """Greedy responses as token ids, without the end-of-sequence token.

    Prompts are sorted by length and padded on the left, so a batch holds little padding; a row
    that ended is padded while the others go on. In fp32 the answers equal those of one prompt at a
    time. What a checkpoint's generation settings say about sampling or repetition is set aside.
    A response shorter than ``max_new_tokens`` ended by itself.

    Args:
        backbone: model and tokenizer.
        encoded: the prompts.
        max_new_tokens: tokens after which a response is cut.
        batch_size: prompts decoded together at most; long ones are fewer (``MAX_BATCH_TOKENS``).

    Returns:
        One list of token ids a prompt, in the order of ``encoded``.
    """
    ends = _end_tokens(backbone)
    settings = _greedy_settings(backbone, ends, max_new_tokens)
    responses: dict[int, list[int]] = {}
    with _evaluating(backbone.model):
        for rows in _batches([len(e.prompt_ids) for e in encoded], batch_size):
            batch = collate(backbone, [encoded[row] for row in rows], side="left")
            prompt_length = batch.inputs["input_ids"].shape[1]
            output_BL = backbone.model.generate(**batch.inputs, generation_config=settings)
            for row, tokens in zip(rows, output_BL[:, prompt_length:].tolist(), strict=True):
                length = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
                responses[row] = tokens[:length]
    return [responses[row] for row in range(len(encoded))]


def response_text(backbone: Backbone, tokens: Sequence[int]) -> str:
    """A response's text, without special tokens and surrounding white space."""
    return str(backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def greedy_decode(
    backbone: Backbone,
    queries: Sequence[Query],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 64,
) -> list[str]:
    """Greedy responses to ``queries`` as texts; see ``greedy_tokens``."""
    encoded = encode(backbone, queries)
    tokens = greedy_tokens(backbone, encoded, max_new_tokens, batch_size)
    return [response_text(backbone, response) for response in tokens]


def score_responses(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    responses: Sequence[Sequence[int]],
    batch_size: int = 64,
) -> list[ResponseScore]:
    """Teacher-forced pass: rate given responses, token by token.

    The vocabulary layer runs on the positions that predict a response token and on no other.

    Args:
        backbone: model and tokenizer.
        encoded: the prompts.
        responses: token ids of one response a prompt, none empty (see ``encoding.response_ids``).
        batch_size: pairs rated together at most; long ones are fewer (``MAX_BATCH_TOKENS``).

    Returns:
        One score a pair, in the order given, on the CPU.

    Raises:
        ValueError: an empty response.
    """
    if not all(responses):
        raise ValueError("an empty response has no tokens to score")
    lengths = [len(e.prompt_ids) + len(r) for e, r in zip(encoded, responses, strict=True)]
    scores: dict[int, ResponseScore] = {}
    with _evaluating(backbone.model):
        for rows in _batches(lengths, batch_size):
            batch = collate(backbone, [encoded[i] for i in rows], [responses[i] for i in rows])
            predicts_BL = torch.nn.functional.pad(batch.predicts_BL, (0, 1))
            output = backbone.model(**batch.inputs, logits_to_keep=predicts_BL, use_cache=False)
            logits_RV = output.logits.float()
            targets_R = batch.response_ids_R
            correct_R = (logits_RV.argmax(dim=-1) == targets_R).cpu()
            logprobs_R = -torch.nn.functional.cross_entropy(
                logits_RV, targets_R, reduction="none"
            ).cpu()
            sizes = [len(responses[i]) for i in rows]
            for row, logprobs, correct in zip(
                rows, logprobs_R.split(sizes), correct_R.split(sizes), strict=True
            ):
                scores[row] = ResponseScore(logprobs, correct)
    return [scores[row] for row in range(len(encoded))]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, ties in the order given."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Lengths ascend, so this one is what the whole batch would be padded to.
        full = len(batch) == batch_size
        if batch and (full or (len(batch) + 1) * lengths[index] > MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _end_tokens(backbone: Backbone) -> frozenset[int]:
    """Every token that ends a response: the tokenizer's and those of the checkpoint."""
    configured = backbone.model.generation_config.eos_token_id
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    return frozenset({backbone.processor.tokenizer.eos_token_id, *configured})


def _greedy_settings(backbone: Backbone, ends: frozenset[int], max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    # The library fills what is left out from the checkpoint, so the neutral values are spelt out:
    # Qwen2.5-VL, for one, ships a repetition penalty.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        # A response is text; an image token in it could not be shown to the model again.
        suppress_tokens=[backbone.processor.image_token_id],
        pad_token_id=backbone.processor.tokenizer.pad_token_id,
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode is restored after it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
