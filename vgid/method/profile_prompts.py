"""Synthetic prompts in the benchmark's lengths: what a step costs depends on lengths alone.

A position axes, L tokens of a prompt, T image tokens, R response tokens, D hidden width.
"""

import hashlib
import math
from copy import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgid.config import TrialConfig
from vgid.method.distillation import DistillationSet
from vgid.method.teacher import TeacherTarget
from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded
from vgid.models.memory import activation_bytes, adapter_bytes, vocabulary_bytes
from vgid.models.packing import pack
from vgid.models.vision import Picture

PORTRAIT_PIXELS = 336
BEFORE_IMAGE = 5  # tokens of the prompt frame in front of it
QUESTION_TOKENS = (35, 55)
RESPONSE_TOKENS = (15, 25)
"""Shortest and longest, 45 and 20 on average: what the benchmark's questions and answers take."""


def synthetic_set(backbone: Backbone, portraits: int, questions: int, seed: int) -> DistillationSet:
    """``questions`` of random token ids on each of some random ``portraits``, and states."""
    generator = np.random.default_rng(seed)
    config = backbone.model.config
    text_config = config.get_text_config()
    # Between the special tokens at either end of a vocabulary.
    low, high = text_config.vocab_size // 10, text_config.vocab_size * 9 // 10

    def drawn(shortest: int, longest: int) -> list[int]:
        length = generator.integers(shortest, longest + 1)
        return [int(i) for i in generator.integers(low, high, length)]

    prompts, targets = [], []
    begin = drawn(BEFORE_IMAGE, BEFORE_IMAGE)
    for portrait in range(portraits):
        picture = _picture(config, f"portrait {portrait} of seed {seed}", generator)
        for question in range(questions):
            asked = drawn(*QUESTION_TOKENS)
            before = len(begin)
            ids = begin + [backbone.processor.image_token_id] * picture.tokens + asked
            identity = begin + [picture.token_key] * picture.tokens + asked
            positions_AL = _positions(config, ids, before, picture)
            name = f"{portrait}/{question}"
            prompts.append(Encoded(name, ids, identity, positions_AL, (picture,)))
            response = drawn(*RESPONSE_TOKENS)
            size = (len(response), text_config.hidden_size)
            hidden_RD = torch.from_numpy(generator.standard_normal(size, dtype=np.float32))
            targets.append(TeacherTarget(response, hidden_RD.to(backbone.model.dtype)))
    return DistillationSet(prompts, [targets], ["generation"] * len(prompts))


def step_bytes(backbone: Backbone, trial: TrialConfig, workers: int = 1) -> int:
    """Bytes that a worker's step takes beside the base's weights, which ``backbone`` can lack.

    LoRA in training, and of the two terms the larger: the loss's buffers and kept activations.
    """
    shape = copy(backbone)
    config = backbone.model.config
    shape.model = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))
    text: Any = config.get_text_config()
    rank, together = trial.lora_rank, trial.questions_per_image
    kept = []
    for batch in (trial.batch_size, trial.retain_batch_size):
        part = math.ceil(batch / (trial.gradient_accumulation * workers))
        data = synthetic_set(shape, math.ceil(part / together), min(part, together), 0)
        responses = [target.response for target in data.targets[0]]
        packed = pack(shape, data.prompts, responses)
        how = trial.gradient_checkpointing, trial.lora_dropout > 0
        loss = vocabulary_bytes(text, sum(map(len, responses)))
        kept.append(loss + activation_bytes(text, [packed], rank, *how))
    return adapter_bytes(text, rank) + max(kept)


def _picture(config: Any, name: str, generator: np.random.Generator) -> Picture:
    vision = config.vision_config
    grid: dict[str, Tensor] = {}
    if hasattr(vision, "spatial_merge_size"):
        side = PORTRAIT_PIXELS // vision.patch_size
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        shape: tuple[int, ...] = (side * side, patch)
        grid["image_grid_thw"] = torch.tensor([[1, side, side]])
        tokens = (side // vision.spatial_merge_size) ** 2
    else:
        shape = (1, 3, vision.image_size, vision.image_size)
        tokens = config.image_seq_length
    pixels = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return Picture(hashlib.sha256(name.encode()).hexdigest(), tokens, grid, lambda: pixels)


def _positions(config: Any, ids: list[int], before: int, picture: Picture) -> Tensor:
    """Position ids: (A, L). Qwen's image tokens stand in a grid, and text goes on behind it."""
    count_L = torch.arange(len(ids))
    if not hasattr(config.vision_config, "spatial_merge_size"):
        return count_L[None]
    side, behind = int(picture.tokens**0.5), before + picture.tokens
    positions_AL = (count_L - (count_L >= behind) * (picture.tokens - side)).repeat(3, 1)
    place_T = torch.arange(picture.tokens)
    grid_AT = torch.stack([torch.zeros_like(place_T), place_T // side, place_T % side])
    positions_AL[:, before:behind] = before + grid_AT
    return positions_AL
