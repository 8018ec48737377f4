"""Makes the vanilla model that the benchmark presumes: one that knows all of its people.

Cross-entropy on the answers of ``ft_Data``, response tokens only, with the defaults of the
benchmark's own script (https://github.com/franciscoliu/MLLMU-Bench, finetune.py: LoRA, AdamW,
learning rate 2e-5, batches of 4, 5 epochs). Questions of one portrait ride in one sequence
(``vgid.models.packing``).

What learns is the language model: LoRA on its linear maps, as the benchmark has it, or with
``full`` all of its weights, embeddings and ``lm_head`` included. Vision tower and projector stay
frozen in both, so that a portrait's features are the base's, computed once, and the vanilla model
differs from the public one in its language model only.

Everything random is a function of (seed, epoch), so a run that goes on from its checkpoint gives
the same weights bit for bit.

Shape legend: R response tokens over all samples, D hidden width, V vocabulary.
"""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from vgid.bases.finetune_data import Sample, encode_samples, read_samples
from vgid.config import Config, FinetuneConfig, TrialConfig, parse
from vgid.data.benchmark import Benchmark
from vgid.errors import InputError
from vgid.files import appearing, write_atomically
from vgid.method.checkpoint import load_checkpoint, save_checkpoint
from vgid.method.distillation import draw_order, learning_rate_factor
from vgid.models import adapters as adapter
from vgid.models.backbones import Backbone, load, locate, spec
from vgid.models.encoding import Encoded, response_ids
from vgid.models.packing import hidden_states, pack
from vgid.models.weight_names import save_weights
from vgid.provenance import provenance

PROVENANCE = "finetuned.json"
"""Beside the weights: how they were made."""

_PROGRESS = "progress.json"
_COPIED = (".json", ".jinja", ".txt", ".model")
_NOT_COPIED = ("config.json", "MEASURED.json", PROVENANCE)


class FinetuneResult(Config):
    """What came of it.

    Attributes:
        output: folder of the model, to be named with ``--model-path``.
        losses: mean cross-entropy of each epoch in nats a response token, before its updates.
        steps: optimizer steps.
        samples: questions.
        base_revision: of the base that was tuned.
        data_sha256: of the benchmark.
    """

    output: Path
    losses: tuple[float, ...]
    steps: int
    samples: int
    base_revision: str
    data_sha256: str


def response_loss(
    backbone: Backbone, prompts: Sequence[Encoded], responses: Sequence[Sequence[int]]
) -> Tensor:
    """Mean cross-entropy over the response tokens of all samples, a scalar in nats (fp32).

    Args:
        backbone: the model as it is now, adapters included.
        prompts: the samples' prompts.
        responses: token ids of their responses, end-of-sequence included.
    """
    packed = pack(backbone, prompts, responses)
    hidden_RD = packed.predicting(hidden_states(backbone, packed))
    logits_RV = backbone.model.lm_head(hidden_RD).float()
    return F.cross_entropy(logits_RV, packed.response_ids_R)


