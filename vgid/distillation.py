"""The training loop: Algorithm 1 of the paper, for one process or one rank of several.

Each step draws a batch of forget questions and, if the method has a retain term, one of retain
questions, sums both losses (equation 5) and takes one optimizer step. The losses are the method's
(``vgid.methods``); VGID's are forward KLs. Response tokens only: the student's hidden states at
those positions meet the teacher's in ``lm_head``, whatever the lengths of their prompts. Questions
of one portrait ride in one sequence (``vgid.packing``).

Everything random is a function of (seed, epoch), so a resumed trial goes on as if never stopped.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vgid.backbones import Backbone
from vgid.checkpoint import load_checkpoint, save_checkpoint
from vgid.config import TrialConfig, uses
from vgid.encoding import Encoded
from vgid.interventions import sample_generator
from vgid.methods import Distillation, UnlearningMethod, make_method
from vgid.objectives import vgid_loss
from vgid.packing import pack
from vgid.prompts import Task
from vgid.results import EpochReport
from vgid.student import DistillationBatch, View
from vgid.teacher import TeacherTarget


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
        paired: a sample learns from all its targets at once (preferences) instead.
        views: the prompts again, with other views of the portraits (``vgid.views``); optimizer
            steps take turns between ``prompts`` and these, the same for all samples of a step.
    """

    prompts: Sequence[Encoded]
    targets: Sequence[Sequence[TeacherTarget]]
    tasks: Sequence[Task]
    paired: bool = False
    views: Sequence[Sequence[Encoded]] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def portraits(self) -> list[Hashable]:
        """What each sample shows; samples that show the same can share its image tokens."""
        return [tuple(picture.key for picture in prompt.pictures) for prompt in self.prompts]

    def shown(self, step: int) -> Sequence[Encoded]:
        """The prompts of all samples as optimizer step ``step`` shows them."""
        return (self.prompts, *self.views)[step % (1 + len(self.views))]

    def order(self, config: TrialConfig, name: str) -> list[int]:
        """The samples in a seeded order (``draw_order``)."""
        return draw_order(self.tasks, self.portraits, config.questions_per_image, config.seed, name)

    def target(self, i: int, epoch: int) -> TeacherTarget:
        """The target of sample ``i`` in ``epoch``, where targets take turns."""
        return self.targets[(i + epoch) % len(self.targets)][i]

    def rounds(self, indices: Sequence[int], epoch: int) -> list[list[TeacherTarget]]:
        """What the samples learn from in ``epoch``: one list, or of paired targets each in turn."""
        if self.paired:
            return [[targets[i] for i in indices] for targets in self.targets]
        return [[self.target(i, epoch) for i in indices]]


Term = Literal["forget", "retain"]


