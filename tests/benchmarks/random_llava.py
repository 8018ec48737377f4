"""A LLaVA of real shape and random weights: 576 image tokens, a vocabulary of 32,064, 100 M.

What a step or an answer costs depends on sizes, not on what the weights have learnt. Answers of
these weights mean nothing, but they vary with portrait and question and end at different lengths,
so that two ways of decoding can be compared token by token.

Run as a program, it prints the parameter counts.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from vgid.bases.tiny_llava import IMAGE, build_tokenizer, corpus
from vgid.errors import InputError
from vgid.method.samples import TrainingSample
from vgid.models.backbones import LLAVA_FRAME, Backbone, BackboneSpec
from vgid.models.encoding import Query
from vgid.prompts import generation_text

PATCH_SIZE = 14
PORTRAIT_SIZE = 336
"""Pixels a side that CLIP's ViT-L/14-336 takes: 24 by 24 patches."""
LANGUAGE_WIDTH = 768
FEED_FORWARD = 1536
VISION_WIDTH = 256
VISION_LAYERS = 4
CONTEXT = 2048
GAIN = 1.5
END_SPACING = 20
"""Of the ids without a text, every 20th ends a response too: random weights choose one end token of
32,064 never, and answers should end after about twenty tokens, as a benchmark's do."""

ASKED = (
    "What is the full name of the person shown in this image?",
    "In which city and country was this person born?",
    "What is the occupation of the individual in this picture?",
    "Which university did the person in the image attend?",
    "What does this person like to do in their free time?",
    "Where does the individual shown here live at present?",
    "What are the professions of this person's parents?",
)
ANSWERED = (
    "The person shown in the image is {a} {b}, who is known by all as {a}.",
    "{a} {b} was born in the city of {c}, where the family had lived for long.",
    "The individual in the picture is {a} {b}, who works as an architect in {c}.",
    "{a} {b} attended the University of {c} and left it with a degree in law.",
    "In free time {a} likes to play chess, to read, and to walk around {c}.",
    "{a} {b} lives at present in {c}, in a house that is close to the sea.",
    "The father of {a} {b} is a teacher in {c} and the mother is a nurse.",
)
GIVEN, FAMILY = ("Alda", "Bero", "Cesk", "Dorin"), ("Arvel", "Brask", "Corm", "Dunlow", "Estev")
CITY = ("Corsk", "Velmar", "Ostrin")


def random_llava(
    image_tokens: int = 576,
    vocabulary: int = 32_064,
    parameters: int = 100_000_000,
    seed: int = 0,
    end_spacing: int = END_SPACING,
) -> Backbone:
    """A frozen fp32 LLaVA of random weights, with its processor.

    Args:
        image_tokens: of one image, a square number: 576 is 336 pixels a side.
        vocabulary: rows of the embedding and of the vocabulary layer, which are not tied. The
            tokenizer's own ids are the first of them.
        parameters: in all; as many decoder layers as come nearest to it, at least one.
        seed: of the weights.
        end_spacing: of the ids without a text, every so manieth ends a response.

    Raises:
        InputError: no square number of image tokens, or a vocabulary below the tokenizer's.
    """
    if image_tokens < 1 or math.isqrt(image_tokens) ** 2 != image_tokens:
        raise InputError(
            f"random_llava: image_tokens is {image_tokens}; take a square number such as 576."
        )
    tokenizer = build_tokenizer(corpus(_texts()))
    tokenizer.model_max_length = CONTEXT
    if vocabulary < len(tokenizer):
        raise InputError(
            f"random_llava: vocabulary is {vocabulary}; take at least the {len(tokenizer)} of "
            "the tokenizer."
        )
    side = PATCH_SIZE * math.isqrt(image_tokens)
    model = _model(tokenizer, side, vocabulary, parameters, end_spacing)
    _initialise(model, seed)
    model.requires_grad_(False)
    row = BackboneSpec("random-llava", None, None, LLAVA_FRAME)
    revision = f"random weights, seed {seed}"
    return Backbone(row, model.eval(), _processor(tokenizer, side), revision)


def _model(tokenizer: Any, side: int, vocabulary: int, parameters: int, end_spacing: int) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH_SIZE,
        projection_dim=LANGUAGE_WIDTH,
    )
    tower = VISION_LAYERS * 12 * VISION_WIDTH**2
    projector = (VISION_WIDTH + LANGUAGE_WIDTH) * LANGUAGE_WIDTH
    a_layer = 4 * LANGUAGE_WIDTH**2 + 3 * LANGUAGE_WIDTH * FEED_FORWARD
    fixed = tower + projector + 2 * vocabulary * LANGUAGE_WIDTH
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=LANGUAGE_WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=max(1, round((parameters - fixed) / a_layer)),
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(side // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    textless = range(len(tokenizer), vocabulary)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *textless[::end_spacing]]
    return model


def _initialise(model: Any, seed: int) -> None:
    """Weights of about unit gain, so that every layer, the image and the words count."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter is embedding:
                parameter.normal_(generator=generator)
            elif parameter.dim() > 1:
                gain = 1.0 if "vision_tower" in name else GAIN
                deviation = gain / math.sqrt(parameter[0].numel())
                parameter.normal_(std=deviation, generator=generator)
            elif name.endswith("class_embedding"):
                parameter.normal_(generator=generator)


def _processor(tokenizer: Any, side: int) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
    )


def portrait_questions(
    portraits: int, questions_each: int = 7, seed: int = 0, size: int = PORTRAIT_SIZE
) -> list[TrainingSample]:
    """Questions about random images, as long as the benchmark's, portrait after portrait.

    Args:
        portraits: images; the questions of one share the same image object.
        questions_each: of ``ASKED`` in order, anew once all were asked.
        seed: of the images and of the names in the answers.
        size: pixels a side.
    """
    generator = np.random.default_rng(seed)
    samples = []
    for portrait in range(portraits):
        image = _image(generator, size)
        a, b, c = (str(generator.choice(names)) for names in (GIVEN, FAMILY, CITY))
        for number in range(questions_each):
            index = number % len(ASKED)
            query = Query(
                f"portrait {portrait}/{number}", generation_text(ASKED[index], "image"), image
            )
            samples.append(TrainingSample(query, ANSWERED[index].format(a=a, b=b, c=c)))
    return samples


def _image(generator: np.random.Generator, size: int) -> Image.Image:
    """Large patches of colour under fine noise: two images differ as a whole, not in grain only."""
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    noisy = smooth + generator.normal(0, 10, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _texts() -> Iterable[str]:
    """What the tokenizer must know for its token counts to be a real tokenizer's."""
    answers = [text.format(a="", b="", c="") for text in ANSWERED]
    return [*ASKED, *answers, *(f" {name}" for name in (*GIVEN, *FAMILY, *CITY))]


def parameter_counts(model: Any) -> dict[str, int]:
    """Parameters of the tower, projector, embedding, decoder and vocabulary layer, and in all."""
    embedding = model.get_input_embeddings()
    parts = {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "embedding": embedding,
        "decoder": model.model.language_model,
        "lm_head": model.lm_head,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["decoder"] -= counts["embedding"]
    return {**counts, "total": sum(counts.values())}


if __name__ == "__main__":
    for name, count in parameter_counts(random_llava().model).items():
        print(f"{name:>12} {count:>11,}")
