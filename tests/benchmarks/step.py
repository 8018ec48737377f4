"""Our optimizer step against the public script's: ``python -m tests.benchmarks.step [--json]``.

Both train on the same questions with the same reference answers and the same LoRA (rank 16, dropout
0.05). The script's (``released_step``) runs a second model in every step; ours (``vgid.distill``,
one epoch of one step a call) takes teacher targets and image features out of a filled store.

On ``tiny-llava`` a step is the first batch of a trial on its own benchmark, 12 forget and 12 retain
questions; on ``100m`` it is a portrait with 7 questions of each set.

Filling the store for the questions of a step is timed in the same rounds, and its share is not
hidden: ``with_teacher`` adds a quarter of it to each of our steps, as if a trial of 4 epochs had to
fill the store for itself. A study fills it once for all trials, with each retain person.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tests.benchmarks.machine import (
    Seconds,
    arguments,
    headline,
    in_turns,
    median_interval,
    models,
    one_thread,
    ratio_fields,
    report,
)
from tests.benchmarks.random_llava import portrait_questions, random_llava
from tests.benchmarks.released_step import LORA_DROPOUT, LORA_RANK, ReleasedStep
from vgid.config import RequestConfig, ResponseSource, TrialConfig
from vgid.data.benchmark import Benchmark
from vgid.data.splits import choose_people
from vgid.data.synthetic import write_benchmark
from vgid.method.distillation import DistillationSet, distill, epoch_batches, retain_batches
from vgid.method.samples import TrainingSample, training_samples
from vgid.method.teacher import Intervention, TeacherStore
from vgid.models import adapters as adapter
from vgid.models.backbones import Backbone, load
from vgid.models.encoding import encode
from vgid.models.store import ContentStore
from vgid.models.vision import Vision

TARGET = 8.0
TEACHER_EPOCHS = 4
QUESTIONS_EACH = 7
Sets = tuple[DistillationSet, DistillationSet]


@dataclass(frozen=True)
class Workload:
    """A model, and the questions of one step.

    Attributes:
        backbone: the base without an adapter.
        forget: questions of the forget set.
        retain: questions of the retain set.
    """

    backbone: Backbone
    forget: list[TrainingSample] = field(repr=False)
    retain: list[TrainingSample] = field(repr=False)

    @property
    def questions(self) -> int:
        """Of both sets."""
        return len(self.forget) + len(self.retain)

    @property
    def trial(self) -> TrialConfig:
        """A step of the whole workload an epoch, with the public script's LoRA."""
        return TrialConfig(
            batch_size=len(self.forget),
            retain_batch_size=len(self.retain),
            epochs=1000,  # more than anyone takes
            lora_rank=LORA_RANK,
            lora_dropout=LORA_DROPOUT,
            learning_rate=5e-4,
            warmup_fraction=0.0,
        )

    def copy(self) -> "Workload":
        """The same with weights of its own, which another adapter does not touch."""
        model = copy.deepcopy(self.backbone.model)
        return replace(self, backbone=replace(self.backbone, model=model))


