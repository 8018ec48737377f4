"""The true sizes of the real backbones, written out, and models of random weights in those sizes.

What a step costs depends on sizes, not on what the weights have learnt, so a backbone can be
profiled without its weights. Shrunk, the same classes and the same wiring fit into a test.

Sources: ``config.json`` of the public repositories ``llava-hf/llava-1.5-7b-hf``,
``llava-hf/llava-1.5-13b-hf`` and ``Qwen/Qwen2.5-VL-3B-Instruct``; the sizes are those of Vicuna
(Llama 2), CLIP ViT-L/14-336 and of table 1 of the Qwen2.5-VL technical report (arXiv 2502.13923).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from vgid.errors import InputError
from vgid.models.backbones import Backbone, spec


class TextSize(NamedTuple):
    """Sizes of a decoder: width, width of its gated MLP, layers, query and key-value heads."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int


TEXT_SIZES = {
    "llava-1.5-7b": TextSize(4096, 11008, 32, 32, 32),
    "llava-1.5-13b": TextSize(5120, 13824, 40, 40, 40),
    "qwen2.5-vl-3b": TextSize(2048, 11008, 36, 16, 2),
}
SHRUNK_TEXT_SIZES = {
    "llava-1.5-7b": TextSize(128, 344, 4, 4, 4),
    "llava-1.5-13b": TextSize(160, 432, 5, 5, 5),
    "qwen2.5-vl-3b": TextSize(128, 688, 4, 16, 2),
}
"""A 32nd of the width (Qwen: a 16th, for its 16 heads) and an eighth of the layers or so."""


def config_of(name: str, shrink: bool = False, layers: int | None = None) -> Any:
    """The Hugging Face configuration of a real backbone.

    Args:
        name: a backbone's name.
        shrink: narrower and with fewer layers; vocabulary, image tokens, special tokens, tied or
            untied embeddings and the ratio of query to key-value heads stay.
        layers: of the decoder, in place of as many as these sizes have.

    Raises:
        InputError: a name whose sizes are not written out here.
    """
    if name not in TEXT_SIZES:
        raise InputError(
            f"backbone: the sizes of {name!r} are not known; choose one of {', '.join(TEXT_SIZES)}."
        )
    size = (SHRUNK_TEXT_SIZES if shrink else TEXT_SIZES)[name]
    text = {
        "hidden_size": size.hidden,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": layers or size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
    }
    return _qwen(text, shrink) if name.startswith("qwen") else _llava(text, shrink)


def _llava(text: dict[str, int], shrink: bool) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = {
        "hidden_size": 64 if shrink else 1024,
        "intermediate_size": 256 if shrink else 4096,
        "num_hidden_layers": 3 if shrink else 24,
        "num_attention_heads": 4 if shrink else 16,
    }
    return LlavaConfig(
        text_config=LlamaConfig(
            **text, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5
        ),
        vision_config=CLIPVisionConfig(
            **vision, image_size=336, patch_size=14, projection_dim=768, vocab_size=32000
        ),
        image_token_index=32000,
        pad_token_id=32001,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _qwen(text: dict[str, int], shrink: bool) -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": 4 if shrink else 32,
        "hidden_size": 64 if shrink else 1280,
        "intermediate_size": 172 if shrink else 3420,
        "num_heads": 4 if shrink else 16,
        "fullatt_block_indexes": [1, 3] if shrink else [7, 15, 23, 31],
    }
    return Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": 151936,
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2] if shrink else [16, 24, 24],
            },
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "pad_token_id": 151643,
        },
        vision_config={
            **vision,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "out_hidden_size": text["hidden_size"],
        },
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        image_token_id=151655,
        video_token_id=151656,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class TokenIds:
    """What takes a processor's place where prompts are token ids from the start.

    Attributes:
        image_token_id: stands for an image's features.
        pad_token_id: fills rows up.
    """

    image_token_id: int
    pad_token_id: int

    @property
    def tokenizer(self) -> "TokenIds":
        """Itself: where a processor keeps its pad token."""
        return self


def random_backbone(
    name: str, device: str = "cpu", dtype: Any = None, shrink: bool = False, seed: int = 0
) -> Backbone:
    """A frozen backbone of random weights, made on the device itself, in its dtype.

    It takes prompts that are token ids already (``TokenIds``): no tokenizer is downloaded.

    Args:
        name: of a real backbone.
        device: torch device; on ``meta`` the weights take no memory.
        dtype: of the weights, by default fp32 on the CPU and bf16 elsewhere, as ``load`` has it.
        shrink: as in ``config_of``.
        seed: of the weights.

    Raises:
        InputError: a name whose sizes are not written out here.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    config = config_of(name, shrink)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.requires_grad_(False)
    pad = config.get_text_config().pad_token_id
    ids = TokenIds(config.image_token_id, config.pad_token_id if pad is None else pad)
    return Backbone(spec(name), model.eval(), ids, f"random weights, seed {seed}")
