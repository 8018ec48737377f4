"""From a question to tensors: prompt frame, L tokens, positions on A axes; nothing is cut."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vgid.errors import SampleError
from vgid.models.backbones import Backbone
from vgid.models.vision import Picture
from vgid.prompts import Task


@dataclass(frozen=True)
class Shot:
    """A few-shot turn that precedes the question, framed (image token if any, no ``opening``)."""

    text: str
    image: Image.Image | None


@dataclass(frozen=True)
class Query:
    """What a model is asked."""

    id: str  # names it in error messages
    text: str  # the user text, without the prompt frame
    image: Image.Image | None  # RGB
    shots: tuple[Shot, ...] = ()
    task: Task | None = None  # asks in the benchmark's turn of it; None: in that of teaching


@dataclass(frozen=True)
class Encoded:
    """A query as the model takes it."""

    id: str
    prompt_ids: list[int]  # of the framed prompt, image tokens expanded
    # A token's id, or a negative number that names its image: so equal beginnings are the same.
    identity: list[int] = field(repr=False)
    # int64: one axis, or three where image tokens have a time, a row and a column (Qwen's M-RoPE).
    positions_AL: Tensor = field(repr=False)
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    shots: int = 0  # fewer than the query's where the context does not hold all

    @property
    def vision(self) -> dict[str, Tensor]:
        """Processor tensors such as ``pixel_values``, the images along the first axis."""
        made = [picture.tensors for picture in self.pictures]
        return {name: torch.cat([t[name] for t in made]) for name in (made[0] if made else ())}


def encode(backbone: Backbone, queries: Sequence[Query], room: int = 0) -> list[Encoded]:
    """Frame and tokenise queries and process their images.

    The response takes ``room`` tokens of the context. For it the last few-shot turns are left out,
    so that prompts still begin alike. Too long a sample, the image token as text, or an image that
    the processor refuses is a ``SampleError``.
    """
    limit = backbone.model.config.get_text_config().max_position_embeddings
    image_id = backbone.processor.image_token_id
    encoded = []
    for asked in queries:
        query = asked
        prompt_ids, pictures = _tokens(backbone, query)
        while query.shots and len(prompt_ids) + room > limit:
            query = replace(query, shots=query.shots[:-1])
            prompt_ids, pictures = _tokens(backbone, query)
        if len(prompt_ids) + room > limit:
            response = f" and {room} of the response" if room else ""
            raise SampleError(
                query.id,
                f"{len(prompt_ids)} tokens{response} exceed the context of {limit} of "
                f"{backbone.spec.name}; lower the image resolution, or shorten the text.",
            )
        keys = iter([key for p in pictures for key in [p.token_key] * p.tokens])
        # To the tokenizer all images are one token: two portraits' prompts would share states.
        identity = [next(keys) if i == image_id else i for i in prompt_ids]
        positions_AL = _positions(backbone, prompt_ids, pictures)
        shots = len(query.shots)
        encoded.append(Encoded(query.id, prompt_ids, identity, positions_AL, pictures, shots))
    return encoded


def _tokens(backbone: Backbone, query: Query) -> tuple[list[int], tuple[Picture, ...]]:
    """Ids of the framed prompt, image tokens expanded, and the images that they stand for."""
    frame, processor = backbone.spec.frame, backbone.processor
    turn = frame.turn("text" if query.image is None else "image", query.task)
    turn = turn.removeprefix(frame.opening).format(text=query.text)
    images = [shot.image for shot in query.shots if shot.image is not None]
    images += [] if query.image is None else [query.image]
    try:
        pictures = tuple(backbone.vision.picture(image) for image in images)
    except ValueError as error:  # Qwen's, of a side 200 times the other
        raise SampleError(
            query.id,
            f"the image processor of {backbone.spec.name} takes no such image ({error}); store "
            "another image.",
        ) from None
    # As the processors themselves do it, but with each image processed once for all its questions.
    # As one text: tokenised in pieces, a word at a seam would have other tokens than in training.
    whole = frame.opening + "".join(shot.text for shot in query.shots) + turn
    first, *rest = whole.split(processor.image_token)
    if len(rest) != len(pictures):
        raise SampleError(
            query.id,
            f"its text holds the image token {processor.image_token} of {backbone.spec.name}; take "
            "it out of the text.",
        )
    text = first + "".join(
        processor.image_token * picture.tokens + after
        for picture, after in zip(pictures, rest, strict=True)
    )
    return [int(i) for i in processor.tokenizer(text)["input_ids"]], pictures


def _positions(
    backbone: Backbone, prompt_ids: Sequence[int], pictures: Sequence[Picture]
) -> Tensor:
    core = backbone.model.model
    if not hasattr(core, "get_rope_index"):
        return torch.arange(len(prompt_ids))[None]
    if not pictures:
        # Three equal axes are what Qwen's own rule gives text: time, height and width all count on.
        return torch.arange(len(prompt_ids)).expand(3, -1)
    ids_1L = torch.tensor([prompt_ids])
    positions_A1L, _ = core.get_rope_index(
        input_ids=ids_1L,
        mm_token_type_ids=(ids_1L == backbone.processor.image_token_id).int(),
        image_grid_thw=torch.cat([picture.grid["image_grid_thw"] for picture in pictures]),
    )
    positions_AL: Tensor = positions_A1L[:, 0]
    return positions_AL


def response_ids(backbone: Backbone, response: str, sample: str = "without a name") -> list[int]:
    """Token ids of a response behind the frame, with its end; ``SampleError`` at an image token."""
    frame = backbone.spec.frame
    tokenizer = backbone.processor.tokenizer
    # Tokenised behind the frame's end, since many tokenizers treat a text's first word apart.
    turn = frame.text.format(text="")
    prefix = tokenizer(turn)["input_ids"]
    whole = tokenizer(turn + frame.separator + response)["input_ids"]
    if whole[: len(prefix)] != prefix:
        raise ValueError(f"the prompt frame of {backbone.spec.name} merges with the response")
    if backbone.processor.image_token_id in whole:
        raise SampleError(
            sample,
            f"its answer holds the image token {backbone.processor.image_token} of "
            f"{backbone.spec.name}; take it out of the text.",
        )
    return [*whole[len(prefix) :], tokenizer.eos_token_id]


def collate(
    backbone: Backbone, encoded: Sequence[Encoded], responses: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """The model's inputs: one padded sequence a sample, response included. It tests packs."""
    rows = [[*e.prompt_ids, *r] for e, r in zip(encoded, responses, strict=True)]

    def padded(rows: list[list[int]], value: int) -> Tensor:
        ragged = [torch.tensor(row) for row in rows]
        return pad_sequence(ragged, batch_first=True, padding_value=value).to(backbone.device)

    inputs = {
        "input_ids": padded(rows, backbone.processor.tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
    }
    if "mm_token_type_ids" in signature(backbone.model.forward).parameters:
        image_id = backbone.processor.image_token_id
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
    seen = [e.vision for e in encoded if e.pictures]
    for name in sorted(seen[0]) if seen else []:
        value = torch.cat([tensors[name] for tensors in seen]).to(backbone.device)
        inputs[name] = value.to(backbone.model.dtype) if value.is_floating_point() else value
    return inputs


def at_model_resolution(processor: Any, image: Image.Image) -> NDArray[np.uint8]:
    """What the model sees before normalisation, 8-bit RGB (H, W, 3); no processor resizes it."""
    image_processor = processor.image_processor
    if hasattr(image_processor, "merge_size"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        size = image_processor.size
        height, width = smart_resize(
            image.height,
            image.width,
            image_processor.patch_size * image_processor.merge_size,
            size["shortest_edge"],
            size["longest_edge"],
        )
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized, dtype=np.uint8)
    pixels_1CHW = image_processor(
        images=image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"]
    return np.rint(np.transpose(pixels_1CHW[0], (1, 2, 0))).clip(0, 255).astype(np.uint8)
