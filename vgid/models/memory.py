"""Bytes that a step of distillation takes beside the base's weights, from sizes alone.

D hidden width, H width of all query heads, K of all key-value heads, F of the gated MLP, V
vocabulary, r rank of LoRA on all seven linear maps of every decoder layer.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vgid.models.packing import Packed
from vgid.models.tree_attention import lay_out


class DecoderSizes:
    """The sizes of a decoder that costs depend on, under Llama's names."""

    def __init__(self, text_config: Any) -> None:
        heads = text_config.num_attention_heads
        D = text_config.hidden_size
        width = getattr(text_config, "head_dim", None) or D // heads
        H, K = heads * width, text_config.num_key_value_heads * width
        F = text_config.intermediate_size
        self.D, self.H, self.K, self.F = D, H, K, F
        self.layers: int = text_config.num_hidden_layers
        # Input and output width of a layer's linear maps: q, k, v, o, gate, up, down.
        self.maps = [(D, H), (D, K), (D, K), (H, D), (D, F), (D, F), (F, D)]


def activation_bytes(
    text_config: Any,
    packs: Sequence[Packed],
    lora_rank: int,
    checkpointing: bool,
    dropout: bool = False,
) -> int:
    """Bytes that the forward pass keeps for the backward pass, bf16 model under fp32 LoRA.

    A layer keeps for each token, with Hugging Face's Llama and peft:

    - 8 D: the inputs of both norms in fp32;
    - 8 H: rotated queries, keys and values, repeated to all heads, and the output;
    - 4 H for each key that a block of queries gathers from several stretches;
    - 20 D + 4 H + 4 F: the input of each LoRA map in fp32, cast for each of them anew;
    - 28 r: what is between LoRA's two maps;
    - 5 D + H + F with dropout: its masks, a byte for each input of a LoRA map (on a GPU);
    - 6 F: gate, its activation, and up.

    Blocks' masks are there once. With checkpointing each layer keeps its input, 2 D, the norm
    behind them 4 D, and one layer at a time all. ``packs`` are all that are forwarded before it.
    """
    s = DecoderSizes(text_config)
    tokens = sum(packed.ids_BL.numel() for packed in packs)
    trees = [tree for packed in packs for tree in lay_out(packed.ends_BL, torch.bfloat16)]
    blocks = [block for tree in trees for block in tree.blocks]
    masks = sum(block.mask_QK.untyped_storage().nbytes() for block in blocks)
    gathered = sum(block.mask_QK.shape[1] for block in blocks if len(block.keys) > 1)
    layer = tokens * (28 * s.D + 12 * s.H + 10 * s.F + 28 * lora_rank) + 4 * s.H * gathered
    if dropout:
        layer += tokens * sum(width for width, _ in s.maps)
    kept = layer + (2 * s.layers + 4) * s.D * tokens if checkpointing else s.layers * layer
    return int(kept + masks)


def adapter_bytes(text_config: Any, lora_rank: int) -> int:
    """Bytes of LoRA in training: weights, gradients and AdamW's two moments, all fp32."""
    s = DecoderSizes(text_config)
    return 16 * lora_rank * s.layers * sum(i + o for i, o in s.maps)


def cache_bytes(text_config: Any, tokens: int) -> int:
    """Bytes of the key-value cache of so many tokens, bf16."""
    s = DecoderSizes(text_config)
    return 2 * 2 * s.layers * s.K * tokens


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None of a CPU, on which a slot is given what it needs."""
    return None if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory


def vocabulary_bytes(text_config: Any, positions: int, chunk: int = 256) -> int:
    """Bytes of the loss's two fp32 buffers of (C, V), see ``vgid.method.chunked_kl``.

    A chunk has fewer positions where there are fewer response ``positions`` in all.
    """
    return 2 * 4 * min(chunk, positions) * int(text_config.vocab_size)
