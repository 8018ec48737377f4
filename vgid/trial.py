"""A trial is a plain function from a config to a result.

    result = run_trial(TrialConfig(beta=3.0), RequestConfig(data=..., store=...), Path("adapter"))

``TrialSession`` is what a process keeps between trials: the base model, the encoded data, the
teacher store, the examination. Ray, Optuna and MLflow wrap it elsewhere and are unknown here.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from vgid.config import RequestConfig, TrialConfig, uses
from vgid.data.benchmark import Benchmark
from vgid.data.splits import choose_people, held_out_of_training
from vgid.errors import SettingError
from vgid.evaluation.evaluate import Evaluation, evaluate
from vgid.evaluation.metrics import bootstrap_difference
from vgid.evaluation.questions import Examination, prepare
from vgid.evaluation.rehearsal import missing_objectives, without_unfit
from vgid.files import write_atomically
from vgid.method.distillation import (
    DistillationSet,
    LossNotFiniteError,
    distill,
    retain_batches,
    steps_per_epoch,
)
from vgid.method.methods import make_method
from vgid.method.released import distill_released, retain_drawn
from vgid.method.samples import TrainingSample, training_samples
from vgid.method.teacher import Intervention, TeacherStore, response_room
from vgid.method.views import portrait_view
from vgid.models import adapters as adapter
from vgid.models.backbones import load
from vgid.models.encoding import Encoded, encode, response_ids
from vgid.models.store import ContentStore, key_of
from vgid.results import EpochReport, KeptScores, QuestionPart, Score, TrialResult
from vgid.seeds import held_out_seed

SCORES_FORMAT = 2
"""Part of the name of kept scores; raised when the same questions would give other scores."""


PLAIN = Intervention()
"""Questions as they are."""

DIFFERENCES = {"forget_rougeL_reduction": "forget_rougeL", "retain_rougeL_drop": "retain_rougeL"}
"""By how much an adapter is below the base, and in which score."""

RISE = "forget_rougeL_rise"
"""By how much the reverse prompt raises forget ROUGE-L."""

OnEpoch = Callable[[EpochReport], bool]
"""Called after each epoch; False stops the trial early."""


class TrialSession:
    """A process ready to run trials of one forget request, one after the other.

    A trial in a used session gives bit for bit what it gives in a fresh one: adapter, optimizer
    and generators are made anew, and what is kept depends on the request only.

    Args:
        request: the forget request.
        rank: of this process among the workers of a trial.
        world_size: workers of a trial; more than one needs torch's process group.

    Raises:
        InputError: unknown backbone, weights not found, or data that cannot be read.
    """

    def __init__(self, request: RequestConfig, rank: int = 0, world_size: int = 1) -> None:
        started = time.perf_counter()
        self.request = request
        self.rank = rank
        self.world_size = world_size
        self.benchmark = Benchmark.open(request.data, request.skip_defects)
        self.people = choose_people(self.benchmark, request)
        self.backbone = load(request.backbone, request.model_path)
        if request.skip_defects:
            self.benchmark = without_unfit(self.backbone, self.benchmark, request)
            self.people = choose_people(self.benchmark, request)
        if request.deployed_adapter is not None:
            adapter.merge(self.backbone, request.deployed_adapter)
        limit = int(request.store_limit_gb * 1e9)
        self.backbone.vision.store = ContentStore(request.store, "vision", limit)
        self.store = TeacherStore(
            ContentStore(request.store, "teachers", limit), self.backbone, rank
        )
        self._training: dict[tuple[Any, ...], list[TrainingSample]] = {}
        self._encoded: dict[tuple[str, int], Encoded] = {}
        self._examinations: dict[tuple[str, int, Intervention, bool], Examination] = {}
        self.phases = {"load": time.perf_counter() - started}
        self._unreported_load = self.phases["load"]

    @cached_property
    def provenance(self) -> dict[str, str]:
        """What every result names: data hash and base revision."""
        return {
            "data_sha256": self.benchmark.sha256,
            "base_revision": self.backbone.revision,
        }

    @property
    def precision(self) -> str:
        """Dtype of the base's weights: ``float32`` on a CPU, ``bfloat16`` on a GPU."""
        return str(self.backbone.model.dtype).removeprefix("torch.")

    def run(
        self,
        trial: TrialConfig,
        trial_id: str,
        adapter_dir: Path,
        on_epoch: OnEpoch | None = None,
        checkpoint_dir: Path | None = None,
        evaluate: bool = True,
    ) -> TrialResult:
        """Run one trial: teacher, training, evaluation on the search questions, adapter.

        Args:
            trial: the hyperparameters.
            trial_id: names the trial in its result and checkpoint.
            adapter_dir: where the PEFT adapter goes; appears whole or not at all.
            on_epoch: told of each epoch; returns False to stop early (status ``pruned``).
            checkpoint_dir: the state is saved there after each epoch, and a state of this very
                trial found there is continued from.
            evaluate: False leaves the search questions out where nobody asks for their scores;
                the adapter is the same.

        Returns:
            The result. A loss that is not finite gives status ``failed``, never an exception.

        Raises:
            InputError: data that cannot be trained on or holds no objective, or a layer that the
                backbone lacks.
        """
        self.benchmark.refuse(missing_objectives(self.people, self.request))
        before = self._store_use
        seconds = {"load": self._unreported_load}
        self._unreported_load = 0.0
        with _timed(seconds, "load"):
            base = self.base_scores("search") if evaluate else None
        with _timed(seconds, "teacher"):
            epochs, retained = self._prepare_training(trial, trial_id, checkpoint_dir)
        last: EpochReport | None = None
        ended = partial(TrialResult, trial_id=trial_id, seconds=seconds)
        with adapter.attached(self.backbone, trial) as model:
            try:
                with _timed(seconds, "train"):
                    for last in epochs(model):
                        if not self._goes_on(on_epoch, last):
                            used = self._store_use_since(before)
                            return ended(status="pruned", metrics=last.metrics, store=used)
            except LossNotFiniteError as error:
                return ended(status="failed", error=str(error))
            if self.rank != 0:
                return ended(status="completed")
            with _timed(seconds, "evaluate"):
                evaluation = self._evaluate("search", self.request.seed) if evaluate else None
            with _timed(seconds, "save"):
                adapter.save(model, adapter_dir)
                _save_responses(evaluation, adapter_dir)
        shown = {sample.person_id for sample in retained}
        seen = sum(person.id in shown for person in self.people.retain_seen)
        trained = ended(
            status="completed",
            metrics={**(last.metrics if last else {}), "retain_seen_shown": seen},
            store=self._store_use_since(before),
            adapter=adapter_dir,
        )
        if base is None or evaluation is None:
            return trained
        return _with_scores(trained, base, evaluation)

    def base_scores(self, part: QuestionPart, seed: int | None = None) -> dict[str, Score]:
        """Scores of the base itself, computed once per store and shared by all processes."""
        return self.scores_under(part, seed)

    def rescore(
        self, adapter_dir: Path, part: QuestionPart = "held_out", seed: int | None = None
    ) -> dict[str, Score]:
        """Scores of a saved adapter, and ``DIFFERENCES`` from the base's on the same questions.

        Args:
            adapter_dir: PEFT adapter folder.
            part: which questions.
            seed: few-shot people, test poses and bootstrap; by default another than the trials'.
        """
        base, own = self._kept(part, seed), self._kept(part, seed, adapter_dir=adapter_dir)
        found = {
            name: self._difference(score, base, own, part, seed)
            for name, score in DIFFERENCES.items()
            if score in own.scores
        }
        return {**own.scores, **found}

    def rescore_attacked(
        self, adapter_dir: Path | None, part: QuestionPart = "held_out", seed: int | None = None
    ) -> dict[str, Score]:
        """Scores under the reverse prompt, and ``RISE``: by how much it raises forget ROUGE-L.

        Args:
            adapter_dir: PEFT adapter folder, None for the base.
            part: which questions.
            seed: as for ``rescore``.
        """
        plain, attacked = (
            self._kept(part, seed, reverse=reverse, adapter_dir=adapter_dir)
            for reverse in (False, True)
        )
        found = dict(attacked.scores)
        if "forget_rougeL" in found:
            found[RISE] = self._difference("forget_rougeL", attacked, plain, part, seed)
        return found

    def scores_under(
        self,
        part: QuestionPart,
        seed: int | None = None,
        intervention: Intervention | None = None,
        reverse: bool = False,
        adapter_dir: Path | None = None,
    ) -> dict[str, Score]:
        """Scores of the base or of an adapter under what is done to the questions.

        The paper's Tables 1 and 2 are the base under an intervention, its Table 6 anything under
        the reverse prompt. Computed once per store and shared by all processes.

        Args:
            part: which questions.
            seed: few-shot people, test poses and bootstrap; by default the trials' for the search
                part, and another for the held-out part.
            intervention: perturbation of the images and unlearning instruction before the
                questions; None for neither.
            reverse: append the reverse-engineering prompt (paper Appendix A.3.7).
            adapter_dir: PEFT adapter folder, None for the base.

        Raises:
            InputError: the adapter folder lacks a file.
        """
        return self._kept(part, seed, intervention, reverse, adapter_dir).scores

    def _kept(
        self,
        part: QuestionPart,
        seed: int | None = None,
        intervention: Intervention | None = None,
        reverse: bool = False,
        adapter_dir: Path | None = None,
    ) -> KeptScores:
        seed = self._seed(part) if seed is None else seed
        intervention = intervention or PLAIN
        # By content, not by folder: an adapter that was copied or picked has its scores already,
        # and a folder that was written anew does not.
        adapter_sha256 = None if adapter_dir is None else adapter.sha256(adapter_dir)
        described = [part, seed, asdict(intervention), reverse, adapter_sha256]

        def compute() -> KeptScores:
            if adapter_dir is None:
                return self._evaluate(part, seed, intervention, reverse).kept
            with adapter.loaded(self.backbone, adapter_dir):
                return self._evaluate(part, seed, intervention, reverse).kept

        return self._shared("base" if adapter_dir is None else "adapter", described, compute)

    def _difference(
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

    @property
    def _store_use(self) -> dict[str, int]:
        teachers, vision = self.store, self.backbone.vision
        return {
            "teacher_hits": teachers.hits,
            "teacher_misses": teachers.misses,
            "vision_hits": vision.hits,
            "vision_misses": vision.misses,
        }

    def _store_use_since(self, before: Mapping[str, int]) -> dict[str, int]:
        return {name: count - before[name] for name, count in self._store_use.items()}

    def _goes_on(self, on_epoch: OnEpoch | None, report: EpochReport) -> bool:
        """Rank 0's answer of ``on_epoch``, known to all ranks so that they stop together."""
        # Only rank 0 asks, since a scheduler decides once; the others wait for its word, for a rank
        # that trained on alone would hang in the next exchange of gradients.
        goes_on = on_epoch is None or self.rank != 0 or on_epoch(report)
        if self.world_size > 1:
            import torch.distributed as dist

            answer = [goes_on]
            dist.broadcast_object_list(answer, src=0)
            goes_on = answer[0]
        return goes_on

    def _seed(self, part: QuestionPart) -> int:
        seed = self.request.seed
        return held_out_seed(seed) if part == "held_out" else seed

    def _evaluate(
        self,
        part: QuestionPart,
        seed: int,
        intervention: Intervention = PLAIN,
        reverse: bool = False,
    ) -> Evaluation:
        key = (part, seed, intervention, reverse)
        examination = self._examinations.get(key)
        if examination is None:
            examination = prepare(
                self.backbone,
                self.people,
                self.request,
                part,
                seed,
                # General utility: nothing is chosen by it, and no attack is on it.
                () if part == "search" or reverse else self.people.celebrities,
                intervention,
                reverse,
            )
        # Perturbed images are as large as all others together, and seldom wanted twice.
        if intervention.noise_type is None:
            self._examinations[key] = examination
        return evaluate(self.backbone, examination, self.request)

    def _prepare_training(
        self, trial: TrialConfig, trial_id: str, checkpoint: Path | None
    ) -> tuple[Callable[[Any], Iterator[EpochReport]], Iterator[TrainingSample]]:
        """Everything that training needs before the adapter is attached.

        Returns:
            The training of a student, and the retain samples that its steps draw.
        """
        forget = self._samples(trial, forget=True)
        retain = self._samples(trial, forget=False) if uses(trial.method, "beta") else []
        if trial.released:
            if self.world_size > 1:
                raise SettingError("released: the public script's variant runs in one worker only.")
            answered = [
                [
                    # The script's answers do not end.
                    (prompt, response_ids(self.backbone, sample.answer)[:-1])
                    for prompt, sample in zip(self._encode(samples), samples, strict=True)
                ]
                for samples in (forget, retain)
            ]
            drawn = retain_drawn(len(forget), len(retain), trial)
            return (
                lambda model: distill_released(
                    self.backbone, model, answered[0], answered[1], trial
                ),
                (retain[i] for i in drawn),
            )
        method = make_method(trial, self.backbone)
        forget_targets = [
            self.store.targets(forget, intervention, source)
            for intervention, source in method.forget_teachers(self.request.seed)
        ]
        forget_set = DistillationSet(
            self._encode(forget),
            forget_targets,
            [s.task for s in forget],
            method.paired,
            [self._encode(forget, view) for view in range(1, trial.views)],
        )
        retain_set = None
        retained: Iterator[TrainingSample] = iter(())
        if retain:
            seen = {person.id for person in self.people.retain_seen}
            retain_set = DistillationSet(
                self._encode(retain),
                [self.store.targets(retain, PLAIN, "reference")],
                [s.task for s in retain],
                first=[i for i, s in enumerate(retain) if s.person_id in seen],
            )
            batches = retain_batches(retain_set, trial)
            steps = trial.epochs * steps_per_epoch(forget_set, trial)
            retained = (retain[i] for batch in islice(batches, steps) for i in batch)

        def epochs(model: Any) -> Iterator[EpochReport]:
            return distill(
                self.backbone,
                model,
                forget_set,
                retain_set,
                trial,
                trial_id=trial_id,
                rank=self.rank,
                world_size=self.world_size,
                checkpoint=checkpoint,
            )

        return epochs, retained

    def _samples(self, trial: TrialConfig, forget: bool) -> list[TrainingSample]:
        key = (trial.train_tasks, trial.train_wording, forget)
        if key not in self._training:
            self._training[key] = training_samples(
                self.benchmark,
                self.people.forget if forget else self.people.retain_pool,
                trial,
                self.backbone.spec.option_scoring == "likelihood",
                self.request.seed,
                held_out_of_training(self.people, self.request),
            )
        return self._training[key]

    def _encode(self, samples: list[TrainingSample], view: int = 0) -> list[Encoded]:
        """The samples' prompts with a view of their portraits, see ``vgid.method.views``."""
        pictures: dict[str, Image.Image] = {}
        for sample in samples:
            query, portrait = sample.query, sample.portrait
            if (query.id, view) in self._encoded:
                continue
            if query.image is not None:
                if portrait not in pictures:
                    pictures[portrait] = portrait_view(query.image, view, self.request.seed)
                query = replace(query, image=pictures[portrait])
            room = response_room(self.backbone, sample)
            (self._encoded[query.id, view],) = encode(self.backbone, [query], room=room)
        return [self._encoded[sample.query.id, view] for sample in samples]

    def _shared(
        self, kind: str, what: Sequence[Any], compute: Callable[[], KeptScores]
    ) -> KeptScores:
        """Scores from the store, or computed under a lock and put there.

        Args:
            kind: the beginning of the file's name.
            what: plain data that, with the request, names the scores.
            compute: called if they are not there yet.
        """
        setting = [self.benchmark.sha256, self.backbone.identity, self.request.identity]
        key = key_of([SCORES_FORMAT, kind, *what, *setting])
        path = self.request.store / f"{kind}-{key}.json"
        with FileLock(path.with_suffix(".lock")):
            # None yet, or torn by a crash of the machine: made again.
            with suppress(OSError, ValueError):
                return KeptScores.model_validate_json(path.read_bytes())
            kept = compute()
            write_atomically(path, kept.model_dump_json().encode())
            return kept


def run_trial(
    trial: TrialConfig, request: RequestConfig, adapter_dir: Path, trial_id: str = "trial"
) -> TrialResult:
    """Run one trial in this process: config in, result out (see ``TrialSession.run``)."""
    return TrialSession(request).run(trial, trial_id, adapter_dir)


def _with_scores(
    trained: TrialResult, base: Mapping[str, Score], evaluation: Evaluation
) -> TrialResult:
    """A trained trial's result with its scores, and what the base had more of forget ROUGE-L."""
    scores = evaluation.scores
    # Section 4.3: the x axis of Figure 4, whose y axis is retain ROUGE-L. A study searches this
    # plane.
    gone = base["forget_rougeL"].value - scores["forget_rougeL"].value
    plain = {name: score.value for name, score in scores.items()}
    return trained.model_copy(
        update={
            "scores": scores,
            "metrics": {**plain, "forget_rougeL_reduction": gone, **trained.metrics},
            "few_shot": {str(task): ids for task, ids in evaluation.few_shot.items()},
            "option_scoring": evaluation.option_scoring,
        }
    )


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


def _save_responses(evaluation: Evaluation | None, adapter_dir: Path) -> None:
    """Beside the adapter, not in it: an adapter may be shipped, responses must not be."""
    if evaluation is None or evaluation.responses is None:
        return
    lines = "".join(json.dumps(response._asdict()) + "\n" for response in evaluation.responses)
    temporary = adapter_dir.with_name(f".{adapter_dir.name}.responses.tmp")
    temporary.write_text(lines)
    temporary.replace(adapter_dir.with_name(f"{adapter_dir.name}.responses.jsonl"))
