"""Makes the vanilla model that the benchmark presumes: one that knows all of its people.

Cross-entropy on the answers of ``ft_Data``, response tokens only, with the defaults of the
benchmark's own script (https://github.com/franciscoliu/MLLMU-Bench, finetune.py: LoRA, AdamW,
learning rate 2e-5, batches of 4, 5 epochs). As there, questions are shown as stored, without the
answer instructions of the evaluation. The loop is a trial's (``vgid.method.distillation``): what is
learnt are the reference answers, and nothing is retained.

What learns is the language model: LoRA on its linear maps, as the benchmark has it, or with
``full`` all of its weights, embeddings and ``lm_head`` included. Vision tower and projector stay
frozen in both, so that a portrait's features are the base's, computed once.

Everything random is a function of (seed, epoch), so a run that goes on from its checkpoint gives
the same weights bit for bit.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from torch import Tensor

from vgid.config import Config, FinetuneConfig, TrialConfig
from vgid.data.benchmark import Benchmark, decode_image
from vgid.data.layout import TRAINING_COLUMNS
from vgid.errors import InputError, LossNotFiniteError
from vgid.files import appearing
from vgid.method.checkpoint import checkpointed_trial
from vgid.method.distillation import DistillationSet, distill, steps_per_epoch
from vgid.method.methods import UnlearningMethod
from vgid.method.profile_prompts import step_bytes
from vgid.method.samples import TrainingSample, worded
from vgid.method.sharding import deal_out, gathered
from vgid.method.student import View
from vgid.method.teacher import TeacherTarget
from vgid.method.workers import ALONE, Workers, in_processes, whole
from vgid.models import adapters as adapter
from vgid.models.backbones import Backbone, copy_beside_weights, load, locate, outline, spec
from vgid.models.encoding import encode, response_ids
from vgid.models.memory import adapter_bytes, device_bytes
from vgid.models.weight_names import save_weights
from vgid.provenance import provenance
from vgid.results import EpochReport

PROVENANCE = "finetuned.json"  # beside the weights


class FinetuneResult(Config):
    """How a model was made; ``losses`` are means of an epoch's steps, in nats a response token."""

    output: Path
    losses: tuple[float, ...]
    steps: int
    samples: int
    base_revision: str
    data_sha256: str


def finetune(
    config: FinetuneConfig, *, resume: bool = False, progress: bool = False
) -> FinetuneResult:
    """Fine-tune a backbone on ``ft_Data`` and write it, whole or not at all, as a hub folder.

    A checkpoint is kept beside the output after each epoch, which a run of the same config goes on
    from with ``resume``; it is removed in the end.

    Raises:
        InputError: data or base that cannot be used, an output that is taken, a checkpoint that is
            in the way or of another run, or a loss that is not finite.
    """
    if config.output.is_file() or (config.output.is_dir() and any(config.output.iterdir())):
        raise InputError(f"{config.output}: is there already; name a new folder with --output.")
    checkpoint = config.output.with_name(f".{config.output.name}.checkpoint")
    if checkpoint.exists() and not resume:
        raise InputError(
            f"{checkpoint}: an earlier run left its checkpoint; go on with --resume, or remove it."
        )
    _tell_memory(config, progress)
    if config.workers == 1:
        return _finetune(config, checkpoint, progress)
    return in_processes(_finetune, config.workers, FinetuneResult, config, checkpoint, progress)


def _tell_memory(config: FinetuneConfig, progress: bool) -> None:
    """Say what memory a worker needs; ``InputError`` where its GPU has less, or there is none."""
    learning, step = memory_needed(config)
    told = (
        f"each of {config.workers} workers needs about {decimal(learning + step)} of memory, "
        f"{decimal(step)} of it for a step"
    )
    if torch.cuda.is_available():
        if config.workers > torch.cuda.device_count():
            raise InputError(f"finetune: there are {torch.cuda.device_count()} GPUs for --workers.")
        there = device_bytes(torch.device("cuda")) or 0
        if learning + step > there:
            raise InputError(
                f"finetune: {told}, and a GPU has {decimal(there)}; give more --workers"
                f"{' to --full' if config.full else ''}, or --gradient-checkpointing."
            )
    if progress:
        print(f"{told[0].upper()}{told[1:]}.", file=sys.stderr)


