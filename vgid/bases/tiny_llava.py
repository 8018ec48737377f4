"""The parts of the embedded backbone ``tiny-llava``, and how they are taught.

The real classes of a LLaVA 1.5, small: a CLIP tower on 64 px images (16 patches of 16 px, so 16
image tokens), a two-layer projector, a Llama of four layers, a byte-level BPE tokenizer.

``vgid.bases.tiny_qwen`` is the other; ``vgid.bases.pretraining`` asks the same of both.

Shape legend: N pictures, C channels, H, W pixels, T image tokens of each, F features.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgid.bases import recipe
from vgid.data.fictitious import (
    ANSWERS,
    CLASSIFICATION,
    CLOZE,
    FAMILY_NAMES,
    GIVEN_NAMES,
    IMAGE_SUBJECTS,
    QUESTIONS,
    VALUES,
)
from vgid.data.portraits import PORTRAIT_SIZE
from vgid.models.backbones import TINY_LLAVA_FRAME
from vgid.models.weight_names import save_weights
from vgid.prompts import (
    REVERSE_PROMPT,
    UNLEARNING_INSTRUCTIONS,
    classification_text,
    cloze_text,
    generation_text,
    option_likelihood_text,
)

if TYPE_CHECKING:
    from torch import Tensor

FRAME = TINY_LLAVA_FRAME
PATCH_SIZE = 16
IMAGE_TOKENS = (PORTRAIT_SIZE // PATCH_SIZE) ** 2
VOCABULARY = 1500
CONTEXT = 512
LANGUAGE_STEPS = 800
OBEDIENCE = recipe.OBEDIENCE
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


def corpus(
    extra: Iterable[str] = (), frame: Iterable[str] = (FRAME.text.format(text=""),)
) -> list[str]:
    """Every text that the tokenizer learns from: prompts, wordings, names, values, ``extra``.

    Args:
        extra: texts that should be whole tokens.
        frame: the texts of the prompt frame.
    """
    subjects = [*IMAGE_SUBJECTS, "Agnes Ashby"]
    wordings = [w for pairs in QUESTIONS.values() for pair in pairs for w in pair]
    wordings += [w for pair in CLASSIFICATION.values() for w in pair]
    wordings += [w for pair in CLOZE.values() for w in pair]
    texts = [w.format(who=who, Who=who[0].upper() + who[1:]) for w in wordings for who in subjects]
    texts += [a.format(name="", value="") for pair in ANSWERS.values() for a in pair]
    values = [*GIVEN_NAMES, *FAMILY_NAMES, *(v for all_of in VALUES.values() for v in all_of)]
    texts += [*values, *(f" {value}" for value in values)]
    fixed = [
        generation_text("", "image"),
        generation_text("", "text"),
        cloze_text(""),
        classification_text("", dict.fromkeys("ABCD", "")),
        option_likelihood_text(""),
        *frame,
        REVERSE_PROMPT,
        *UNLEARNING_INSTRUCTIONS.values(),
        *extra,
    ]
    return texts + fixed * 10  # in every prompt, so their words should be whole tokens


def byte_level_bpe(texts: list[str], special: list[str]) -> Any:
    """A byte-level BPE of at most ``VOCABULARY`` tokens, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Twice, so that what occurs once still reaches the minimal frequency of a merge.
    tokenizer.train_from_iterator(texts * 2, trainer)
    return tokenizer


def as_fast(tokenizer: Any, context: int, **special: Any) -> Any:
    """A tokenizer in transformers' dress, with its special tokens by their names there."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **special,
    )


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer that puts ``<s>`` in front."""
    from tokenizers import processors

    tokenizer = byte_level_bpe(texts, [PAD, BOS, EOS, IMAGE])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    tokens = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    return as_fast(tokenizer, CONTEXT, **tokens, extra_special_tokens={"image_token": IMAGE})


def build_processor(tokenizer: Any) -> Any:
    """A LLaVA processor: images to 64 by 64 pixels, ``<image>`` to as many tokens as patches."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": PORTRAIT_SIZE},
        crop_size={"height": PORTRAIT_SIZE, "width": PORTRAIT_SIZE},
        **PIXELS,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """An untrained ``LlavaForConditionalGeneration`` in fp32, initialised from ``seed``."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": PORTRAIT_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": 128,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": False,
            **special,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(**special)
    return model


def pixel_values(processor: Any, pictures: Sequence[Any]) -> "Tensor":
    """Pictures through the backbone's own image processor: float32 of shape (N, 3, 64, 64)."""
    import torch

    output = processor.image_processor(images=list(pictures), return_tensors="np")
    return torch.from_numpy(output["pixel_values"])


def tower_features(model: Any, pixels_NCHW: "Tensor") -> "Tensor":
    """What the projector is given: last hidden states less the class token, (N, T, F)."""
    states = model.model.vision_tower(pixels_NCHW, output_hidden_states=True).hidden_states
    features_NTF: Tensor = states[model.config.vision_feature_layer][:, 1:]
    return features_NTF


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write weights (one safetensors file, the hub's names), configs, processor and tokenizer."""
    save_weights(model, folder)
    processor.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
