"""The weight index of each real backbone on the hub: every name, written out from public sources.

LLaVA: ``vision_tower.vision_model``, ``language_model.model`` and ``language_model.lm_head`` are
what vLLM reads unmapped (``hf_to_vllm_mapper`` of its ``llava.py``, where ``model.language_model``
and ``lm_head`` stand as the names of files saved since transformers 4.52); the names below them are
those of ``CLIPVisionModel``, ``LlamaForCausalLM`` and ``LlavaMultiModalProjector``. Qwen2.5-VL:
``model.layers``, ``model.embed_tokens`` and ``visual.blocks`` are quoted from the index in
hiyouga/LlamaFactory issue 8338, the names below them are those of the classes. Embeddings of the 3B
model are tied, so it has no ``lm_head``.
"""

KINDS = ("weight", "bias")
CLIP_LAYER = [
    f"{part}.{kind}"
    for part in (
        *(f"self_attn.{p}_proj" for p in ("k", "v", "q", "out")),
        *("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"),
    )
    for kind in KINDS
]
LLAMA_LAYER = [
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
]
QWEN_LAYER = [*LLAMA_LAYER, *(f"self_attn.{p}_proj.bias" for p in "qkv")]
QWEN_BLOCK = [
    *("norm1.weight", "norm2.weight"),
    *(f"attn.{p}.{kind}" for p in ("qkv", "proj") for kind in KINDS),
    *(f"mlp.{p}_proj.{kind}" for p in ("gate", "up", "down") for kind in KINDS),
]


def llava_index(vision_layers: int, text_layers: int) -> set[str]:
    """Names of a LLaVA 1.5."""
    tower = "vision_tower.vision_model"
    projector = "multi_modal_projector"
    return {
        f"{tower}.embeddings.class_embedding",
        f"{tower}.embeddings.patch_embedding.weight",
        f"{tower}.embeddings.position_embedding.weight",
        *(f"{tower}.{n}.{kind}" for n in ("pre_layrnorm", "post_layernorm") for kind in KINDS),
        *(f"{tower}.encoder.layers.{i}.{n}" for i in range(vision_layers) for n in CLIP_LAYER),
        *(f"{projector}.linear_{i}.{kind}" for i in (1, 2) for kind in KINDS),
        "language_model.model.embed_tokens.weight",
        *(f"language_model.model.layers.{i}.{n}" for i in range(text_layers) for n in LLAMA_LAYER),
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    }


def qwen_index(vision_layers: int, text_layers: int, tied: bool) -> set[str]:
    """Names of a Qwen2.5-VL."""
    return {
        "visual.patch_embed.proj.weight",
        *(f"visual.blocks.{i}.{n}" for i in range(vision_layers) for n in QWEN_BLOCK),
        "visual.merger.ln_q.weight",
        *(f"visual.merger.mlp.{i}.{kind}" for i in (0, 2) for kind in KINDS),
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{n}" for i in range(text_layers) for n in QWEN_LAYER),
        "model.norm.weight",
        *(() if tied else ("lm_head.weight",)),
    }


INDEX = {
    "llava-1.5-7b": llava_index(24, 32),
    "llava-1.5-13b": llava_index(24, 40),
    "qwen2.5-vl-3b": qwen_index(32, 36, tied=True),
    "tiny-llava": llava_index(3, 4),
    "tiny-qwen2.5-vl": qwen_index(4, 4, tied=False),
}
"""By backbone; the embedded ones have what the hub would have of their sizes."""
