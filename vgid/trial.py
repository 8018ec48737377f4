"""A trial is a plain function from a config to a result; Ray, Optuna and MLflow are unknown here.

    result = run_trial(TrialConfig(beta=3.0), RequestConfig(data=..., store=...), Path("adapter"))

``TrialSession`` is what a process keeps between trials: the base model, the encoded data, the
teacher store, the examination.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from vgid.config import RequestConfig, TrialConfig
from vgid.data.benchmark import Benchmark
from vgid.data.splits import choose_people
from vgid.errors import InputError, LossNotFiniteError
from vgid.evaluation.evaluate import Evaluation, Scorer
from vgid.evaluation.rehearsal import missing_objectives, without_unfit
from vgid.files import write_atomically
from vgid.method.preparation import Preparation
from vgid.method.sharding import part_again, parted
from vgid.method.teacher import PLAIN, Intervention, TeacherStore
from vgid.method.workers import Workers
from vgid.models import adapters as adapter
from vgid.models.backbones import load
from vgid.models.store import ContentStore
from vgid.requirement import Requirement, unknown
from vgid.results import EpochReport, Harvested, QuestionPart, Score, TrialResult, rungs

# By how much an adapter is below the base, and in which score.
GONE = "forget_rougeL_reduction"
DIFFERENCES = {GONE: "forget_rougeL", "retain_rougeL_drop": "retain_rougeL"}
RISE = "forget_rougeL_rise"  # by how much the reverse prompt raises forget ROUGE-L
OnEpoch = Callable[[EpochReport], bool]  # called after each epoch; False stops the trial early


class TrialSession:
    """A process ready to run trials of one forget request, one after the other.

    A trial in a used session gives bit for bit what it gives in a fresh one: adapter, optimizer
    and generators are made anew, and what is kept depends on the request only. Several workers of a
    trial, each of a ``rank``, need torch's process group.

    Raises:
        InputError: unknown backbone, weights not found, or data that cannot be read.
    """

    def __init__(self, request: RequestConfig, rank: int = 0, world_size: int = 1) -> None:
        started = time.perf_counter()
        self.request = request
        self.workers = workers = Workers(rank, world_size)
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
        self.store = TeacherStore(ContentStore(request.store, "teachers", limit), self.backbone)
        self.preparation = Preparation(
            self.backbone, self.benchmark, self.people, request, self.store, workers
        )
        self.scorer = Scorer(self.backbone, self.benchmark.sha256, self.people, request, workers)
        self._unreported_load = time.perf_counter() - started

    @property
    def provenance(self) -> dict[str, str]:
        """What every result names: data hash and base revision."""
        return {"data_sha256": self.benchmark.sha256, "base_revision": self.backbone.revision}

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

        A loss that is not finite gives status ``failed``, never an exception, and an ``on_epoch``
        that is False ``pruned``. ``adapter_dir`` appears whole or not at all. After each epoch a
        state is saved to ``checkpoint_dir``, and one of this very trial is continued from. Without
        ``evaluate`` the search questions are left out; the adapter is the same.

        Raises:
            InputError: data that cannot be trained on or holds no objective, or a missing layer.
        """
        self.benchmark.refuse(missing_objectives(self.people, self.request))
        before = self._store_use({})
        seconds = {"load": self._unreported_load}
        self._unreported_load = 0.0  # the session's own start is the first trial's
        ended = partial(TrialResult, trial_id=trial_id, seconds=seconds)
        # First: who cannot score the base, for want of memory, is to hear it before the training.
        with _timed(seconds, "load"):
            base = self.base_scores("search") if evaluate else {}
        required = self._required(base) if evaluate else []
        with _timed(seconds, "teacher"):
            epochs, retained = self.preparation.training(trial, trial_id, checkpoint_dir)
        with adapter.attached(self.backbone, trial) as model:
            try:
                with _timed(seconds, "train"), parted(self.backbone, trial, self.workers):
                    reports = self._at_rungs(epochs(model), model, trial, base)
                    metrics, whole = self._trained(reports, on_epoch)
            except LossNotFiniteError as error:
                return ended(status="failed", error=str(error))
            if not whole:
                return ended(status="pruned", metrics=metrics, store=self._store_use(before))
            with adapter.scaled(model, trial.adapter_scale):
                with _timed(seconds, "evaluate"):
                    scored = self.scorer.evaluate("search", self.request.seed) if evaluate else None
                if self.workers.rank == 0:
                    with _timed(seconds, "save"):
                        adapter.save(model, adapter_dir)
                        _save_responses(scored, adapter_dir)
            with _timed(seconds, "evaluate"):
                harvest = () if scored is None else self._harvest(model, trial, base, required)
            if self.workers.rank != 0:
                return ended(status="completed")
        seen = {s.person_id for s in retained} & {p.id for p in self.people.retain_seen}
        trained = ended(
            status="completed",
            metrics={**metrics, "retain_seen_shown": len(seen)},
            store=self._store_use(before),
            adapter=adapter_dir,
        )
        return trained if scored is None else _with_scores(trained, base, scored, required, harvest)

    def _required(self, base: Mapping[str, Score]) -> list[Requirement]:
        """The request's bounds; ``InputError`` for a bound or objective that is never scored."""
        scored = {*base, GONE}
        for name in self.request.objectives:
            if name not in scored:
                known = ", ".join(sorted(scored))
                raise InputError(f"--objectives: no score is called {name}; there are {known}.")
        required = [Requirement.read(text) for text in self.request.require]
        if (problem := unknown(required, scored, base)) is not None:
            raise InputError(f"--require: {problem}")
        return required

    def _trained(
        self, reports: Iterable[EpochReport], on_epoch: OnEpoch | None
    ) -> tuple[dict[str, float], bool]:
        """Train, epoch by epoch: the last one's metrics, and whether there was no stop before."""
        metrics: dict[str, float] = {}
        for report in reports:
            metrics = report.metrics
            if not self._goes_on(on_epoch, report):
                return metrics, False
        return metrics, True

    def _at_rungs(
        self,
        reports: Iterable[EpochReport],
        model: Any,
        trial: TrialConfig,
        base: Mapping[str, Score],
    ) -> Iterator[EpochReport]:
        """The same reports, with the objectives where the study compares its trials by them."""
        # Told again from a checkpoint, an epoch before its last has a later one's scores here. But
        # that one was compared before the training went on, and what was told first counts.
        for report in reports:
            if not base or report.epoch not in rungs(self.request.halving, report.epochs):
                yield report
                continue
            only = frozenset(["forget_rougeL", *self.request.objectives])
            with adapter.scaled(model, trial.adapter_scale):
                scored = self.scorer.evaluate("search", self.request.seed, only=only)
            part_again(self.backbone)
            found, _ = _measured(base, scored, ())
            objectives = {name: found[name] for name in self.request.objectives}
            yield report.model_copy(update={"metrics": report.metrics | objectives})

    def _harvest(
        self,
        model: Any,
        trial: TrialConfig,
        base: Mapping[str, Score],
        required: Sequence[Requirement],
    ) -> tuple[Harvested, ...]:
        """The trained adapter at the request's scales, scored by what decides over a front."""
        # An adapter is a point, its scales are a curve, and one of its points costs a fifteenth of
        # a trial: two trials' curves reach as far as eight trials (tests/benchmarks/README.md).
        asked = (*self.request.objectives, *(each.metric for each in required))
        only = frozenset(["forget_rougeL", "retain_rougeL", "test_rougeL", *asked])
        found = []
        for scale in self.request.harvest:
            with adapter.scaled(model, trial.adapter_scale * scale):
                scored = self.scorer.evaluate("search", self.request.seed, only=only)
            metrics, missed = _measured(base, scored, required)
            found.append(
                Harvested(scale=scale, scores=scored.scores, metrics=metrics, missed=missed)
            )
        return tuple(found)

    def base_scores(self, part: QuestionPart, seed: int | None = None) -> dict[str, Score]:
        """Scores of the base itself, see ``scores_under``."""
        return self.scores_under(part, seed)

    def rescore(
        self, adapter_dir: Path, part: QuestionPart = "held_out", seed: int | None = None
    ) -> dict[str, Score]:
        """Scores of a saved adapter, and ``DIFFERENCES`` from the base's on the same questions.

        Arguments as for ``scores_under``.
        """
        base = self.scorer.kept(part, seed)
        own = self.scorer.kept(part, seed, adapter_dir=adapter_dir)
        found = {
            name: self.scorer.difference(score, (base, own), part, seed)
            for name, score in DIFFERENCES.items()
            if score in own.scores
        }
        return {**own.scores, **found}

    def rescore_attacked(
        self, adapter_dir: Path | None, part: QuestionPart = "held_out", seed: int | None = None
    ) -> dict[str, Score]:
        """Scores under the reverse prompt, and ``RISE``; arguments as for ``scores_under``."""
        plain = self.scorer.kept(part, seed, adapter_dir=adapter_dir)
        attacked = self.scorer.kept(part, seed, reverse=True, adapter_dir=adapter_dir)
        found = dict(attacked.scores)
        if "forget_rougeL" in found:
            found[RISE] = self.scorer.difference("forget_rougeL", (attacked, plain), part, seed)
        return found

    def scores_under(
        self,
        part: QuestionPart,
        seed: int | None = None,
        intervention: Intervention | None = None,
        reverse: bool = False,
        adapter_dir: Path | None = None,
    ) -> dict[str, Score]:
        """Scores of the base or an adapter, under what is done to images, questions and prompt.

        The paper's Tables 1 and 2 are the base under an intervention, its Table 6 anything under
        the ``reverse`` prompt. Computed once per store and shared by all processes. The seed is of
        few-shot people, test poses and bootstrap; by default the trials' for the search part, and
        another for the held-out part.

        Raises:
            InputError: the adapter folder lacks a file.
        """
        return self.scorer.kept(part, seed, intervention or PLAIN, reverse, adapter_dir).scores

    def _store_use(self, before: Mapping[str, int]) -> dict[str, int]:
        kinds = {"teacher": self.store, "vision": self.backbone.vision}
        use: dict[str, int] = {
            f"{kind}_{what}": getattr(counted, what)
            for kind, counted in kinds.items()
            for what in ("hits", "misses")
        }
        return {name: count - before.get(name, 0) for name, count in use.items()}

    def _goes_on(self, on_epoch: OnEpoch | None, report: EpochReport) -> bool:
        """Rank 0's answer of ``on_epoch``, known to all ranks so that they stop together."""
        # Only rank 0 asks, since a scheduler decides once; the others wait for its word, for a rank
        # that trained on alone would hang in the next exchange of gradients.
        return self.workers.first(on_epoch is None or self.workers.rank != 0 or on_epoch(report))


