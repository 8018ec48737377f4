"""Folders of the real backbones in the layout that the hub has them in, with shrunk random weights.

File names, key names of the weights, precisions, configs, token ids and tokenizer classes are those
of ``llava-hf/llava-1.5-7b-hf``, ``llava-hf/llava-1.5-13b-hf`` and ``Qwen/Qwen2.5-VL-3B-Instruct``.
The tokenizers know some thousand pieces; fillers stand for the rest.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.benchmarks.architectures import random_backbone
from vgid.bases.tiny_llava import corpus

PIECES = 1500
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_ADDED = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
"""From id 151643 on."""


def random_model(name: str) -> Any:
    """The model whose weights are written, in fp32."""
    model = random_backbone(name, shrink=True).model
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # large enough to give varied answers
    return model


def dtype_of(name: str) -> torch.dtype:
    """Precision of the public weights."""
    return torch.bfloat16 if name.startswith("qwen") else torch.float16


def write_folder(name: str, folder: Path) -> Path:
    """Write a real backbone, shrunk, as the hub has it."""
    folder.mkdir(parents=True)
    random_model(name).save_pretrained(folder, max_shard_size="15MB")
    config = json.loads((folder / "config.json").read_text())
    if name.startswith("qwen"):
        _write_weights(folder, dtype_of(name), {})
        _write_json(folder / "config.json", _flat(config))
        _write_qwen_processor(folder)
    else:
        # As transformers 4 named them.
        _write_weights(folder, dtype_of(name), {"vision_tower.": "vision_tower.vision_model."})
        config["torch_dtype"] = config.pop("dtype")
        _write_json(folder / "config.json", config)
        _write_llava_processor(folder)
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


def _write_weights(folder: Path, dtype: torch.dtype, renamed: dict[str, str]) -> None:
    """Give the shards another precision, and keys that begin otherwise; and so the index."""

    def rename(key: str) -> str:
        for old, new in renamed.items():
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key

    for path in sorted(folder.glob("model-*.safetensors")):
        tensors = {rename(key): tensor.to(dtype) for key, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {rename(key): shard for key, shard in index["weight_map"].items()}
    _write_json(folder / "model.safetensors.index.json", index)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen's config as transformers 4.4x wrote it: text settings at the top, ``rope_scaling``."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("layer_types", "dtype", "model_type", "pad_token_id"):
        text.pop(key, None)
    vision = config.pop("vision_config")
    for key in ("rope_parameters", "dtype", "in_channels", "initializer_range", "patch_size"):
        vision.pop(key, None)
    vision |= {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 14}
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = text | config | {"vision_config": vision, "torch_dtype": "bfloat16"}
    flat.pop("dtype")
    return flat | {"rope_scaling": scaling, "rope_theta": rope["rope_theta"]}


def _filled(vocabulary: dict[str, int], size: int) -> dict[str, int]:
    fillers = {f"<filler {i}>": i for i in range(len(vocabulary), size)}
    return vocabulary | fillers


def _write_llava_processor(folder: Path) -> None:
    """A SentencePiece-like BPE with byte fallback, as Vicuna's; ``<image>`` and ``<pad>`` added."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_filled(learnt["vocab"], 32000),
            merges=[tuple(pair) for pair in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    added = [*special, "<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in added}
    assert (ids["<image>"], ids["<pad>"]) == (32000, 32001)
    _write_json(folder / "added_tokens.json", {"<image>": 32000, "<pad>": 32001})
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", named)
    _write_json(
        folder / "tokenizer_config.json",
        named
        | {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": _added(ids),
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "legacy": False,
            "model_max_length": 10**30,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": 336, "width": 336},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": CLIP_MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": CLIP_STD,
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": 336},
        },
    )
    _write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )


def _write_qwen_processor(folder: Path) -> None:
    """Byte-level BPE with Qwen's division into words; no ``processor_config.json`` there."""

    def pieces(tokenizer: Tokenizer) -> Tokenizer:
        split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    tokenizer = pieces(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocabulary = _filled(learnt["vocab"], 151643)
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = pieces(Tokenizer(models.BPE(vocab=vocabulary, merges=merges)))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_ADDED])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in QWEN_ADDED}
    assert (ids["<|endoftext|>"], ids["<|image_pad|>"]) == (151643, 151655)
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": _added(ids),
            "additional_special_tokens": QWEN_ADDED[1:],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    generation = {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643}
    generation |= {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.000001}
    _write_json(folder / "generation_config.json", generation)


def _added(ids: dict[str, int]) -> dict[str, dict[str, Any]]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {str(i): {"content": token, "special": True, **flags} for token, i in ids.items()}
