"""What a step must cost at the least: FLOPs, from sizes alone.

The usual rule is 6 P FLOPs a token for P parameters (Kaplan et al. 2020, arXiv 2001.08361, section
2.1): 2 P forward, 4 P backward, of which half are weight gradients. With a frozen base there are no
weight gradients but LoRA's, so a step of distillation takes 2 P for the teacher, 2 P for the
student and 2 P for the gradients on their way through the frozen weights: 6 P again. With the
teacher's hidden states in the store it takes 4 P.

What counts as needed here, and so in MFU, the share of a device's peak that does needed work:

- every decoder layer runs once for each distinct token, forward and backward. A token that several
  samples share counts once, padding never; what gradient checkpointing computes again is no
  needed work (as in Chowdhery et al. 2022, arXiv 2204.02311, appendix B);
- attention only between a token and the tokens that it sees, itself included: two products
  forward, four backward;
- ``lm_head`` only where a response token is predicted: logits of teacher and student, gradient;
- nothing before the first trained weight gets a gradient: there are none through the query, key
  and value maps of the first layer;
- the vision tower is frozen and its features are kept, so it costs nothing in a step;
- norms, activations, rotary embeddings and the optimizer are left out: they are bound by memory,
  and below a hundredth of the FLOPs at real sizes.

LoRA is on all seven linear maps of every decoder layer, as in ``vgid.models.backbones``. A
multiplication with its addition is two FLOPs. All counts are exact integers.

Symbols: D hidden width, H width of all query heads, K width of all key-value heads, F width of the
gated MLP, V vocabulary, P parameters of the decoder's linear maps, r rank of LoRA, T distinct
tokens, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vgid.models.memory import DecoderSizes
from vgid.models.packing import Packed


@dataclass(frozen=True)
class Flops:
    """FLOPs by where they go.

    Attributes:
        linear: the decoder's frozen linear maps.
        attention: queries with keys, weights with values, and their gradients.
        head: ``lm_head``.
        lora: the adapter's two maps beside each linear map.
        vision: tower and projector.
    """

    linear: int = 0
    attention: int = 0
    head: int = 0
    lora: int = 0
    vision: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head + self.lora + self.vision

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.linear + other.linear,
            self.attention + other.attention,
            self.head + other.head,
            self.lora + other.lora,
            self.vision + other.vision,
        )


class _Sizes(DecoderSizes):
    """What a decoder's parts cost."""

    def __init__(self, text_config: Any) -> None:
        super().__init__(text_config)
        self.V: int = text_config.vocab_size

    @property
    def parameters(self) -> int:
        """P."""
        return self.layers * sum(i * o for i, o in self.maps)

    def linear_backward(self, tokens: int) -> int:
        """Gradients through the frozen maps, but for the first layer's q, k and v."""
        # Nothing below them is trained, so no gradient is to go through them.
        first = sum(i * o for i, o in self.maps[:3])
        return 2 * (self.parameters - first) * tokens

    def lora(self, rank: int, tokens: int) -> int:
        """Two maps: forward, weight gradient, input gradient (not in the first q, k and v)."""
        both = self.layers * sum(i + o for i, o in self.maps)
        first = sum(i for i, _ in self.maps[:3])
        return 2 * rank * tokens * (3 * both - first)

    def attention(self, pairs: int, products: int) -> int:
        """So many matrix products over pairs of tokens, in all layers."""
        return 2 * products * self.layers * self.H * pairs

    def head(self, positions: int, products: int) -> int:
        """So many products with the vocabulary."""
        return 2 * products * self.D * self.V * positions


def distinct_tokens(packed: Packed) -> int:
    """T: the tokens of a packed batch, each once, without padding."""
    return sum(_used(packed))


def seen_pairs(packed: Packed) -> int:
    """Pairs of a token and one that it sees (an ancestor, or itself), without padding's."""
    place_L = torch.arange(packed.ids_BL.shape[1], device=packed.ids_BL.device)
    used_B1 = torch.tensor(_used(packed), device=place_L.device)[:, None]
    return int(((packed.ends_BL - place_L) * (place_L < used_B1)).sum())


def _used(packed: Packed) -> list[int]:
    """Tokens of each row in front of its padding."""
    used = [0] * len(packed.ids_BL)
    for row, path in zip(packed.rows, packed.paths, strict=True):
        used[row] = max(used[row], path[-1] + 1)
    return used


