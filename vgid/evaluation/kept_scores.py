"""Scores of one request's base and adapters, computed once and shared by all processes."""

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from vgid.config import RequestConfig
from vgid.data.splits import People
from vgid.evaluation.evaluate import Evaluation, evaluate
from vgid.evaluation.metrics import bootstrap_difference
from vgid.evaluation.questions import Examination, prepare
from vgid.files import write_atomically
from vgid.method.teacher import PLAIN, Intervention
from vgid.models import adapters as adapter
from vgid.models.backbones import Backbone
from vgid.models.store import key_of
from vgid.results import KeptScores, QuestionPart, Score
from vgid.seeds import held_out_seed

SCORES_FORMAT = 2
"""Part of the name of kept scores; raised when the same questions would give other scores."""


class Scorer:
    """Scores the base or an adapter of it; keeps the encoded questions in memory.

    Scores are kept in the request's store, shared by all processes, by the benchmark's SHA-256.
    """

    def __init__(
        self, backbone: Backbone, data_sha256: str, people: People, request: RequestConfig
    ) -> None:
        self.backbone, self.people, self.request = backbone, people, request
        self.data_sha256 = data_sha256
        self._examinations: dict[tuple[str, int, Intervention, bool], Examination] = {}

    def kept(
        self,
        part: QuestionPart,
        seed: int | None = None,
        intervention: Intervention = PLAIN,
        reverse: bool = False,
        adapter_dir: Path | None = None,
    ) -> KeptScores:
        """Scores of the base, or of the PEFT adapter in a folder, computed once for all processes.

        ``seed`` is of few-shot people, test poses and bootstrap: by default the request's, and for
        held-out questions another. ``reverse`` appends the reverse-engineering prompt.
        """
        seed = self._seed(part) if seed is None else seed
        kind, content = "base", None
        attached: AbstractContextManager[Any] = nullcontext()
        if adapter_dir is not None:
            # By content, not by folder: an adapter that was copied or picked has its scores
            # already, and a folder that was written anew does not.
            kind, content = "adapter", adapter.sha256(adapter_dir)
            attached = adapter.loaded(self.backbone, adapter_dir)
        asked = [part, seed, asdict(intervention), reverse, content]
        setting = [self.data_sha256, self.backbone.identity, self.request.identity]
        key = key_of([SCORES_FORMAT, kind, *asked, *setting])
        path = self.request.store / f"{kind}-{key}.json"
        with FileLock(path.with_suffix(".lock")):
            # None yet, or torn by a crash of the machine: made again.
            with suppress(OSError, ValueError):
                return KeptScores.model_validate_json(path.read_bytes())
            with attached:
                kept = self.evaluate(part, seed, intervention, reverse).kept
            write_atomically(path, kept.model_dump_json().encode())
            return kept

    def difference(
        self,
        score: str,
        first: KeptScores,
        second: KeptScores,
        part: QuestionPart,
        seed: int | None,
    ) -> Score:
        """A score of the first minus that of the second, people paired."""
        return bootstrap_difference(
            first.people[score],
            second.people[score],
            self.request.bootstrap_samples,
            self._seed(part) if seed is None else seed,
        )

    def _seed(self, part: QuestionPart) -> int:
        return held_out_seed(self.request.seed) if part == "held_out" else self.request.seed

    def evaluate(
        self,
        part: QuestionPart,
        seed: int,
        intervention: Intervention = PLAIN,
        reverse: bool = False,
    ) -> Evaluation:
        """Put the questions to the backbone as it stands, with the adapter that is attached."""
        key = (part, seed, intervention, reverse)
        examination = self._examinations.get(key)
        if examination is None:
            # General utility: nothing is chosen by it, and no attack is on it.
            celebrities = () if part == "search" or reverse else self.people.celebrities
            whom = (self.backbone, self.people, self.request, part, seed, celebrities)
            examination = prepare(*whom, intervention, reverse)
        # Perturbed images are as large as all others together, and seldom wanted twice.
        if intervention.noise_type is None:
            self._examinations[key] = examination
        return evaluate(self.backbone, examination, self.request)
