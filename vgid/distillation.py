"""The distillation loop: Algorithm 1 of the paper, for one process or one rank of several.

Each step draws a batch of forget questions and one of retain questions, sums both forward KLs
(equation 5) and takes one optimizer step. Response tokens only: the student's hidden states at
those positions meet the teacher's in ``lm_head``, whatever the lengths of their prompts.

Everything random is a function of (seed, epoch), so a resumed trial goes on as if never stopped.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vgid.backbones import Backbone
from vgid.checkpoint import load_checkpoint, save_checkpoint
from vgid.config import TrialConfig
from vgid.encoding import Batch, Encoded, collate
from vgid.interventions import sample_generator
from vgid.objectives import forward_kl_per_position, vgid_loss
from vgid.prompts import Task
from vgid.results import EpochReport
from vgid.teacher import TeacherTarget, response_hidden


class LossNotFiniteError(Exception):
    """The loss became NaN or infinite; the trial has failed."""


@dataclass(frozen=True)
class DistillationSet:
    """The student's prompts with the teacher's targets.

    Attributes:
        prompts: the ORIGINAL image and question of each sample.
        targets: one list of targets for each response source in use; sample i learns from
            ``targets[(i + epoch) % len(targets)][i]``, so a mixed source takes turns.
        tasks: the task of each sample; batches hold the tasks in equal parts.
    """

    prompts: Sequence[Encoded]
    targets: Sequence[Sequence[TeacherTarget]]
    tasks: Sequence[Task]

    def __len__(self) -> int:
        return len(self.prompts)

    def target(self, i: int, epoch: int) -> TeacherTarget:
        """The target of sample ``i`` in ``epoch``."""
        return self.targets[(i + epoch) % len(self.targets)][i]


@dataclass
class DistillationBatch:
    """One rank's share of a batch.

    Attributes:
        batch: right-padded original prompts with the response tokens y.
        teacher_RD: the teacher's hidden states that predict y.
        weight: 1 / response tokens of the whole batch over all ranks; 0 for a placeholder.
    """

    batch: Batch
    teacher_RD: Tensor
    weight: float


class Student(nn.Module):
    """The adapted model as a module whose forward is the loss, so that DDP sees all of it."""

    def __init__(self, model: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        self.model = model
        self.backbone = backbone

    def forward(self, forget: DistillationBatch, retain: DistillationBatch) -> tuple[Tensor, ...]:
        """This rank's share of L_forget (equation 3) and L_retain (equation 4)."""
        return self.kl(forget), self.kl(retain)

    def kl(self, part: DistillationBatch) -> Tensor:
        """Forward KL at the response positions, weighted to the mean over the whole batch."""
        lm_head = self.backbone.model.lm_head
        student_logits = lm_head(response_hidden(self.backbone, part.batch))
        with torch.no_grad():
            teacher_logits = lm_head(part.teacher_RD.to(student_logits))
        return forward_kl_per_position(teacher_logits, student_logits).sum() * part.weight


