"""The parts of the embedded backbone ``tiny-llava``, and how they are taught.

The real classes of a LLaVA 1.5, small: a CLIP tower on 64 px images (16 patches of 16 px, so 16
image tokens), a two-layer projector, a Llama of four layers, a byte-level BPE tokenizer. Its sizes
are in the shipped ``config.json``. ``vgid.bases.pretraining`` asks the same of ``tiny_qwen``.

Shape legend: N pictures, C channels, H, W pixels, T image tokens of each, F features.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from vgid import prompts
from vgid.bases import recipe
from vgid.data import fictitious
from vgid.models.backbones import (
    EMBEDDED,
    TINY_LLAVA_FRAME,
    copy_beside_weights,
    processor_of,
)
from vgid.models.weight_names import save_weights

FRAME = TINY_LLAVA_FRAME
PATCH_SIZE = 16
VOCABULARY = 1500
CONTEXT = 512
LANGUAGE_STEPS = 800
OBEDIENCE = recipe.OBEDIENCE
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


def corpus(
    extra: Iterable[str] = (), frame: Iterable[str] = (FRAME.text.format(text=""),)
) -> list[str]:
    """Every text that the tokenizer learns from: prompts, wordings, names, values, ``extra``."""
    subjects = [*fictitious.IMAGE_SUBJECTS, "Agnes Ashby"]
    pairs = (*fictitious.CLASSIFICATION.values(), *fictitious.CLOZE.values())
    wordings = chain(*chain(*fictitious.QUESTIONS.values()), *pairs)
    texts = [w.format(who=who, Who=who[0].upper() + who[1:]) for w in wordings for who in subjects]
    texts += [a.format(name="", value="") for pair in fictitious.ANSWERS.values() for a in pair]
    names = (fictitious.GIVEN_NAMES, fictitious.FAMILY_NAMES)
    values = [*chain(*names, *fictitious.VALUES.values())]
    texts += [*values, *(f" {value}" for value in values)]
    fixed = [
        prompts.generation_text("", "image"),
        prompts.generation_text("", "text"),
        prompts.cloze_text(""),
        prompts.classification_text("", dict.fromkeys("ABCD", "")),
        prompts.option_likelihood_text(""),
        *frame,
        prompts.REVERSE_PROMPT,
        *prompts.UNLEARNING_INSTRUCTIONS.values(),
        *extra,
    ]
    return texts + fixed * 10  # in every prompt, so their words should be whole tokens


def byte_level_bpe(texts: list[str], special: list[str]) -> Any:
    """A byte-level BPE of at most ``VOCABULARY`` tokens, the special ones first."""
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
    """A tokenizer in transformers' dress; ``special`` are tokens by their names there."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **special,
    )


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer that puts ``<s>`` in front."""
    tokenizer = byte_level_bpe(texts, [PAD, BOS, EOS, IMAGE])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    tokens = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    return as_fast(tokenizer, CONTEXT, **tokens, extra_special_tokens={"image_token": IMAGE})


def processor(name: str, tokenizer: Any) -> Any:
    """An embedded backbone's shipped processor, with a tokenizer of the same special tokens."""
    shipped = processor_of(EMBEDDED / name)
    shipped.tokenizer = tokenizer
    return shipped


def untrained(name: str, tokenizer: Any, seed: int) -> Any:
    """An embedded backbone's model in fp32 of its shipped configuration, weights by ``seed``."""
    config = transformers.AutoConfig.from_pretrained(EMBEDDED / name)
    config.dtype = None  # else its parts would name it too, where it is written again
    config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    model.generation_config = transformers.GenerationConfig.from_pretrained(EMBEDDED / name)
    return model


def pixel_values(processor: Any, pictures: Sequence[Any]) -> Tensor:
    """Pictures through the backbone's own image processor: float32 of shape (N, 3, 64, 64)."""
    output = processor.image_processor(images=list(pictures), return_tensors="np")
    return torch.from_numpy(output["pixel_values"])


def tower_features(model: Any, pixels_NCHW: Tensor) -> Tensor:
    """What the projector is given: last hidden states less the class token, (N, T, F)."""
    states = model.model.vision_tower(pixels_NCHW, output_hidden_states=True).hidden_states
    features_NTF: Tensor = states[model.config.vision_feature_layer][:, 1:]
    return features_NTF


def save(name: str, model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (one safetensors file, the hub's names), config and tokenizer.

    All else is as shipped; it names the stock processor, which may want one of videos.
    """
    save_weights(model, folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    written = ("config.json", "generation_config.json", "tokenizer.json")
    copy_beside_weights(EMBEDDED / name, folder, *written)