def memory_needed(config: FinetuneConfig) -> tuple[int, int]:
    """Bytes that each worker needs for weights and what they learn by, and for a step."""
    shape = outline(config.backbone, config.model_path)
    model, trial = shape.model, _trial(config)
    text = model.config.get_text_config()
    itemsize = torch.bfloat16.itemsize if torch.cuda.is_available() else torch.float32.itemsize
    count = sum(p.numel() for p in model.parameters())
    adapter = adapter_bytes(text, config.rank)
    step = step_bytes(shape, trial, config.workers) - adapter
    if not config.full:
        return itemsize * count + adapter, step
    # In fp32: weights, gradients, and AdamW's two moments, dealt out over the workers.
    learning = {p for part in _learning(model) for p in part.parameters()}
    learnt = sum(p.numel() for p in learning)
    return itemsize * (count - learnt) + 16 * learnt // config.workers, step


def _finetune(
    config: FinetuneConfig, checkpoint: Path, progress: bool, workers: Workers = ALONE
) -> FinetuneResult:
    benchmark = Benchmark.open(config.data)
    samples = read_samples(benchmark)
    backbone = load(config.backbone, config.model_path)
    # Neither where it is read and written nor how many share it changes what is learnt.
    settings = config.model_dump(exclude={"backbone", "model_path", "data", "output", "workers"})
    described = json.dumps([settings, backbone.revision, benchmark.sha256], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()
    dtype, weights = backbone.model.dtype, None
    with trainable(backbone, config, workers) as model:
        reports = teach(backbone, model, samples, config, key, checkpoint, progress, workers)
        if not config.full:
            model.merge_and_unload()
        elif workers.count > 1:
            weights = gathered(backbone.model, dtype, workers)
    result = FinetuneResult(
        output=config.output,
        losses=tuple(report.metrics["forget_loss"] for report in reports),
        steps=reports[-1].step,
        samples=len(samples),
        base_revision=backbone.revision,
        data_sha256=benchmark.sha256,
    )
    record = {"backbone": config.backbone, **settings, **result.model_dump(exclude={"output"})}
    if workers.rank == 0:
        # The hub's layout: weights and config anew, all other files as the base has them.
        with appearing(config.output) as temporary:
            save_weights(backbone.model, temporary, weights)
            base = locate(spec(config.backbone), config.model_path)
            copy_beside_weights(base, temporary, "config.json")
            told = json.dumps(record | provenance(), indent=2)
            (temporary / PROVENANCE).write_text(f"{told}\n")
        shutil.rmtree(checkpoint, ignore_errors=True)
    return result


def read_samples(benchmark: Benchmark) -> list[TrainingSample]:
    """Everyone's fine-tuning questions with the portraits of ``ft_Data``, in file order."""
    samples = []
    for row in benchmark.rows("ft_Data", TRAINING_COLUMNS):
        image = decode_image(next(iter(row.images.values())), f"the ft_Data image of {row.id}")
        samples += worded(row.pairs, image, "raw")
    return samples


def _trial(config: FinetuneConfig) -> TrialConfig:
    shared = config.model_dump(include=set(TrialConfig.model_fields))
    return TrialConfig.model_validate({**shared, "lora_rank": config.rank})


def _learning(model: Any) -> tuple[Any, ...]:
    """The modules that learn with ``full``."""
    return model.model.language_model, model.lm_head


@contextmanager
def trainable(
    backbone: Backbone, config: FinetuneConfig, workers: Workers = ALONE
) -> Iterator[Any]:
    """Make what is to learn require gradients; yields the ``PeftModel``, the model without one."""
    model = backbone.model
    if not config.full:  # the adapter is that of a trial
        with adapter.attached(backbone, _trial(config)) as student:
            yield student
        return
    dtype = model.dtype
    learning = _learning(model)
    if workers.count > 1:
        deal_out(backbone, workers)  # first: in fp32 a worker could not hold all of it
    for module in learning:
        module.float().requires_grad_(True)  # updates of 2e-5 would be lost in bf16 weights
    try:
        with adapter.checkpointed(model, config.gradient_checkpointing):
            yield model
    finally:
        for module in learning:
            module.to(dtype).requires_grad_(False)
        model.eval()


class Teaching(UnlearningMethod):
    """The reverse of unlearning: cross-entropy of the answers; ``on_step`` is told each.

    With ``full``, what learns computes in the precision of what is frozen.
    """

    def __init__(
        self,
        trial: TrialConfig,
        backbone: Backbone,
        full: bool = False,
        on_step: Callable[[Tensor], None] = lambda loss: None,
    ) -> None:
        super().__init__(trial, backbone)
        self.device = backbone.device.type
        self.dtype = next(p.dtype for p in backbone.model.parameters() if not p.requires_grad)
        self.mixed = full and self.dtype != torch.float32
        self.on_step = on_step

    def forget_loss(self, view: View) -> Tensor:
        """Mean over the response tokens, a scalar in nats (fp32)."""
        # A context a step: autocast keeps its bf16 copies of the weights until it is left.
        with torch.autocast(self.device, self.dtype, enabled=self.mixed):
            loss = view.cross_entropy()
        self.on_step(loss.detach())
        return loss


def teach(
    backbone: Backbone,
    model: Any,
    samples: Sequence[TrainingSample],
    config: FinetuneConfig,
    key: str,
    checkpoint: Path,
    progress: bool = False,
    workers: Workers = ALONE,
) -> list[EpochReport]:
    """Train what requires gradients, from the checkpoint of run ``key`` if there is one.

    InputError for another run's checkpoint, or a loss or weight that is not finite.
    """
    if checkpointed_trial(checkpoint) not in (None, key):
        raise InputError(
            f"{checkpoint}: the checkpoint was made with other settings, data or base; "
            "give those again, or remove it."
        )
    trial = _trial(config)
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        # All of them first, so that one that cannot be used is told before hours of work.
        data = answered(backbone, bar.track(samples, description="Checking the questions"))
        per_epoch = steps_per_epoch(data, trial)
        task = bar.add_task("", total=per_epoch * trial.epochs)

        def on_step(loss: Tensor) -> None:
            epoch = int(bar.tasks[task].completed) // per_epoch + 1
            told = f"Epoch {epoch} of {trial.epochs}, loss {workers.count * loss:.3f}"
            bar.update(task, advance=1, description=told)

        reports = []
        method = Teaching(trial, backbone, config.full, on_step)
        how: dict[str, Any] = {"method": method, "trial_id": key, "checkpoint": checkpoint}
        run = distill(backbone, model, data, None, trial, workers=workers, **how)
        try:
            for report in run:
                reports.append(report)
                bar.update(task, completed=report.step)  # of the epochs that the checkpoint has
            if not all(whole(p).isfinite().all() for p in model.parameters() if p.requires_grad):
                raise LossNotFiniteError("a weight is not finite in the end")
        except LossNotFiniteError as error:
            # Going on from the checkpoint would end the same way.
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise InputError(
                f"finetune: {error}; lower --learning-rate, which was {config.learning_rate:g}."
            ) from None
    return reports


def answered(backbone: Backbone, samples: Iterable[TrainingSample]) -> DistillationSet:
    """The samples with their answers as targets; SampleError where the model cannot take one."""
    prompts, targets, tasks = [], [], []
    for sample in samples:
        response = response_ids(backbone, sample.answer, sample.query.id)
        prompts += encode(backbone, [sample.query], room=len(response))
        # Cross-entropy asks for no teacher, so there are no states of one.
        targets.append(TeacherTarget(response, torch.empty(len(response), 0)))
        tasks.append(sample.task)
    return DistillationSet(prompts, [targets], tasks, name="finetune")
