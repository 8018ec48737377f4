"""The training loop: Algorithm 1 of the paper, for one process or one rank of several.

Each step draws a batch of forget questions and, if the method has a retain term, one of retain
questions, sums both losses (equation 5) and takes one optimizer step. The losses are the method's
(``vgid.method.methods``); VGID's are forward KLs. Response tokens only: the student's hidden states
at those positions meet the teacher's in ``lm_head``, whatever the lengths of their prompts.
Questions of one portrait ride in one sequence (``vgid.models.packing``).

An epoch is one pass over the forget questions; the retain questions have passes of their own,
which go on from epoch to epoch. A pass holds every question once, its tasks in proportion.

Everything random is a function of (seed, epoch), so a resumed trial goes on as if never stopped.

Of Algorithm 1 this differs in one thing: the teacher's noise is drawn once for each portrait and
study (``vgid.method.teacher``), which is what lets trials share its states, and not anew for each
batch.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vgid.config import TrialConfig, uses
from vgid.method.checkpoint import checkpoint_reports, load_checkpoint, save_checkpoint
from vgid.method.methods import Distillation, UnlearningMethod, make_method
from vgid.method.student import DistillationBatch, View
from vgid.method.teacher import TeacherTarget
from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded
from vgid.models.packing import pack
from vgid.objectives import vgid_loss
from vgid.prompts import Task
from vgid.results import EpochReport
from vgid.seeds import sample_generator


class LossNotFiniteError(Exception):
    """The loss became NaN or infinite; the trial has failed."""


@dataclass(frozen=True)
class DistillationSet:
    """The student's prompts with the teacher's targets.

    Attributes:
        prompts: the ORIGINAL image and question of each sample.
        targets: one list of targets for each response source in use; with several, a sample
            learns from each in turn, epoch after epoch.
        tasks: the task of each sample; batches hold the tasks in proportion.
        paired: a sample learns from all its targets at once (preferences) instead.
        views: the prompts again, with other views of the portraits (``vgid.method.views``);
            optimizer steps take turns between ``prompts`` and these, the same for all samples of a
            step.
        first: samples whose portraits come before all others in every pass.
    """

    prompts: Sequence[Encoded]
    targets: Sequence[Sequence[TeacherTarget]]
    tasks: Sequence[Task]
    paired: bool = False
    views: Sequence[Sequence[Encoded]] = ()
    first: Collection[int] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def portraits(self) -> list[Hashable]:
        """What each sample shows; samples that show the same can share its image tokens."""
        return [tuple(picture.key for picture in prompt.pictures) for prompt in self.prompts]

    def shown(self, step: int) -> Sequence[Encoded]:
        """The prompts of all samples as optimizer step ``step`` shows them."""
        # All samples of a step alike: another view is another picture, and questions of two views
        # would not share an image.
        return (self.prompts, *self.views)[step % (1 + len(self.views))]

    @cached_property
    def turns(self) -> list[int]:
        """Which of several targets each sample begins with: each as often in every task.

        Shuffled, since the data's own order repeats, person by person: by it, a person's one cloze
        question would stand at the same turn as everyone else's.
        """
        turns = [0] * len(self)
        begun: Counter[Task] = Counter()
        for i in sample_generator(0, "turns").permutation(len(self)).tolist():
            turns[i] = begun[self.tasks[i]]
            begun[self.tasks[i]] += 1
        return turns

    def batches(self, config: TrialConfig, batch_size: int, name: str) -> list[list[int]]:
        """A pass over the samples (``draw_order``) in nearly equal batches."""
        k, first = config.questions_per_image, {self.portraits[i] for i in self.first}
        order = draw_order(self.tasks, self.portraits, k, config.seed, name, first)
        return [p.tolist() for p in np.array_split(order, math.ceil(len(order) / batch_size))]

    def target(self, i: int, epoch: int) -> TeacherTarget:
        """The target of sample ``i`` in ``epoch``, where targets take turns."""
        return self.targets[(self.turns[i] + epoch) % len(self.targets)][i]

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
    first: Collection[Hashable] = (),
) -> list[int]:
    """Every sample once, in a seeded order: portraits in turn, and tasks in proportion.

    A portrait gives its next ``questions_per_image`` questions at each of its turns, which are
    spread evenly over the order. Of the tasks that a portrait still has, the one comes next that is
    furthest behind its share of all samples, so that any stretch of the order holds the tasks in
    nearly that proportion.

    Args:
        tasks: of each sample.
        portraits: what each sample shows.
        questions_per_image: questions of a portrait that follow each other.
        seed: of the order.
        name: of the order, different for each pass.
        first: portraits whose first turn comes before everyone else's.
    """
    # Why not a plain shuffle: of five people with 20 questions, a batch of 8 would hold 4 or 5
    # portraits, and each portrait costs its image tokens; and the few cloze questions would bunch,
    # so that some steps see three and others none. Two portraits with 4 questions each cost 2
    # images, not 5.
    left: dict[Hashable, dict[Task, list[int]]] = {}
    for i in sample_generator(seed, name).permutation(len(tasks)).tolist():
        left.setdefault(portraits[i], {}).setdefault(tasks[i], []).append(i)
    turns = []
    for place, (portrait, groups) in enumerate(left.items()):
        count = math.ceil(sum(map(len, groups.values())) / questions_per_image)
        for turn in range(count):
            opens = turn == 0 and portrait in first
            turns.append((not opens, (turn + place / len(left)) / count, place, groups))
    shares = {task: n / len(tasks) for task, n in Counter(tasks).items()}
    drawn = dict.fromkeys(shares, 0)
    order: list[int] = []
    for *_, groups in sorted(turns, key=lambda turn: turn[:3]):
        for _ in range(min(questions_per_image, sum(map(len, groups.values())))):
            # Of 8 generation and 4 cloze questions (shares 2/3 and 1/3), the order opens g c g g c
            # g ...: after any k draws a task has had its share of k, as nearly as whole questions
            # allow.
            behind = {t: shares[t] * (len(order) + 1) - drawn[t] for t in groups if groups[t]}
            task = max(behind, key=behind.__getitem__)
            order.append(groups[task].pop())
            drawn[task] += 1
    return order


def steps_per_epoch(data: DistillationSet, config: TrialConfig) -> int:
    """Optimizer steps of a pass over the forget samples."""
    return math.ceil(len(data) / config.batch_size)


def epoch_batches(data: DistillationSet, config: TrialConfig, epoch: int) -> list[list[int]]:
    """The forget samples of an epoch's steps, each sample once."""
    return data.batches(config, config.batch_size, f"forget epoch {epoch}")