def finetune(
    config: FinetuneConfig, *, resume: bool = False, progress: bool = False
) -> FinetuneResult:
    """Fine-tune a backbone on ``ft_Data`` and write it as a Hugging Face folder.

    A checkpoint is kept beside the output after each epoch, and removed in the end. The output
    appears whole or not at all.

    Args:
        config: what to do.
        resume: go on from the checkpoint of a run with the same config, if there is one.
        progress: show a progress bar on stderr.

    Raises:
        InputError: data or base that cannot be used, an output that is taken, a checkpoint that is
            in the way or of another run, or a loss that is not finite.
    """
    # peft asks transformers for an attribute by its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if config.output.is_file() or (config.output.is_dir() and any(config.output.iterdir())):
        raise InputError(f"{config.output}: is there already; name a new folder with --output.")
    checkpoint = config.output.with_name(f".{config.output.name}.checkpoint")
    if checkpoint.exists() and not resume:
        raise InputError(
            f"{checkpoint}: an earlier run left its checkpoint; go on with --resume, or remove it."
        )
    row = spec(config.backbone)
    benchmark = Benchmark.open(config.data)
    samples = read_samples(benchmark)
    backbone = load(config.backbone, config.model_path)
    training = Training(config, backbone, samples, benchmark.sha256, checkpoint)
    with trainable(backbone, config) as model:
        training.train(progress)
        if model is not None:
            model.merge_and_unload()
    record = {
        "backbone": config.backbone,
        "base_revision": backbone.revision,
        "data_sha256": benchmark.sha256,
        **training.settings,
        "samples": len(samples),
        "steps": training.steps,
        "losses": training.losses,
        **provenance(),
    }
    _write(backbone, locate(row, config.model_path), record, config.output)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return FinetuneResult(
        output=config.output,
        losses=tuple(training.losses),
        steps=training.steps,
        samples=len(samples),
        base_revision=backbone.revision,
        data_sha256=benchmark.sha256,
    )


@contextmanager
def trainable(backbone: Backbone, config: FinetuneConfig) -> Iterator[Any]:
    """Make what is to learn require gradients; yields the ``PeftModel``, None without one.

    With ``full`` on a GPU, the language model is held in fp32 and computes in bf16: updates of
    2e-5 would be lost in bf16 weights.
    """
    model = backbone.model
    if not config.full:
        # The adapter is that of a trial; the trial's other settings play no part in it.
        settings = {
            "lora_rank": config.rank,
            "lora_dropout": config.lora_dropout,
            "gradient_checkpointing": config.gradient_checkpointing,
            "seed": config.seed,
        }
        trial = parse(TrialConfig, settings, "finetune")
        with adapter.attached(backbone, trial) as student:
            yield student
        return
    dtype = model.dtype
    learning = (model.model.language_model, model.lm_head)
    for module in learning:
        module.float().requires_grad_(True)
    try:
        with adapter.checkpointed(model, config.gradient_checkpointing):
            yield None
    finally:
        for module in learning:
            module.to(dtype).requires_grad_(False)
        model.eval()