def _totals(packs: Sequence[Packed]) -> tuple[int, int, int]:
    tokens = sum(map(distinct_tokens, packs))
    pairs = sum(map(seen_pairs, packs))
    return tokens, pairs, sum(len(r) for packed in packs for r in packed.responses)


def step_minimum(text_config: Any, packs: Sequence[Packed], lora_rank: int) -> Flops:
    """The least that one step of distillation costs with the teacher in the store: 4 P.

    Without the store, add ``fill_minimum`` of what the teacher is shown: 6 P.

    Args:
        text_config: of the language model; Llama's, or one with the same names of sizes.
        packs: the step's samples with their responses, forget and retain.
        lora_rank: r.
    """
    sizes = _Sizes(text_config)
    tokens, pairs, responses = _totals(packs)
    return Flops(
        linear=2 * sizes.parameters * tokens + sizes.linear_backward(tokens),
        attention=sizes.attention(pairs, 2 + 4),
        head=sizes.head(responses, 3),
        lora=sizes.lora(lora_rank, tokens),
    )


def fill_minimum(text_config: Any, packs: Sequence[Packed], generated: bool = False) -> Flops:
    """The least that filling the teacher store costs: 2 P, and no logits for given responses.

    The vision tower is left out: its features are kept on their own (``vgid.models.vision``).

    Args:
        text_config: of the language model.
        packs: what the teacher is shown, with the responses.
        generated: the teacher's own responses, each token of which takes its logits.
    """
    sizes = _Sizes(text_config)
    tokens, pairs, responses = _totals(packs)
    return Flops(
        linear=2 * sizes.parameters * tokens,
        attention=sizes.attention(pairs, 2),
        head=sizes.head(responses, 1) if generated else 0,
    )


def released_minimum(config: Any, packs: Sequence[Packed], lora_rank: int) -> Flops:
    """The least that the public VGID script needs for the same samples.

    Its second model as teacher runs in each step, a sequence holds one question, both models see
    the image and make logits of the whole vocabulary at every position (``vgid.method.released``).
    Padding is left out, so the script itself takes more.

    Args:
        config: of the whole model; LLaVA's or Qwen2.5-VL's.
        packs: the samples, of which each shows one image or none.
        lora_rank: r.
    """
    sizes = _Sizes(config.get_text_config())
    lengths = [len(path) for packed in packs for path in packed.paths]
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    images = []
    for packed in packs:
        image_BL = packed.ids_BL == config.image_token_id
        images += [
            int(image_BL[row, path].sum())
            for row, path in zip(packed.rows, packed.paths, strict=True)
        ]
    return Flops(
        linear=4 * sizes.parameters * tokens + sizes.linear_backward(tokens),
        attention=sizes.attention(pairs, 2 + 2 + 4),
        head=sizes.head(tokens, 3),
        lora=sizes.lora(lora_rank, tokens),
        vision=2 * sum(vision_forward(config, n) for n in images),
    )


def vision_forward(config: Any, image_tokens: int) -> int:
    """FLOPs of tower and projector for one image.

    Layers behind the one whose output is used are left out. Qwen's windows are taken as full, as
    they are where the image's sides are multiples of the window.

    Args:
        config: of the whole model; LLaVA's with CLIP, or Qwen2.5-VL's.
        image_tokens: that stand for the image; none, no image.
    """
    if image_tokens == 0:
        return 0
    vision = config.vision_config
    D, F = vision.hidden_size, vision.intermediate_size
    patch = 3 * vision.patch_size**2
    if hasattr(vision, "spatial_merge_size"):
        merged = vision.spatial_merge_size**2
        patches = image_tokens * merged
        layers = vision.depth
        window = min(patches, (vision.window_size // vision.patch_size) ** 2)
        full = len(vision.fullatt_block_indexes)
        seen = full * patches + (layers - full) * window
        maps = 4 * D * D + 3 * D * F
        embedding = patches * patch * vision.temporal_patch_size * D
        projector = image_tokens * merged * D * (merged * D + vision.out_hidden_size)
    else:
        patches = image_tokens + 1  # the class token, which the language model does not see
        layer = config.vision_feature_layer
        layers = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
        seen = layers * patches
        maps = 4 * D * D + 2 * D * F
        embedding = image_tokens * patch * D
        width = config.get_text_config().hidden_size
        projector = image_tokens * (D * width + width * width)
    return 2 * (layers * patches * maps + embedding + projector + 2 * patches * seen * D)
