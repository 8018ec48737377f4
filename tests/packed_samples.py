"""Samples that begin alike in every way, and the plain forward pass of each of them alone.

The reference of the packs' tests: pixels and all through the Hugging Face model, no packing.
"""

import torch
from PIL import Image
from torch import Tensor

from tests.conftest import make_random_backbone
from tests.models.test_encoding import picture
from tests.random_qwen import make_random_qwen
from vgid.models.backbones import Backbone
from vgid.models.encoding import Query, Shot, response_ids

EXACT = 1e-5
"""Deviation relative to the largest value, in fp32."""
ARCHITECTURES = ("llava", "qwen", "qwen-untied")

Processed = dict[str, Tensor]
Samples = tuple[list[Query], list[list[int]]]


def make_backbone(architecture: str) -> Backbone:
    """Random weights of one of ``ARCHITECTURES``."""
    if architecture == "llava":
        return make_random_backbone()
    return make_random_qwen(tied=architecture == "qwen")


def turn_of(backbone: Backbone, text: str, image: Image.Image | None) -> str:
    """One turn of a conversation, without what opens the conversation."""
    frame = backbone.spec.frame
    whole = frame.text if image is None else frame.image
    return whole.removeprefix(frame.opening).format(text=text)


def shot(backbone: Backbone, text: str, answer: str, image: Image.Image | None) -> Shot:
    separator = backbone.spec.frame.separator
    return Shot(f"{turn_of(backbone, text, image)}{separator}{answer}\n", image)


def make_queries(backbone: Backbone) -> list[Query]:
    """Every way in which prompts can begin alike, in no helpful order."""
    a, b, c, d = (
        picture(seed, size)
        for seed, size in enumerate([(64, 64), (200, 150), (84, 140), (150, 200)])
    )
    who, where = "Who is shown in this picture?", "Where does this person live?"
    of_a = shot(backbone, who, "Agnes Ashby", a)
    of_b = shot(backbone, where, "in Corsk.", b)
    spoken = shot(backbone, who, "Agnes Ashby", None)
    return [
        Query("a/who", who, a),
        Query("b/who", who, b),  # same wording, another image
        Query("text/where", where, None),
        Query("a/where", where, a),
        Query("few/c", who, c, (of_a, of_b)),  # begins with all of a/who
        Query("a/who again", who, a),
        Query("few/d", who, d, (of_a, of_b)),  # parts from few/c at the last image
        Query("few/c where", where, c, (of_a, of_b)),
        Query("few/a twice", where, a, (of_a,)),
        Query("text/who", who, None),
        Query("few/spoken", where, c, (spoken,)),  # begins with all of text/who
        Query("text/where again", where, None),
        Query("c/who", who, c),
    ]


RESPONSES = ["in Corsk.", "Agnes Ashby lives in Corsk.", "Agnes Ashby, a baker.", "No"]
OPTIONS = ["in Corsk.", "in Corsk and", "in", "a baker"]


def make_samples(backbone: Backbone) -> Samples:
    """Queries with responses; two of them with options, one the beginning of another."""
    queries = make_queries(backbone)
    responses = [response_ids(backbone, RESPONSES[n % 4]) for n in range(len(queries))]
    for query in (queries[3], queries[7]):
        queries += [query] * len(OPTIONS)
        # Without the end of sequence, so that "in" is the beginning of "in Corsk.".
        responses += [response_ids(backbone, option)[:-1] for option in OPTIONS]
    return queries, responses


def processed(backbone: Backbone, query: Query) -> Processed:
    """What the processor makes of a whole prompt, text and images in one call."""
    turn = turn_of(backbone, query.text, query.image)
    images = [s.image for s in query.shots if s.image is not None]
    images += [] if query.image is None else [query.image]
    text = backbone.spec.frame.opening + "".join(s.text for s in query.shots) + turn
    return dict(backbone.processor(text=[text], images=images or None, return_tensors="pt"))


def with_response(inputs: Processed, response: list[int]) -> Processed:
    more = {"input_ids": torch.tensor([response], dtype=torch.long)}
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    more["mm_token_type_ids"] = torch.zeros_like(more["input_ids"])
    return {k: torch.cat([v, more[k]], 1) if k in more else v for k, v in inputs.items()}


def separate(backbone: Backbone, query: Query, response: list[int]) -> Tensor:
    """States that predict the response, from the plain forward pass of this sequence alone."""
    inputs = with_response(processed(backbone, query), response)
    hidden_LD = backbone.model.model(**inputs, use_cache=False).last_hidden_state[0]
    return hidden_LD[-len(response) - 1 : -1]


def separate_all(backbone: Backbone, samples: Samples) -> Tensor:
    return torch.cat([separate(backbone, q, r) for q, r in zip(*samples, strict=True)])


def deviation(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()
