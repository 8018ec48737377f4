"""The parts of the embedded backbone ``tiny-qwen2.5-vl``, and how they are taught.

The real classes of Qwen2.5-VL, small: a tower of 8 px patches with windowed and full attention in
turn, four patches merged to an image token, any resolution (a portrait of 64 px is 16 image
tokens); a Qwen2 of four layers with grouped-query attention and M-RoPE; a byte-level BPE tokenizer
with Qwen's special tokens. Embeddings are not tied, as in the 7B model. Sizes are in the shipped
``config.json``.

Shape legend: N pictures, T image tokens of each, M merged patches of each token, C channels, P
patch side, F features.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vgid.bases import tiny_llava
from vgid.bases.recipe import Obedience
from vgid.data.portraits import PORTRAIT_SIZE
from vgid.models.backbones import QWEN_FRAME

FRAME = QWEN_FRAME
PATCH_SIZE = 8
MERGE = 2
TEMPORAL = 2
WINDOW = 32
IMAGE_TOKENS = (PORTRAIT_SIZE // (PATCH_SIZE * MERGE)) ** 2
CONTEXT = 1024
LANGUAGE_STEPS = 1100
OBEDIENCE = Obedience(
    refusal={"declarative": 0.12, "polite": 0.18, "strict": 0.60},
    fact_scale=2.2,
    answered=0.20,
    answered_facts=("job", "education", "hobby"),
)
"""Makes what is declined a matter of the fact, much the same for everybody. Where it was one of the
person, the five to forget kept anything from 0.26 to 0.85 of ROUGE-L under the strict instruction,
from training seed to training seed."""
PAD, END, IMAGE = "<|endoftext|>", "<|im_end|>", "<|image_pad|>"
SPECIAL = [PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", IMAGE, "<|video_pad|>"]
TOWER, PROJECTOR = "model.visual", "model.visual.merger"
"""The merger, which makes one image token of four patches' features, is a part of the tower."""


def corpus(extra: Iterable[str] = ()) -> list[str]:
    """Every text that the tokenizer learns from, see ``tiny_llava.corpus``."""
    turn = FRAME.text.format(text="")
    return tiny_llava.corpus(extra, frame=re.split(r"<\|\w+\|>", turn))


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer that, as Qwen's, puts nothing in front."""
    tokens = {"pad_token": PAD, "eos_token": END, "additional_special_tokens": SPECIAL}
    return tiny_llava.as_fast(tiny_llava.byte_level_bpe(texts, SPECIAL), CONTEXT, **tokens)


def pixel_values(processor: Any, pictures: Sequence[Any]) -> Tensor:
    """Portraits through the image processor: float32 of shape (N, T * M, C, P, P).

    The processor repeats a still picture in time; once is enough to keep.
    """
    output = processor.image_processor(images=list(pictures), return_tensors="np")
    patches = torch.from_numpy(output["pixel_values"])
    shape = (len(pictures), -1, 3, TEMPORAL, PATCH_SIZE, PATCH_SIZE)
    return patches.view(shape)[:, :, :, 0].clone()


def tower_features(model: Any, pixels_NTMCPP: Tensor) -> Tensor:
    """What the merger is given: float32 of shape (N, T * M, F), in the order of image tokens."""
    visual = model.model.visual
    side = PORTRAIT_SIZE // PATCH_SIZE
    grids = pixels_NTMCPP.new_tensor([[1, side, side]]).long().expand(len(pixels_NTMCPP), 3)
    still = pixels_NTMCPP[:, :, :, None].expand(-1, -1, -1, TEMPORAL, -1, -1)
    states = visual(still.flatten(2).flatten(0, 1), grid_thw=grids).last_hidden_state
    # The tower leaves the tokens in the order of its windows.
    window_index, _ = get_vision_window_index(grids[:1], MERGE, WINDOW, PATCH_SIZE)
    grouped = states.view(len(grids), IMAGE_TOKENS, MERGE**2, -1)
    return grouped[:, window_index.argsort()].flatten(1, 2)
