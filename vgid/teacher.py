"""The teacher pi_T (equation 2) and the store that computes it once per study.

The retain teacher depends on no searched hyperparameter, and the forget teacher only on the
intervention and the response source. So the base model's last hidden states at the response
positions are kept as safetensors, in chunks of samples, and turned back into exact logits by the
frozen ``lm_head``. A chunk's file name is the hash of all that it depends on: base revision,
dtype, prompt frame, every sample's text and image, intervention, noise seed, response source.

Trials, workers and nodes share a store. A file lock lets one process compute a chunk while the
others wait for it; the chunk appears by a rename, so a killed writer leaves no torn file, and two
writers that cannot see each other's lock write the same bytes.

Shape legend: R response tokens of a sample, D hidden width.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgid.backbones import Backbone
from vgid.decoding import MAX_NEW_TOKENS, greedy_tokens
from vgid.encoding import Batch, Query, at_model_resolution, collate, encode, response_ids
from vgid.interventions import NoiseType, perturb, sample_generator
from vgid.prompts import PromptStyle, with_instruction
from vgid.splits import TrainingSample

FORMAT = 1
CHUNK = 64


@dataclass(frozen=True)
class Intervention:
    """What the teacher is shown in place of (v_f, t_f): P_phi(v_f) and t_ic ⊕ t_f, equation 2.

    With neither a noise type nor a style it is the frozen base itself, the teacher of equation 4.

    Attributes:
        noise_type: perturbation of the image, None to show it as it is.
        sigma: of Gaussian noise.
        style: unlearning instruction, None for none.
        seed: of the noise.
    """

    noise_type: NoiseType | None = None
    sigma: float | None = None
    style: PromptStyle | None = None
    seed: int = 0


def intervene(backbone: Backbone, query: Query, intervention: Intervention) -> Query:
    """The query as the teacher sees it: v' = P_phi(v), t' = t_ic ⊕ t (equation 2)."""
    image = query.image
    if image is not None and intervention.noise_type is not None:
        pixels = perturb(
            at_model_resolution(backbone.processor, image),
            intervention.noise_type,
            intervention.sigma,
            sample_generator(intervention.seed, query.id),
        )
        image = Image.fromarray(pixels)
    return replace(query, text=with_instruction(query.text, intervention.style), image=image)


def response_hidden(backbone: Backbone, batch: Batch) -> Tensor:
    """Last hidden states (after the final norm) at the positions that predict a response token.

    Shape (R of the whole batch, D); ``lm_head`` of them are the logits of the response tokens.
    """
    hidden_BLD = backbone.model.model(**batch.inputs, use_cache=False).last_hidden_state
    return hidden_BLD[:, :-1][batch.predicts_BL]


@dataclass(frozen=True)
class TeacherTarget:
    """What the student learns for one sample.

    Attributes:
        response: token ids y, end-of-sequence included, length R.
        hidden_RD: the teacher's last hidden states that predict them.
    """

    response: list[int]
    hidden_RD: Tensor


class TeacherStore:
    """Teacher targets on disk, shared by all trials and processes of a study.

    Args:
        root: folder of the store; created.
        backbone: the frozen base, with no adapter attached while the store computes.
        rank: of this worker; ranks begin at different chunks so that they share the filling.
    """

    def __init__(self, root: Path, backbone: Backbone, rank: int = 0) -> None:
        self.root = root
        self.backbone = backbone
        self.rank = rank
        self.hits = 0
        self.misses = 0
        root.mkdir(parents=True, exist_ok=True)

    def targets(
        self,
        samples: Sequence[TrainingSample],
        intervention: Intervention,
        source: Literal["teacher", "reference"],
    ) -> list[TeacherTarget]:
        """The targets of ``samples``, computed where the store does not hold them yet.

        Args:
            samples: training samples, in a fixed order (chunks are cut from it).
            intervention: how the teacher sees them.
            source: response tokens are the ``teacher``'s own greedy answer under the
                intervention, or the ``reference`` answer of the data.
        """
        chunks = [samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK)]
        paths = [self._path(chunk, intervention, source) for chunk in chunks]
        for k in range(len(chunks)):
            i = (k + self.rank) % len(chunks)
            self._ensure(paths[i], chunks[i], intervention, source)
        return [target for path in paths for target in _read(path)]

    def _path(
        self, chunk: Sequence[TrainingSample], intervention: Intervention, source: str
    ) -> Path:
        spec = self.backbone.spec
        described = [
            FORMAT,
            self.backbone.revision,
            str(self.backbone.model.dtype),
            [spec.frame.image, spec.frame.text, spec.frame.separator],
            [intervention.noise_type, intervention.sigma, intervention.style, intervention.seed],
            source,
            [
                [s.query.id, s.query.text, _digest(s.query.image), s.answer]
                if source == "reference"
                else [s.query.id, s.query.text, _digest(s.query.image)]
                for s in chunk
            ],
        ]
        key = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        return self.root / f"{key}.safetensors"

    def _ensure(
        self,
        path: Path,
        chunk: Sequence[TrainingSample],
        intervention: Intervention,
        source: str,
    ) -> None:
        if path.exists():
            self.hits += 1
            return
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                self.hits += 1
                return
            self.misses += 1
            targets = self._compute(chunk, intervention, source)
            lengths = torch.tensor([len(t.response) for t in targets], dtype=torch.int64)
            tensors = {
                "lengths": lengths,
                "response": torch.tensor([i for t in targets for i in t.response]),
                "hidden": torch.cat([t.hidden_RD for t in targets]).cpu().contiguous(),
            }
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file(tensors, temporary)
            temporary.replace(path)

    @torch.no_grad()
    def _compute(
        self, chunk: Sequence[TrainingSample], intervention: Intervention, source: str
    ) -> list[TeacherTarget]:
        backbone = self.backbone
        encoded = encode(backbone, [intervene(backbone, s.query, intervention) for s in chunk])
        if source == "reference":
            responses = [response_ids(backbone, s.answer) for s in chunk]
        else:
            end = backbone.processor.tokenizer.eos_token_id
            responses = [
                [*tokens, end] if len(tokens) < MAX_NEW_TOKENS else tokens
                for tokens in greedy_tokens(backbone, encoded, batch_size=CHUNK)
            ]
        hidden = response_hidden(backbone, collate(backbone, encoded, responses))
        pieces = hidden.split([len(r) for r in responses])
        return [TeacherTarget(r, h) for r, h in zip(responses, pieces, strict=True)]


def _read(path: Path) -> list[TeacherTarget]:
    tensors = load_file(path)
    lengths = tensors["lengths"].tolist()
    responses = tensors["response"].split(lengths)
    hidden = tensors["hidden"].split(lengths)
    return [TeacherTarget(r.tolist(), h) for r, h in zip(responses, hidden, strict=True)]


def _digest(image: Image.Image | None) -> str | None:
    if image is None:
        return None
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