def retain_batches(
    data: DistillationSet, config: TrialConfig, start: int = 0
) -> Iterator[list[int]]:
    """The retain samples of the optimizer steps from ``start`` (0-based) on, pass after pass."""
    per_pass = math.ceil(len(data) / config.retain_batch_size)
    batches = (
        batch
        for number in itertools.count(start // per_pass)
        for batch in data.batches(config, config.retain_batch_size, f"retain pass {number}")
    )
    return itertools.islice(batches, start % per_pass, None)


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
    # Counted over the whole batch, not this share: the mean of ranks' means would weigh a token of
    # a rank with short answers more, and two ranks would train another model than one.
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


def make_student(
    model: Any, backbone: Backbone, config: TrialConfig, world_size: int = 1
) -> nn.Module:
    """The model as the method trains it, in DDP if there are several processes.

    Raises:
        InputError: the trial asks for a layer that the backbone lacks.
    """
    method = make_method(config, backbone)
    if method.layers is not None:
        # DDP would wait for the gradients of layers that are not run.
        backbone.model.model.language_model.layers[method.layers :].requires_grad_(False)
    student = Student(model, backbone, method)
    if world_size == 1:
        return student
    # Same seed, same adapter on every rank: nothing to broadcast, least of all the base.
    return nn.parallel.DistributedDataParallel(student, init_sync=False)


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: TrialConfig, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW on the adapter, and the schedule of its learning rate over ``steps``."""
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, config.warmup_fraction)
    )
    return optimizer, schedule


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

    Epochs that a checkpoint has are reported again, since nobody may have heard of them.

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
    student = make_student(model, backbone, config, world_size)
    kept = retain if uses(config.method, "beta") else None
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    per_epoch = steps_per_epoch(forget, config)
    optimizer, schedule = make_optimizer(
        parameters.values(), config, steps=per_epoch * config.epochs
    )
    first, reports = 0, []
    if checkpoint is not None:
        first = load_checkpoint(checkpoint, trial_id, parameters, optimizer, schedule)
        reports = checkpoint_reports(checkpoint) if first else []

    yield from list(reports)
    others = None if kept is None else retain_batches(kept, config, first * per_epoch)
    for epoch in range(first, config.epochs):
        model.train()
        # By epoch, not once: an epoch that is resumed then draws the masks that it would have
        # drawn.
        torch.manual_seed(config.seed * 100_003 + epoch)  # LoRA dropout
        sums = torch.zeros(2, dtype=torch.float64)
        norm = 0.0
        batches = epoch_batches(forget, config, epoch)
        # Algorithm 1, lines 3 to 19: a batch of each set, the teachers of lines 6 to 9 from the
        # store.
        for k, indices in enumerate(batches):
            step = epoch * per_epoch + k
            parts = config.gradient_accumulation
            forget_shares = share(backbone, forget, indices, epoch, rank, world_size, parts, step)
            retain_shares: Sequence[DistillationBatch | None] = [None] * parts
            if kept is not None and others is not None:
                drawn = next(others)
                # Without the step: retain people are shown as they are, views are of those to be
                # forgotten.
                retain_shares = share(backbone, kept, drawn, epoch, rank, world_size, parts)
            optimizer.zero_grad(set_to_none=True)
            losses = backward_terms(student, forget_shares, retain_shares, config, world_size)
            norm = float(nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm))
            _refuse_infinite(norm, losses, step, epoch)
            optimizer.step()
            schedule.step()
            sums += losses
        model.eval()
        terms_2 = _sum_over_ranks(sums, world_size) / len(batches)
        rate = float(schedule.get_last_lr()[0])
        metrics = _epoch_metrics(terms_2, config, kept is not None, rate, norm)
        report = EpochReport(
            epoch=epoch + 1, epochs=config.epochs, step=(epoch + 1) * per_epoch, metrics=metrics
        )
        reports.append(report)
        if checkpoint is not None and rank == 0:
            save_checkpoint(checkpoint, trial_id, epoch + 1, parameters, optimizer, reports)
        yield report


def _refuse_infinite(norm: float, losses_2: Tensor, step: int, epoch: int) -> None:
    if not math.isfinite(norm) or not bool(losses_2.isfinite().all()):
        raise LossNotFiniteError(
            f"loss or gradient is not finite at step {step + 1} (epoch {epoch + 1})"
        )


def _epoch_metrics(
    terms_2: Tensor, config: TrialConfig, keeps: bool, learning_rate: float, grad_norm: float
) -> dict[str, float]:
    """What is told of an epoch: its mean losses L_F and L_R, their sum (equation 5), and more."""
    forgotten, retained = terms_2
    return {
        "forget_loss": forgotten.item(),
        **({"retain_loss": retained.item()} if keeps else {}),
        "loss": vgid_loss(forgotten, retained, config.alpha, config.beta).item(),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
    }


def backward_terms(
    student: nn.Module,
    forget_shares: Sequence[DistillationBatch],
    retain_shares: Sequence[DistillationBatch | None],
    config: TrialConfig,
    world_size: int = 1,
) -> Tensor:
    """Backward of both terms of equation 5 for one step, share by share.

    Args:
        student: the model that learns.
        forget_shares: this process's part of the forget batch, one for each accumulated part.
        retain_shares: the same of the retain batch; None where the method has no retain term.
        config: its alpha and beta weigh the terms.
        world_size: number of processes.

    Returns:
        The unweighted losses L_F and L_R of this process, float64, shape [2].
    """
    # Equation 5 as two backward passes: alpha * grad L_F + beta * grad L_R is the gradient of the
    # sum, and the first term's activations are gone before the second's are made.
    losses_2 = torch.zeros(2, dtype=torch.float64)
    shares = zip(forget_shares, retain_shares, strict=True)
    for part, (forget_share, retain_share) in enumerate(shares, 1):
        last = part == len(forget_shares)
        alone = last and retain_share is None
        losses_2[0] += backward_term(
            student, forget_share, "forget", config.alpha, world_size, alone
        )
        if retain_share is not None:
            losses_2[1] += backward_term(
                student, retain_share, "retain", config.beta, world_size, last
            )
    return losses_2


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
