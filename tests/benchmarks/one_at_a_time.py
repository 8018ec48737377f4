"""Evaluation as the benchmark's public code runs it: the baseline of ``evaluate``.

Question by question, the processor on text and image, then ``generate`` at batch 1 with its
key-value cache, greedy, 50 tokens at most (protocol of https://github.com/franciscoliu/MLLMU-Bench,
eval.py). Multiple-choice questions are answered by letter in the same way.

Settings are those of ``vgid.models.decoding``, so answers can be compared token by token: a
checkpoint's own about sampling or repetition are set aside, and an image token is never an answer.
"""

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor

from vgid.models.backbones import Backbone
from vgid.models.decoding import MAX_NEW_TOKENS
from vgid.models.encoding import Query, response_ids


def processor_inputs(
    backbone: Backbone, queries: Sequence[Query], answers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Model inputs of the queries, by the Hugging Face processor alone: nothing is kept or shared.

    Args:
        backbone: whose processor, prompt frame and device are used.
        queries: one sequence each, padded on the right; a portrait is processed for each question.
        answers: responses that follow the prompts, each with its end-of-sequence token.
    """
    frame = backbone.spec.frame
    texts, images = [], []
    for query in queries:
        turn = (frame.text if query.image is None else frame.image).format(text=query.text)
        texts.append("".join(shot.text for shot in query.shots) + turn)
        images += [shot.image for shot in query.shots if shot.image is not None]
        images += [] if query.image is None else [query.image]
    if answers is not None:
        end = backbone.processor.tokenizer.eos_token
        texts = [
            f"{text}{frame.separator}{answer}{end}"
            for text, answer in zip(texts, answers, strict=True)
        ]
    typed = "mm_token_type_ids" in signature(backbone.model.forward).parameters
    output = backbone.processor(
        text=texts,
        images=images or None,
        padding=True,
        padding_side="right",
        return_tensors="pt",
        return_mm_token_type_ids=typed,
    )
    return dict(output.to(backbone.device, dtype=backbone.model.dtype))


@torch.no_grad()
def answers(
    backbone: Backbone, queries: Sequence[Query], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """Token ids of each query's greedy answer, before the end-of-sequence token."""
    tokenizer = backbone.processor.tokenizer
    configured = backbone.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    ends.discard(None)
    found = []
    for query in queries:
        inputs = processor_inputs(backbone, [query])
        output_1L = backbone.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[backbone.processor.image_token_id],
        )
        tokens = output_1L[0, inputs["input_ids"].shape[1] :].tolist()
        found.append(tokens[:-1] if tokens[-1] in ends else tokens)
    return found


@torch.no_grad()
def option_logprobs(
    backbone: Backbone, queries: Sequence[Query], options: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Log-probability in nats of each option as the whole response, end-of-sequence included.

    One forward pass an option, with its own image, and logits at every position.

    Args:
        backbone: the model.
        queries: the questions.
        options: the texts to rank, for each question.
    """
    return [
        [_logprob(backbone, query, option) for option in its_options]
        for query, its_options in zip(queries, options, strict=True)
    ]


def _logprob(backbone: Backbone, query: Query, option: str) -> float:
    inputs = processor_inputs(backbone, [query], [option])
    targets_R = inputs["input_ids"][0, -len(response_ids(backbone, option)) :]
    logits_1LV = backbone.model(**inputs).logits
    predicting_RV = logits_1LV[0, -len(targets_R) - 1 : -1].float()
    logprobs_R = predicting_RV.log_softmax(-1).gather(-1, targets_R[:, None])
    return float(logprobs_R.double().sum())
