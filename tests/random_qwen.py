"""A small Qwen2.5-VL of random weights: the real classes, shrunk."""

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from vgid.bases.tiny_llava import corpus
from vgid.bases.tiny_qwen import END, PAD, SPECIAL, build_tokenizer
from vgid.models.backbones import Backbone, spec
from vgid.models.qwen_processor import ImageOnlyQwenProcessor

PATCH = 14
SPATIAL_MERGE = 2
IMAGE_TOKEN_PIXELS = (PATCH * SPATIAL_MERGE) ** 2


def build_processor(tokenizer: Any) -> Any:
    """Images keep their shape, at 4 to 64 image tokens."""
    image_processor = Qwen2VLImageProcessorPil(
        size={
            "shortest_edge": 4 * IMAGE_TOKEN_PIXELS,
            "longest_edge": 64 * IMAGE_TOKEN_PIXELS,
        }
    )
    return ImageOnlyQwenProcessor(image_processor, tokenizer)


def build_model(tokenizer: Any, seed: int, tied: bool) -> Any:
    """Grouped-query attention, M-RoPE, a tower with windowed and full attention in turn."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],  # half a head's width in all
            },
            "bos_token_id": None,
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": SPATIAL_MERGE,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 64,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "visual" not in name:
                parameter.mul_(5.0)  # large enough to give varied answers
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = ids[END]
    model.generation_config.pad_token_id = ids[PAD]
    return model.requires_grad_(False).eval()


def make_random_qwen(seed: int = 0, tied: bool = True) -> Backbone:
    """qwen2.5-vl-3b's classes with random weights; it ties its embeddings, the 7B does not."""
    tokenizer = build_tokenizer(corpus())
    return Backbone(
        spec("qwen2.5-vl-3b"),
        build_model(tokenizer, seed, tied),
        build_processor(tokenizer),
        f"random weights {seed}",
    )
