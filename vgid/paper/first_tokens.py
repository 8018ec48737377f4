"""What a model makes of the first token of its response: the paper's figure 2 as numbers.

The paper shows logits of sensitive tokens ("software", "engineer") beside those of safe ones
("sorry", "know") for one question. Here, for every fill-in question about the forget people's
portraits, the first token of the true answer is sensitive (it is the first response token, as the
answer is the value itself), and those of ``vgid.prompts.REFUSALS`` are safe.

Shape legend: N questions, D hidden width, V vocabulary, S distinct safe tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vgid.data.benchmark import Person, decode_image
from vgid.evaluation.metrics import bootstrap_interval
from vgid.method.teacher import Intervention, intervene
from vgid.models.backbones import Backbone
from vgid.models.encoding import Query, encode, response_ids
from vgid.models.packing import response_hidden
from vgid.prompts import REFUSALS, cloze_text
from vgid.results import Score

if TYPE_CHECKING:
    from vgid.trial import TrialSession

CHUNK = 64
NAMES = ("sensitive_logit", "safe_logit", "sensitive_probability", "safe_probability")


def first_token_scores(session: "TrialSession", intervention: Intervention) -> dict[str, Score]:
    """``NAMES`` of the base under an intervention, each a mean over the questions; empty if none.

    Logits (of safe tokens their mean) are relative to the mean of the vocabulary, since softmax
    leaves a constant open; probabilities of safe tokens are summed.
    """
    request = session.request
    groups, values = _first_token_values(session.backbone, session.people.forget, intervention)
    columns = zip(NAMES, zip(*values, strict=True), strict=False)  # none without a question
    samples, seed = request.bootstrap_samples, request.seed
    return {name: bootstrap_interval(column, groups, samples, seed) for name, column in columns}


@torch.no_grad()
def _first_token_values(
    backbone: Backbone, people: Sequence[Person], intervention: Intervention
) -> tuple[list[str], list[tuple[float, ...]]]:
    """The person behind each question, and the values of ``NAMES``."""
    groups: list[str] = []
    asked: list[tuple[Query, int]] = []
    for person in people:
        image = decode_image(person.images[0], f"the image of person {person.id}")
        for question in person.questions:
            if question.task == "cloze" and question.form == "image":
                query = Query(question.id, cloze_text(question.text), image)
                asked.append((query, response_ids(backbone, question.answer)[0]))
                groups.append(person.id)
    safe_S = sorted({response_ids(backbone, refusal)[0] for refusal in REFUSALS})
    found = []
    for start in range(0, len(asked), CHUNK):
        queries, tokens = zip(*asked[start : start + CHUNK], strict=True)
        prompts = encode(backbone, intervene(backbone, list(queries), intervention))
        # One response token each: its predicting state is the first position's.
        hidden_ND = response_hidden(backbone, prompts, [[token] for token in tokens])
        logits_NV = backbone.model.lm_head(hidden_ND.to(backbone.device)).float()
        centred_NV = logits_NV - logits_NV.mean(dim=-1, keepdim=True)
        probabilities_NV = logits_NV.softmax(dim=-1)
        for n, sensitive in enumerate(tokens):
            safe = [token for token in safe_S if token != sensitive]
            values = (
                centred_NV[n, sensitive],
                centred_NV[n, safe].mean(),
                probabilities_NV[n, sensitive],
                probabilities_NV[n, safe].sum(),
            )
            found.append(tuple(map(float, values)))
    return groups, found