class Student(nn.Module):
    """The adapted model as a module whose forward is the loss, so that DDP sees all of it.

    Args:
        model: the ``PeftModel``.
        backbone: the frozen base that it wraps.
        method: whose losses; VGID's by default.
    """

    def __init__(
        self, model: nn.Module, backbone: Backbone, method: UnlearningMethod | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.backbone = backbone
        self.method = method or Distillation(TrialConfig.model_validate({}), backbone)

    def forward(self, part: DistillationBatch, term: Term) -> Tensor:
        """This rank's share of L_forget or of L_retain, a scalar."""
        view = View(self.backbone, self.model, part)
        if term == "forget":
            return self.method.forget_loss(view)
        loss = self.method.retain_loss(view)
        assert loss is not None, "a method without a retain loss gets no retain batch"
        return loss

    def kl(self, part: DistillationBatch) -> Tensor:
        """Forward KL at the response positions, this share of the mean over the whole batch."""
        return View(self.backbone, self.model, part).kl()


def draw_order(
    tasks: Sequence[Task],
    portraits: Sequence[Hashable],
    questions_per_image: int,
    seed: int,
    name: str,
) -> list[int]:
    """As many seeded draws as there are samples: portraits in turn, and their tasks in turn.

    Each portrait in a random order gives its next ``questions_per_image`` questions, round after
    round. Its own questions alternate between the tasks, neighbours beginning with different ones,
    so that any stretch of the order holds the tasks in nearly equal parts. A task's questions are
    drawn without replacement until all were drawn, then anew: a rare task is seen more often than
    a frequent one.
    """
    members: dict[Hashable, dict[Task, list[int]]] = {}
    for i, (portrait, task) in enumerate(zip(portraits, tasks, strict=True)):
        members.setdefault(portrait, {}).setdefault(task, []).append(i)
    generator = sample_generator(seed, name)
    streams = []
    for place, p in enumerate(generator.permutation(len(members))):
        groups = list(list(members.values())[p].values())
        length = sum(map(len, groups))
        rounds = math.ceil(length / len(groups))
        columns = []
        for group in np.roll(np.arange(len(groups)), place):
            passes = [
                generator.permutation(groups[group])
                for _ in range(math.ceil(rounds / len(groups[group])))
            ]
            columns.append(np.concatenate(passes)[:rounds])
        streams.append([int(i) for i in np.stack(columns, axis=1).ravel()[:length]])
    k = questions_per_image
    longest = max(map(len, streams))
    return [i for start in range(0, longest, k) for s in streams for i in s[start : start + k]]


def epoch_batches(data: DistillationSet, config: TrialConfig, epoch: int) -> list[list[int]]:
    """The forget samples of an epoch's steps: ceil(n / batch_size) nearly equal batches."""
    order = data.order(config, f"forget epoch {epoch}")
    steps = math.ceil(len(order) / config.batch_size)
    return [part.tolist() for part in np.array_split(order, steps)]


def retain_batch(data: DistillationSet, config: TrialConfig, step: int) -> list[int]:
    """The retain samples of optimizer step ``step`` (0-based), pass after pass."""
    batch_size = min(config.retain_batch_size, len(data))
    per_pass = len(data) // batch_size
    order = data.order(config, f"retain pass {step // per_pass}")
    start = (step % per_pass) * batch_size
    return order[start : start + batch_size]


def share(
    backbone: Backbone,
    data: DistillationSet,
    indices: Sequence[int],
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    parts: int = 1,
    step: int = 0,
) -> list[DistillationBatch]:
    """This rank's share of the batch ``indices`` of optimizer step ``step``, in ``parts``.

    Portraits stay together as far as equal shares allow. Weights add up, over ranks and parts, to
    the mean over the whole batch.
    """
    tokens = sum(len(t.response) for targets in data.rounds(indices, epoch) for t in targets)
    together: dict[Hashable, list[int]] = {}
    for i in indices:
        together.setdefault(data.portraits[i], []).append(i)
    ordered = [i for portrait in together.values() for i in portrait]
    pieces = np.array_split(ordered, world_size * parts)[rank * parts : (rank + 1) * parts]
    shares = []
    shown = data.shown(step)
    for piece in pieces:
        # A rank without samples must still take part in DDP's reduction.
        mine = piece.tolist() or [indices[0]]
        rounds = data.rounds(mine, epoch)
        targets = [target for each in rounds for target in each]
        prompts = [shown[i] for i in mine] * len(rounds)
        packed = pack(backbone, prompts, [t.response for t in targets])
        shares.append(
            DistillationBatch(
                packed,
                torch.cat([t.hidden_RD for t in targets]),
                weight=1.0 / tokens if len(piece) else 0.0,
                fraction=len(piece) / len(indices),
            )
        )
    return shares


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    warmup = max(1, round(warmup_fraction * steps))
    return min(1.0, (step + 1) / warmup) * (1.0 - 0.9 * step / steps)


def distill(
    backbone: Backbone,
    model: Any,
    forget: DistillationSet,
    retain: DistillationSet | None,
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
        forget: D_F with the method's targets, for VGID the teacher of equation 2.
        retain: D_R with the frozen base as teacher (equation 4); not used, and may be None, where
            the method has no retain term.
        config: the trial.
        trial_id: written into the checkpoint, which is resumed from only by the same trial.
        rank: of this process.
        world_size: number of processes; more than one needs an initialised process group.
        checkpoint: folder of the checkpoint, written after each epoch and resumed from.

    Raises:
        InputError: the trial asks for a layer that the backbone lacks.
        LossNotFiniteError: NaN or infinite loss or gradient.
    """
    method = make_method(config, backbone)
    if method.layers is not None:
        # DDP would wait for the gradients of layers that are not run.
        backbone.model.model.language_model.layers[method.layers :].requires_grad_(False)
    kept = retain if uses(config.method, "beta") else None
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
    student: nn.Module = Student(model, backbone, method)
    if world_size > 1:
        # Same seed, same adapter on every rank: nothing to broadcast, least of all the base.
        student = nn.parallel.DistributedDataParallel(student, init_sync=False)

    for epoch in range(first, config.epochs):
        model.train()
        torch.manual_seed(config.seed * 100_003 + epoch)  # LoRA dropout
        sums = torch.zeros(2, dtype=torch.float64)
        norm = 0.0
        batches = epoch_batches(forget, config, epoch)
        for k, indices in enumerate(batches):
            step = epoch * per_epoch + k
            parts = config.gradient_accumulation
            forget_shares = share(backbone, forget, indices, epoch, rank, world_size, parts, step)
            retain_shares: Sequence[DistillationBatch | None] = [None] * parts
            if kept is not None:
                others = retain_batch(kept, config, step)
                retain_shares = share(backbone, kept, others, epoch, rank, world_size, parts)
            optimizer.zero_grad(set_to_none=True)
            losses = torch.zeros(2, dtype=torch.float64)
            shares = zip(forget_shares, retain_shares, strict=True)
            for part, (forget_share, retain_share) in enumerate(shares, 1):
                last = part == parts
                losses[0] += backward_term(
                    student, forget_share, "forget", config.alpha, world_size, last and kept is None
                )
                if retain_share is not None:
                    losses[1] += backward_term(
                        student, retain_share, "retain", config.beta, world_size, last
                    )
            norm = float(nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm))
            if not math.isfinite(norm) or not bool(losses.isfinite().all()):
                raise LossNotFiniteError(
                    f"loss or gradient is not finite at step {step + 1} (epoch {epoch + 1})"
                )
            optimizer.step()
            schedule.step()
            sums += losses
        model.eval()
        forgotten, retained = _sum_over_ranks(sums, world_size) / len(batches)
        if checkpoint is not None and rank == 0:
            save_checkpoint(checkpoint, trial_id, epoch + 1, parameters, optimizer)
        yield EpochReport(
            epoch=epoch + 1,
            epochs=config.epochs,
            step=(epoch + 1) * per_epoch,
            metrics={
                "forget_loss": forgotten.item(),
                **({} if kept is None else {"retain_loss": retained.item()}),
                "loss": vgid_loss(forgotten, retained, config.alpha, config.beta).item(),
                "learning_rate": float(schedule.get_last_lr()[0]),
                "grad_norm": norm,
            },
        )


def backward_term(
    student: nn.Module,
    part: DistillationBatch,
    term: Term,
    weight: float,
    world_size: int = 1,
    last: bool = True,
) -> Tensor:
    """Add a term of equation 5 to the gradient of the adapter.

    Term by term, the gradient is that of the sum, with the activations of one term in memory.

    Args:
        student: the student, in DDP if there are several ranks.
        part: this rank's share of a batch, or a part of it.
        term: which loss.
        weight: alpha or beta.
        world_size: number of ranks.
        last: whether this is the step's last addition, after which ranks exchange gradients.

    Returns:
        The unweighted share of the loss, fp64 on the CPU.
    """
    with _reduced(student, last):
        loss: Tensor = student(part, term)
        # DDP averages over the ranks, whose shares are meant to be summed.
        (weight * loss * world_size).backward()
    return loss.detach().double().cpu()


def _reduced(student: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are summed over ranks once a step, with the last part of the batch."""
    if last or not isinstance(student, nn.parallel.DistributedDataParallel):
        return nullcontext()
    waiting: AbstractContextManager[None] = student.no_sync()
    return waiting


def _sum_over_ranks(values: Tensor, world_size: int) -> Tensor:
    if world_size > 1:
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        torch.distributed.all_reduce(values)
    return values.cpu()
