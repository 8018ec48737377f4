"""What an image becomes: processor tensors, T image tokens, features of D, the hidden width.

Features are computed once, one image a forward pass, and kept in memory and in a study's store.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgid.models.store import ContentStore, key_of
from vgid.seeds import image_digest

V = TypeVar("V")

MEMORY_BYTES = 1 << 30  # for images, and as much for features, until their next use


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it; its pixels, larger by far, are made when the tower is run."""

    key: str  # SHA-256 of the image
    tokens: int  # T that stand for it in a prompt
    grid: dict[str, Tensor] = field(repr=False)  # its shape: Qwen's ``image_grid_thw``, or nothing
    pixels: Callable[[], Tensor] = field(repr=False, compare=False)  # ``pixel_values``, on the CPU

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the processor makes of the image, made anew."""
        return {"pixel_values": self.pixels(), **self.grid}

    @property
    def token_key(self) -> int:
        """A negative number for the image among token ids: equal images, equal ids."""
        return -1 - int(self.key[:15], 16)


def image_processing(processor: Any) -> tuple[str, str]:
    """How a processor makes pixels, for keys: by which class, and with which settings."""
    images = processor.image_processor
    settings = json.dumps(images.to_dict(), sort_keys=True, default=str)
    return type(images).__qualname__, settings


class Vision:
    """The eyes of a backbone: a model whose tower is frozen, its processor, its base's revision."""

    def __init__(self, model: Any, processor: Any, revision: str) -> None:
        self.model, self.processor, self.revision = model, processor, revision
        self.store: ContentStore | None = None  # shared with other processes, if any
        self.hits = self.misses = 0  # a miss is a run of the tower
        self._pictures: _Recent[Picture] = _Recent(MEMORY_BYTES)
        self._features: _Recent[Tensor] = _Recent(MEMORY_BYTES)

    def picture(self, image: Image.Image) -> Picture:
        """Process an image, or take it from memory."""
        key = image_digest(image)
        picture = self._pictures.get(key)
        if picture is None:
            tokens, tensors = self._process(image)
            del tensors["pixel_values"]
            picture = Picture(key, tokens, tensors, lambda: self._process(image)[1]["pixel_values"])
            self._pictures.put(key, picture, image.width * image.height * len(image.getbands()))
        return picture

    def _process(self, image: Image.Image) -> tuple[int, dict[str, Tensor]]:
        output = dict(self.processor(text=[self.processor.image_token], images=[image]))
        ids = output.pop("input_ids")[0]
        output.pop("attention_mask")
        output.pop("mm_token_type_ids", None)
        tokens = sum(int(i) == self.processor.image_token_id for i in ids)
        return tokens, {name: torch.as_tensor(np.asarray(value)) for name, value in output.items()}

    def features(self, picture: Picture) -> Tensor:
        """What the language model sees in place of the image tokens: (T, D), model's dtype."""
        features_TD = self._features.get(picture.key)
        passes = self.misses
        if features_TD is None:
            if self.store is None:
                features_TD = self._look(picture)
            else:
                pixels = [image_processing(self.processor), picture.key]
                key = key_of([self.revision, str(self.model.dtype), pixels])
                stored = self.store.get_or_compute(key, lambda: {"features": self._look(picture)})
                features_TD = stored["features"]
            self._features.put(picture.key, features_TD, features_TD.nbytes)
        self.hits += self.misses == passes
        return features_TD.to(self.model.device)

    @torch.no_grad()
    def _look(self, picture: Picture) -> Tensor:
        self.misses += 1
        tensors = {name: value.to(self.model.device) for name, value in picture.tensors.items()}
        pixels = tensors.pop("pixel_values").to(self.model.dtype)
        output = self.model.get_image_features(pixels, **tensors, return_dict=True)
        (features_TD,) = output.pooler_output
        return features_TD.cpu().contiguous()


class _Recent(Generic[V]):
    """The most recently used values, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._size = 0
        self._entries: OrderedDict[str, tuple[V, int]] = OrderedDict()

    def get(self, key: str) -> V | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: str, value: V, size: int) -> None:
        self._entries[key] = (value, size)
        self._size += size
        # The newest stays whatever its size: it is about to be used.
        while self._size > self.limit and len(self._entries) > 1:
            _, (_, freed) = self._entries.popitem(last=False)
            self._size -= freed