def task_order(tasks: Sequence[Task], seed: int, name: str) -> list[int]:
    """As many seeded draws as there are samples, the tasks in turn.

    A task's samples are drawn without replacement until all were drawn, then anew: a rare task is
    seen more often than a frequent one. With a single task this is a permutation.
    """
    groups: dict[Task, list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(task, []).append(i)
    rounds = math.ceil(len(tasks) / len(groups))
    streams = []
    for task, members in groups.items():
        generator = sample_generator(seed, f"{name}, {task}")
        passes = [generator.permutation(members) for _ in range(math.ceil(rounds / len(members)))]
        streams.append(np.concatenate(passes)[:rounds])
    return [int(i) for i in np.stack(streams, axis=1).ravel()[: len(tasks)]]


def epoch_batches(tasks: Sequence[Task], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The forget samples of an epoch's steps: ceil(n / batch_size) nearly equal batches."""
    order = task_order(tasks, seed, f"forget epoch {epoch}")
    steps = math.ceil(len(tasks) / batch_size)
    return [part.tolist() for part in np.array_split(order, steps)]


def retain_batch(tasks: Sequence[Task], batch_size: int, seed: int, step: int) -> list[int]:
    """The retain samples of optimizer step ``step`` (0-based), pass after pass."""
    batch_size = min(batch_size, len(tasks))
    per_pass = len(tasks) // batch_size
    order = task_order(tasks, seed, f"retain pass {step // per_pass}")
    start = (step % per_pass) * batch_size
    return order[start : start + batch_size]


def share(
    backbone: Backbone,
    data: DistillationSet,
    indices: Sequence[int],
    epoch: int,
    rank: int,
    world_size: int,
) -> DistillationBatch:
    """This rank's share of the batch ``indices``; weights add up to the mean over all of it."""
    tokens = sum(len(data.target(i, epoch).response) for i in indices)
    mine = list(indices[rank::world_size])
    # A rank without samples must still take part in DDP's reduction.
    weight = 1.0 / tokens if mine else 0.0
    mine = mine or [indices[0]]
    targets = [data.target(i, epoch) for i in mine]
    batch = collate(backbone, [data.prompts[i] for i in mine], [t.response for t in targets])
    return DistillationBatch(batch, torch.cat([t.hidden_RD for t in targets]), weight)


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    warmup = max(1, round(warmup_fraction * steps))
    return min(1.0, (step + 1) / warmup) * (1.0 - 0.9 * step / steps)


def distill(
    backbone: Backbone,
    model: Any,
    forget: DistillationSet,
    retain: DistillationSet,
    config: TrialConfig,
    *,
    trial_id: str = "",
    rank: int = 0,
    world_size: int = 1,
    checkpoint: Path | None = None,
) -> Iterator[EpochReport]:
    """Train the attached adapter in place; yields a report after each epoch.

    Args:
        backbone: the frozen base that ``model`` wraps.
        model: the ``PeftModel`` with a fresh adapter.
        forget: D_F with the teacher of equation 2.
        retain: D_R with the frozen base as teacher (equation 4).
        config: the trial.
        trial_id: written into the checkpoint, which is resumed from only by the same trial.
        rank: of this process.
        world_size: number of processes; more than one needs an initialised process group.
        checkpoint: folder of the checkpoint, written after each epoch and resumed from.

    Raises:
        LossNotFiniteError: NaN or infinite loss or gradient.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    per_epoch = math.ceil(len(forget) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, per_epoch * config.epochs, config.warmup_fraction),
    )
    first = 0
    if checkpoint is not None:
        first = load_checkpoint(checkpoint, trial_id, parameters, optimizer, schedule)
    student: nn.Module = Student(model, backbone)
    if world_size > 1:
        # Same seed, same adapter on every rank: nothing to broadcast, least of all the base.
        student = nn.parallel.DistributedDataParallel(student, init_sync=False)

    for epoch in range(first, config.epochs):
        model.train()
        torch.manual_seed(config.seed * 100_003 + epoch)  # LoRA dropout
        sums = torch.zeros(2, dtype=torch.float64)
        norm = 0.0
        batches = epoch_batches(forget.tasks, config.batch_size, config.seed, epoch)
        for k, indices in enumerate(batches):
            step = epoch * per_epoch + k
            others = retain_batch(retain.tasks, config.retain_batch_size, config.seed, step)
            forget_kl, retain_kl = student(
                share(backbone, forget, indices, epoch, rank, world_size),
                share(backbone, retain, others, epoch, rank, world_size),
            )
            loss = vgid_loss(forget_kl, retain_kl, config.alpha, config.beta)
            optimizer.zero_grad(set_to_none=True)
            # DDP averages over the ranks, whose shares are meant to be summed.
            (loss * world_size).backward()
            norm = float(nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm))
            if not math.isfinite(norm) or not math.isfinite(loss.item()):
                raise LossNotFiniteError(
                    f"loss or gradient is not finite at step {step + 1} (epoch {epoch + 1})"
                )
            optimizer.step()
            schedule.step()
            sums += torch.stack([forget_kl, retain_kl]).detach().double().cpu()
        model.eval()
        forget_loss, retain_loss = (_sum_over_ranks(sums, world_size) / len(batches)).tolist()
        if checkpoint is not None and rank == 0:
            save_checkpoint(checkpoint, trial_id, epoch + 1, parameters, optimizer)
        yield EpochReport(
            epoch=epoch + 1,
            epochs=config.epochs,
            step=(epoch + 1) * per_epoch,
            metrics={
                "forget_loss": forget_loss,
                "retain_loss": retain_loss,
                "loss": config.alpha * forget_loss + config.beta * retain_loss,
                "learning_rate": float(schedule.get_last_lr()[0]),
                "grad_norm": norm,
            },
        )


def _sum_over_ranks(values: Tensor, world_size: int) -> Tensor:
    if world_size > 1:
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        torch.distributed.all_reduce(values)
    return values.cpu()