def run_trial(
    trial: TrialConfig, request: RequestConfig, adapter_dir: Path, trial_id: str = "trial"
) -> TrialResult:
    """Run one trial in this process, see ``TrialSession.run``."""
    return TrialSession(request).run(trial, trial_id, adapter_dir)


def _measured(
    base: Mapping[str, Score], evaluation: Evaluation, required: Iterable[Requirement]
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores as plain numbers, with what the base had more, and by how much they miss bounds."""
    metrics = {name: score.value for name, score in evaluation.scores.items()}
    # Section 4.3: the x axis of Figure 4, whose y axis is retain ROUGE-L. A study searches this
    # plane.
    before = {name: score.value for name, score in base.items()}
    metrics[GONE] = before["forget_rougeL"] - metrics["forget_rougeL"]
    return metrics, {str(each): each.missed_by(metrics, before) for each in required}


def _with_scores(
    trained: TrialResult,
    base: Mapping[str, Score],
    evaluation: Evaluation,
    required: Iterable[Requirement],
    harvest: tuple[Harvested, ...],
) -> TrialResult:
    """A trained trial's result with its scores, and what was harvested of it."""
    metrics, missed = _measured(base, evaluation, required)
    return trained.model_copy(
        update={
            "scores": evaluation.scores,
            "metrics": {**metrics, **trained.metrics},
            "missed": missed,
            "harvest": harvest,
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
    path = adapter_dir.with_name(f"{adapter_dir.name}.responses.jsonl")
    write_atomically(path, lines.encode())
