"""The teacher pi_T (equation 2) and the store that computes it once per study.

The base's last hidden states at the response positions are kept, in chunks of portraits, and turned
back into exact logits by the frozen ``lm_head``. A chunk's key is the hash of all that it depends
on. Shape legend: R response tokens of a sample, D hidden width.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from filelock import Timeout
from PIL import Image
from torch import Tensor

from vgid.config import NoiseType
from vgid.method.interventions import perturb
from vgid.method.samples import TrainingSample
from vgid.models.backbones import Backbone
from vgid.models.decoding import MAX_NEW_TOKENS, greedy_tokens
from vgid.models.encoding import Query, at_model_resolution, encode, response_ids
from vgid.models.packing import response_hidden
from vgid.models.store import ContentStore, key_of
from vgid.prompts import REFUSALS, PromptStyle, with_instruction
from vgid.seeds import image_digest, sample_generator

TargetSource = Literal["teacher", "reference", "refusal"]
"""Whose response tokens: the ``teacher``'s own greedy answer under the intervention, the
``reference`` answer of the data, or a ``refusal`` (``vgid.prompts.REFUSALS``)."""

FORMAT = 2
CHUNK = 64
"""Samples of a chunk at least; a chunk holds whole portraits, whose questions share the image."""


@dataclass(frozen=True)
class Intervention:
    """What the teacher is shown in place of (v_f, t_f): P_phi(v_f) and t_ic ⊕ t_f, equation 2.

    With neither noise nor style it is the frozen base itself (equation 4). The seed is that of the
    noise, the same for all questions of an image, and of the choice of each question's refusal.
    """

    noise_type: NoiseType | None = None
    sigma: float | None = None  # of Gaussian noise
    style: PromptStyle | None = None
    seed: int = 0


PLAIN = Intervention()  # questions as they are


def intervene(
    backbone: Backbone, queries: Sequence[Query], intervention: Intervention
) -> list[Query]:
    """The queries as the teacher sees them: v' = P_phi(v), t' = t_ic ⊕ t (equation 2)."""
    perturbed: dict[int, Image.Image] = {}  # by object: a portrait's questions hold the same one
    seen = []
    for query in queries:
        image = query.image
        if image is not None and intervention.noise_type is not None:
            if id(image) not in perturbed:
                pixels = perturb(
                    at_model_resolution(backbone.processor, image),
                    intervention.noise_type,
                    intervention.sigma,
                    sample_generator(intervention.seed, image_digest(image)),
                )
                perturbed[id(image)] = Image.fromarray(pixels)
            image = perturbed[id(image)]
        text = with_instruction(query.text, intervention.style)
        seen.append(replace(query, text=text, image=image))
    return seen


# Hidden states, not logits, are what is kept: a response of 20 tokens is 20 x 4,096 numbers on
# LLaVA-1.5-7B, its logits 20 x 32,064, and lm_head, which is frozen, gives the same logits again.
@dataclass(frozen=True)
class TeacherTarget:
    """What the student learns for one sample: token ids y, and the states that predict them."""

    response: list[int]  # y, end-of-sequence included
    hidden_RD: Tensor  # the teacher's last hidden states


def response_room(backbone: Backbone, sample: TrainingSample) -> int:
    """Tokens that a response takes at most; an answer with an image token is a ``SampleError``."""
    return max(MAX_NEW_TOKENS, len(response_ids(backbone, sample.answer, sample.query.id)))


@dataclass
class TeacherStore:
    """Teacher targets, shared by all trials and processes of a study."""

    store: ContentStore
    backbone: Backbone  # without an adapter while it computes
    hits: int = field(default=0, init=False)  # samples whose target the store held
    misses: int = field(default=0, init=False)

    def targets(
        self, samples: Sequence[TrainingSample], intervention: Intervention, source: TargetSource
    ) -> list[TeacherTarget]:
        """The targets of ``samples``, in the order that all trials have: chunks are cut from it."""
        chunks = _chunks(samples)
        found: dict[int, TeacherTarget] = {}
        # A chunk that another process computes comes last: so workers and trials that begin
        # together share the chunks out, and do not wait for each other at every one.
        for wait in (False, True):
            for chunk in chunks:
                if chunk[0] not in found:
                    with suppress(Timeout):
                        asked = [samples[n] for n in chunk]
                        targets = self._chunk(asked, intervention, source, wait)
                        found.update(zip(chunk, targets, strict=True))
        return [found[n] for n in range(len(samples))]

    def _chunk(
        self,
        chunk: Sequence[TrainingSample],
        intervention: Intervention,
        source: TargetSource,
        wait: bool,
    ) -> list[TeacherTarget]:
        given = [_given(sample, intervention, source) for sample in chunk]
        asked = [
            [s.query.id, s.query.text, s.portrait, text]
            for s, text in zip(chunk, given, strict=True)
        ]
        key = key_of([FORMAT, self.backbone.identity, asdict(intervention), source, asked])
        before = self.store.misses
        answers = None if source == "teacher" else given
        tensors = self.store.get_or_compute(
            key, lambda: self._compute(chunk, intervention, answers), wait
        )
        computed = len(chunk) if self.store.misses > before else 0
        self.hits += len(chunk) - computed
        self.misses += computed
        lengths = tensors["lengths"].tolist()
        responses = tensors["response"].split(lengths)
        hidden = tensors["hidden"].split(lengths)
        return [TeacherTarget(r.tolist(), h) for r, h in zip(responses, hidden, strict=True)]

    @torch.no_grad()
    def _compute(
        self,
        chunk: Sequence[TrainingSample],
        intervention: Intervention,
        given: Sequence[str] | None,
    ) -> dict[str, Tensor]:
        """What the store keeps of a chunk; the responses are the teacher's own if none is given."""
        backbone = self.backbone
        seen = intervene(backbone, [sample.query for sample in chunk], intervention)
        rooms = [response_room(backbone, sample) for sample in chunk]
        prompts = [encode(backbone, [q], room)[0] for q, room in zip(seen, rooms, strict=True)]
        if given is None:
            end = backbone.processor.tokenizer.eos_token_id
            responses = [
                # A response that was cut did not end, and the student is not to learn that it did.
                [*tokens, end] if len(tokens) < MAX_NEW_TOKENS else tokens
                for tokens in greedy_tokens(backbone, prompts, batch_size=len(prompts))
            ]
        else:
            responses = [response_ids(backbone, text) for text in given]
        # Equation 2: pi_T at the response's positions is softmax(lm_head(hidden)).
        hidden = response_hidden(backbone, prompts, responses)
        return {
            "lengths": torch.tensor([len(r) for r in responses], dtype=torch.int64),
            "response": torch.tensor([i for r in responses for i in r]),
            "hidden": hidden.cpu().contiguous(),
        }


def _given(sample: TrainingSample, intervention: Intervention, source: TargetSource) -> str:
    if source == "refusal":
        generator = sample_generator(intervention.seed, f"refusal/{sample.query.id}")
        return REFUSALS[int(generator.integers(len(REFUSALS)))]
    return sample.answer if source == "reference" else ""


def _chunks(samples: Sequence[TrainingSample]) -> list[list[int]]:
    """Indices of the samples, whole portraits together, in the order of their first questions."""
    portraits: dict[str, list[int]] = {}
    for n, sample in enumerate(samples):
        portraits.setdefault(sample.portrait, []).append(n)
    chunks: list[list[int]] = []
    for portrait in portraits.values():
        if not chunks or len(chunks[-1]) >= CHUNK:
            chunks.append([])
        # Whole: parted over two chunks, the portrait's image would be run for each of them.
        chunks[-1] += portrait
    return chunks