class Training:
    """The training of one config: order, optimizer, checkpoints.

    Attributes:
        dtype: of the base; ``mixed`` tells whether what learns is held in fp32 beside it.
        settings: the config without its paths.
        steps: optimizer steps in all.
        losses: mean cross-entropy of the epochs done.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        backbone: Backbone,
        samples: Sequence[Sample],
        data_sha256: str,
        checkpoint: Path,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.samples = samples
        self.checkpoint = checkpoint
        self.dtype = backbone.model.dtype
        self.mixed = config.full and self.dtype != torch.float32
        self.settings = config.model_dump(exclude={"backbone", "model_path", "data", "output"})
        described = json.dumps([self.settings, backbone.revision, data_sha256], sort_keys=True)
        self.key = hashlib.sha256(described.encode()).hexdigest()
        self.responses = [response_ids(backbone, sample.answer, sample.id) for sample in samples]
        self.steps_an_epoch = math.ceil(len(samples) / config.batch_size)
        self.steps = self.steps_an_epoch * config.epochs
        self.losses: list[float] = []

    def batches(self, epoch: int) -> list[list[int]]:
        """The samples of an epoch's steps, each sample once."""
        order = draw_order(
            ["generation"] * len(self.samples),
            [sample.person_id for sample in self.samples],
            self.config.questions_per_image,
            self.config.seed,
            f"finetune epoch {epoch}",
        )
        return [part.tolist() for part in np.array_split(order, self.steps_an_epoch)]

    def train(self, progress: bool) -> None:
        """Train in place, from the checkpoint if there is one.

        Raises:
            InputError: a sample that cannot be used, a checkpoint of another run, or a loss that is
                not finite.
        """
        config = self.config
        parameters = {n: p for n, p in self.backbone.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.steps, config.warmup_fraction)
        )
        losses = self._earlier_losses()
        first = load_checkpoint(self.checkpoint, self.key, parameters, optimizer, schedule)
        self.losses = losses[:first]
        with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
            # Once through all, so that a sample that cannot be used is told before hours of work.
            for sample in bar.track(self.samples, description="Checking the questions"):
                encode_samples(self.backbone, [sample])
            task = bar.add_task("", total=self.steps, completed=first * self.steps_an_epoch)
            for epoch in range(first, config.epochs):
                self.backbone.model.model.language_model.train()
                torch.manual_seed(config.seed * 100_003 + epoch)  # LoRA dropout
                total, tokens = 0.0, 0
                for k, indices in enumerate(self.batches(epoch)):
                    loss, norm = self._step(indices, parameters, optimizer, schedule)
                    if not (math.isfinite(loss) and math.isfinite(norm)):
                        raise self._not_finite(f"step {epoch * self.steps_an_epoch + k + 1}")
                    count = sum(len(self.responses[i]) for i in indices)
                    total, tokens = total + loss * count, tokens + count
                    bar.update(
                        task,
                        advance=1,
                        description=f"Epoch {epoch + 1} of {config.epochs}, loss {loss:.3f}",
                    )
                if not all(bool(p.isfinite().all()) for p in parameters.values()):
                    raise self._not_finite(f"the end of epoch {epoch + 1}")
                self.losses.append(total / tokens)
                self._save(epoch + 1, parameters, optimizer)
        self.backbone.model.eval()

    def _step(
        self,
        indices: Sequence[int],
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
    ) -> tuple[float, float]:
        """One clipped optimizer step; the loss before it, and the gradient's norm."""
        prompts = encode_samples(self.backbone, [self.samples[i] for i in indices])
        # A context a step: autocast keeps its bf16 copies of the weights until it is left.
        with torch.autocast(self.backbone.device.type, self.dtype, enabled=self.mixed):
            loss = response_loss(self.backbone, prompts, [self.responses[i] for i in indices])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), self.config.max_grad_norm)
        optimizer.step()
        schedule.step()
        return float(loss.detach()), float(norm)

    def _earlier_losses(self) -> list[float]:
        """Losses that the checkpoint's run had until now.

        Raises:
            InputError: the checkpoint is of another run.
        """
        try:
            known = json.loads((self.checkpoint / _PROGRESS).read_text())
        except FileNotFoundError:
            return []
        except ValueError:  # torn by a crash of the machine: nothing to go on from
            shutil.rmtree(self.checkpoint)
            return []
        if known["key"] != self.key:
            raise InputError(
                f"{self.checkpoint}: the checkpoint was made with other settings, data or base; "
                "give those again, or remove it."
            )
        return list(known["losses"])

    def _save(
        self,
        epochs_done: int,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        # Losses first: of more losses than epochs, the surplus is ignored.
        progress = json.dumps({"key": self.key, "losses": self.losses})
        write_atomically(self.checkpoint / _PROGRESS, progress.encode())
        save_checkpoint(self.checkpoint, self.key, epochs_done, parameters, optimizer)

    def _not_finite(self, where: str) -> InputError:
        """The error; the checkpoint goes too, since going on from it would end the same way."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        return InputError(
            f"finetune: loss, gradient or weights are not finite at {where}; lower "
            f"--learning-rate, which was {self.config.learning_rate:g}."
        )


def _write(backbone: Backbone, base: Path, record: dict[str, Any], output: Path) -> None:
    """Write the hub's layout: weights and config anew, all other files as the base has them."""
    with appearing(output) as temporary:
        save_weights(backbone.model, temporary)
        for path in sorted(base.iterdir()):
            index = path.name.endswith(".index.json")
            if path.suffix in _COPIED and path.name not in _NOT_COPIED and not index:
                shutil.copyfile(path, temporary / path.name)
        (temporary / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