def tiny_workload(name: str = "tiny-llava", batch_size: int = 12) -> Workload:
    """The first batch of a trial of an embedded backbone on its own benchmark."""
    backbone = load(name, device="cpu")
    trial = TrialConfig(batch_size=batch_size, retain_batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_benchmark(root / "data")
        request = RequestConfig(backbone=name, data=root / "data", store=root / "store")
        benchmark = Benchmark.open(request.data)
        people = choose_people(benchmark, request)
        forget, retain = (
            training_samples(benchmark, members, trial, True, request.seed)
            for members in (people.forget, people.retain_pool)
        )
    first = epoch_batches(_prompts(backbone, forget), trial, epoch=0)[0]
    beside = next(retain_batches(_prompts(backbone, retain), trial))
    return Workload(backbone, [forget[i] for i in first], [retain[i] for i in beside])


def large_workload(
    questions_each: int = QUESTIONS_EACH, size: int = 336, portraits_each: int = 1, **sizes: int
) -> Workload:
    """Portraits to forget and as many to retain, on a LLaVA of random weights.

    Args:
        questions_each: of a portrait.
        size: pixels a side.
        portraits_each: of either set.
        sizes: of ``random_llava``.
    """
    samples = portrait_questions(2 * portraits_each, questions_each, size)
    half = len(samples) // 2
    return Workload(random_llava(**sizes), samples[:half], samples[half:])


def workload(name: str) -> Workload:
    """The workload of a model of ``machine.MODELS``."""
    return tiny_workload() if name == "tiny-llava" else large_workload()


def _prompts(backbone: Backbone, samples: list[TrainingSample]) -> DistillationSet:
    """Prompts without targets: enough to draw batches from."""
    prompts = encode(backbone, [sample.query for sample in samples])
    return DistillationSet(prompts, [], [sample.task for sample in samples])


def fill(work: Workload, folder: Path, source: ResponseSource = "reference") -> Sets:
    """All that is computed once a study for the questions of a step, into an empty store.

    Processed images, teacher targets of both sets, and the features of the images that the student
    sees.

    Args:
        work: whose model has no adapter.
        folder: of the store.
        source: of the forget set's responses; the retain set's are the reference answers.

    Returns:
        The forget set and the retain set.
    """
    backbone, trial = work.backbone, work.trial
    backbone.vision = Vision(backbone.model, backbone.processor, backbone.revision)
    backbone.vision.store = ContentStore(folder, "vision")
    store = TeacherStore(ContentStore(folder, "teachers"), backbone)
    teacher = Intervention(trial.noise_type, trial.sigma, trial.prompt_style)
    each: tuple[Literal["teacher", "reference"], ...] = (
        ("teacher", "reference") if source == "mixed" else (source,)
    )
    targets = (
        [store.targets(work.forget, teacher, one) for one in each],
        [store.targets(work.retain, Intervention(), "reference")],
    )
    sets = tuple(
        replace(_prompts(backbone, samples), targets=found)
        for samples, found in zip((work.forget, work.retain), targets, strict=True)
    )
    for data in sets:
        for prompt in data.prompts:
            for picture in prompt.pictures:
                backbone.vision.features(picture)
    forget, retain = sets
    return forget, retain


@contextmanager
def our_steps(work: Workload, sets: Sets, **settings: Any) -> Iterator[Callable[[], object]]:
    """An adapter under training; yields the call that takes the next optimizer step.

    Args:
        work: its model carries the adapter inside the block.
        sets: from ``fill`` of the same workload.
        settings: of the trial, in place of the workload's own.
    """
    trial = work.trial.model_copy(update=settings)
    with adapter.attached(work.backbone, trial) as model:
        reports = distill(work.backbone, model, *sets, trial)
        yield lambda: next(reports)


def measure(work: Workload, rounds: int) -> dict[str, Any]:
    """Time both steps and the filling in turns.

    Args:
        work: the model is copied where one of the three changes it.
        rounds: timed turns.

    Returns:
        Ratios of questions per second, ours over the script's, and the seconds behind them.
    """
    script = ReleasedStep(work.copy().backbone)
    clean = work.copy()
    with tempfile.TemporaryDirectory() as folder:
        sets = fill(work, Path(folder))
        with our_steps(work, sets) as step:
            theirs, ours, filled, mixed = in_turns(
                lambda: script.step(work.forget, work.retain),
                step,
                lambda: _fill_anew(clean, "reference"),
                lambda: _fill_anew(clean, "mixed"),
                rounds=rounds,
            )
    cpu = median_interval([t.cpu / o.cpu for t, o in zip(theirs, ours, strict=True)])
    return {
        **ratio_fields([t.wall / o.wall for t, o in zip(theirs, ours, strict=True)], TARGET),
        "cpu_ratio": [cpu.median, cpu.low, cpu.high],
        "with_teacher": _with_teacher(theirs, ours, filled),
        "with_mixed_teacher": _with_teacher(theirs, ours, mixed),
        "questions": work.questions,
        "ours_questions_per_s": median_interval([work.questions / o.wall for o in ours]).median,
        "theirs_questions_per_s": median_interval([work.questions / t.wall for t in theirs]).median,
        "fill_s": median_interval([f.wall for f in filled]).median,
        "fill_mixed_s": median_interval([f.wall for f in mixed]).median,
    }


def _fill_anew(work: Workload, source: ResponseSource) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(work, Path(folder), source)


def _with_teacher(
    theirs: tuple[Seconds, ...], ours: tuple[Seconds, ...], filled: tuple[Seconds, ...]
) -> list[float]:
    """Median and interval of the ratio with the filling spread over ``TEACHER_EPOCHS`` steps."""
    found = median_interval(
        [
            t.wall / (o.wall + f.wall / TEACHER_EPOCHS)
            for t, o, f in zip(theirs, ours, filled, strict=True)
        ]
    )
    return [found.median, found.low, found.high]


def main() -> None:
    """Measure and print; exit code 0 also where a target is missed."""
    options = arguments(__doc__).parse_args()
    one_thread()
    found = {name: measure(workload(name), options.rounds) for name in models(options.on)}
    report(headline("step", found), options.json)


if __name__ == "__main__":
    main()
