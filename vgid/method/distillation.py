"""The training loop: Algorithm 1 of the paper, for one process or one rank of several.

An optimizer step minimises equation 5 over a batch of forget questions and one of retain ones::

    L   = alpha * L_F + beta * L_R                                    take_step
    L_F = KL( pi_T(. | P_phi(v), t_ic + t) || pi_theta(. | v, t) )    Distillation.forget_loss
    L_R = KL( pi_0(. | v, t)               || pi_theta(. | v, t) )    Distillation.retain_loss

Losses are over response tokens only; other methods have others (``vgid.method.methods``). An epoch
is one pass over the forget questions; the retain questions have passes of their own, which go on
from epoch to epoch. Everything random is a function of (seed, epoch), so a resumed trial goes on as
if never stopped. Other than in Algorithm 1 the teacher's noise is drawn once for each portrait and
study, so that trials share its states.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vgid.config import TrialConfig, uses
from vgid.errors import LossNotFiniteError
from vgid.method.checkpoint import load_checkpoint, save_checkpoint
from vgid.method.methods import Distillation, UnlearningMethod, make_method
from vgid.method.sharding import spread
from vgid.method.student import DistillationBatch, View
from vgid.method.teacher import TeacherTarget
from vgid.method.workers import ALONE, Workers, whole
from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded
from vgid.models.packing import pack
from vgid.objectives import vgid_loss
from vgid.prompts import Task
from vgid.results import EpochReport
from vgid.seeds import sample_generator


@dataclass(frozen=True)
class DistillationSet:
    """The student's prompts, of the ORIGINAL images, with the teacher's targets."""

    prompts: Sequence[Encoded]
    targets: Sequence[Sequence[TeacherTarget]]  # by response source: epochs take turns
    tasks: Sequence[Task]
    paired: bool = False  # preferences: a sample learns from all its targets at once
    views: Sequence[Sequence[Encoded]] = ()  # the same on other pictures: steps take turns
    first: Collection[int] = ()  # samples whose portraits come before all others in every pass
    name: str = "forget"  # of the set, which its order is drawn by

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def portraits(self) -> list[Hashable]:
        """What each sample shows; samples that show the same can share its image tokens."""
        return [tuple(picture.key for picture in prompt.pictures) for prompt in self.prompts]

    @cached_property
    def turns(self) -> list[int]:
        """Which of several targets each sample begins with: each as often in every task."""
        # Shuffled: in the data's order, everyone's one cloze question would have the same turn.
        turns = [0] * len(self)
        begun: Counter[Task] = Counter()
        for i in sample_generator(0, "turns").permutation(len(self)).tolist():
            turns[i] = begun[self.tasks[i]]
            begun[self.tasks[i]] += 1
        return turns

    def batches(self, config: TrialConfig, batch_size: int, name: str) -> list[list[int]]:
        """A pass over the samples in nearly equal batches: portraits in turn, tasks in proportion.

        A portrait gives its next ``config.questions_per_image`` questions at each of its evenly
        spread turns, each of the task that is furthest behind its share of all samples.
        """
        # Why not a plain shuffle: of five people with 20 questions, a batch of 8 would hold 4 or 5
        # portraits, each at the cost of its image tokens, and not two with 4 questions each; and
        # the few cloze questions would bunch, so that some steps see three and others none.
        together, first = config.questions_per_image, {self.portraits[i] for i in self.first}
        left: dict[Hashable, dict[Task, list[int]]] = {}
        for i in sample_generator(config.seed, name).permutation(len(self)).tolist():
            left.setdefault(self.portraits[i], {}).setdefault(self.tasks[i], []).append(i)
        turns = []
        for place, (portrait, groups) in enumerate(left.items()):
            count = math.ceil(sum(map(len, groups.values())) / together)
            for turn in range(count):
                opens = turn == 0 and portrait in first
                turns.append((not opens, (turn + place / len(left)) / count, place, groups))
        shares = {task: n / len(self) for task, n in Counter(self.tasks).items()}
        drawn = dict.fromkeys(shares, 0)
        order: list[int] = []
        for *_, groups in sorted(turns, key=lambda turn: turn[:3]):
            for _ in range(min(together, sum(map(len, groups.values())))):
                # Of 8 generation and 4 cloze questions (shares 2/3 and 1/3), the order opens g c g
                # g c g ...: after any draws a task has had its share, in whole questions.
                behind = {t: shares[t] * (len(order) + 1) - drawn[t] for t in groups if groups[t]}
                task = max(behind, key=behind.__getitem__)
                order.append(groups[task].pop())
                drawn[task] += 1
        return [p.tolist() for p in np.array_split(order, math.ceil(len(order) / batch_size))]

    def rounds(self, indices: Sequence[int], epoch: int) -> list[list[TeacherTarget]]:
        """What the samples learn from in ``epoch``: one list; of paired targets all, in turn."""
        if self.paired:
            return [[targets[i] for i in indices] for targets in self.targets]
        several = len(self.targets)
        return [[self.targets[(self.turns[i] + epoch) % several][i] for i in indices]]


Term = Literal["forget", "retain"]
Shares = dict[Term, list[DistillationBatch]]
"""A rank's share of the batch of each term, in the parts that it is computed in."""


class Student(nn.Module):
    """The adapted model as a module whose forward is a method's loss: DDP sees all of it."""

    def __init__(
        self, model: nn.Module, backbone: Backbone, method: UnlearningMethod | None = None
    ) -> None:
        super().__init__()
        self.model, self.backbone = model, backbone
        self.method = method or Distillation(TrialConfig.model_validate({}), backbone)
        if self.method.layers is not None:
            # DDP would wait for the gradients of layers that are not run.
            layers = backbone.model.model.language_model.layers
            layers[self.method.layers :].requires_grad_(False)

    def forward(self, part: DistillationBatch, term: Term) -> Tensor:
        """This rank's share of L_forget or of L_retain, a scalar."""
        view = View(self.backbone, self.model, part)
        loss = self.method.forget_loss(view) if term == "forget" else self.method.retain_loss(view)
        assert loss is not None, "a method without a retain loss gets no retain batch"
        return loss


def steps_per_epoch(data: DistillationSet, config: TrialConfig) -> int:
    """Optimizer steps of a pass over the forget samples."""
    return math.ceil(len(data) / config.batch_size)


def epoch_batches(data: DistillationSet, config: TrialConfig, epoch: int) -> list[list[int]]:
    """The forget samples of an epoch's steps, each sample once."""
    return data.batches(config, config.batch_size, f"{data.name} epoch {epoch}")


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
    """This rank's share of a step's batch ``indices``, in parts; portraits stay together."""
    # Of the whole batch: a mean of ranks' means would train another model than one rank does.
    tokens = sum(len(t.response) for targets in data.rounds(indices, epoch) for t in targets)
    together: dict[Hashable, list[int]] = {}
    for i in indices:
        together.setdefault(data.portraits[i], []).append(i)
    ordered = [i for portrait in together.values() for i in portrait]
    pieces = np.array_split(ordered, world_size * parts)[rank * parts : (rank + 1) * parts]
    shares = []
    # All samples of a step alike: questions of two views would not share an image.
    shown = (data.prompts, *data.views)[step % (1 + len(data.views))]
    for piece in pieces:
        # A rank without samples must still take part in DDP's reduction.
        mine = piece.tolist() or [indices[0]]
        rounds = data.rounds(mine, epoch)
        targets = [target for each in rounds for target in each]
        prompts = [shown[i] for i in mine] * len(rounds)
        packed = pack(backbone, prompts, [t.response for t in targets])
        hidden_RD = torch.cat([t.hidden_RD for t in targets])
        weight = 1.0 / tokens if len(piece) else 0.0
        shares.append(DistillationBatch(packed, hidden_RD, weight, len(piece) / len(indices)))
    return shares


def epoch_shares(
    backbone: Backbone,
    forget: DistillationSet,
    retain: DistillationSet | None,
    config: TrialConfig,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Shares]:
    """What this rank is shown in each step of an epoch (0-based): its shares of both batches."""
    first, where = epoch * steps_per_epoch(forget, config), (epoch, rank, world_size)
    parts = config.gradient_accumulation
    others = None if retain is None else retain_batches(retain, config, first)
    for step, indices in enumerate(epoch_batches(forget, config, epoch), first):
        shares: Shares = {"forget": share(backbone, forget, indices, *where, parts, step)}
        if retain is not None and others is not None:
            # Without the step: retain people are shown as they are.
            shares["retain"] = share(backbone, retain, next(others), *where, parts)
        yield shares


def learning_rates(config: TrialConfig, steps: int) -> list[float]:
    """Linear warm-up, then linear decay to a tenth: of each of ``steps`` and what would follow."""
    warmup = max(1, round(config.warmup_fraction * steps))
    return [
        config.learning_rate * (min(1.0, (step + 1) / warmup) * (1.0 - 0.9 * step / steps))
        for step in range(steps + 1)
    ]


def distill(
    backbone: Backbone,
    model: Any,
    forget: DistillationSet,
    retain: DistillationSet | None,
    config: TrialConfig,
    *,
    method: UnlearningMethod | None = None,
    trial_id: str = "",
    workers: Workers = ALONE,
    checkpoint: Path | None = None,
) -> Iterator[EpochReport]:
    """Train the attached adapter in place; yields a report after each epoch.

    ``model`` is the ``PeftModel`` around the frozen ``backbone``, with a fresh adapter. The folder
    ``checkpoint`` is resumed from by the same ``trial_id`` only; epochs that it has are reported
    again, since nobody may have heard of them. NaN or infinite loss or gradient is a
    ``LossNotFiniteError``.
    """
    student = Student(model, backbone, method or make_method(config, backbone))
    spread_out, where = spread(student, backbone, workers), (workers.rank, workers.count)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=config.weight_decay)
    reports = load_checkpoint(checkpoint, trial_id, parameters, optimizer) if checkpoint else []
    yield from tuple(reports)
    kept = retain if uses(config.method, "beta") else None
    per_epoch = steps_per_epoch(forget, config)
    rates = learning_rates(config, per_epoch * config.epochs)
    for epoch in range(len(reports), config.epochs):
        model.train()
        # By epoch, not once: a resumed epoch then draws the masks that it would have drawn.
        torch.manual_seed(config.seed * 100_003 + epoch)  # LoRA dropout
        sums_2, norm, step = torch.zeros(2, dtype=torch.float64), 0.0, epoch * per_epoch
        # Algorithm 1, lines 3 to 19; the teachers of lines 6 to 9 come from the store.
        for shares in epoch_shares(backbone, forget, kept, config, epoch, *where):
            losses_2, norm = take_step(spread_out, shares, optimizer, rates[step], config, where[1])
            step += 1
            sums_2 += losses_2
            # Each worker knows the norm, and its own loss only: one that stopped by that would
            # leave the others waiting for it.
            if not math.isfinite(norm):
                break
        model.eval()
        means_2 = workers.sum(sums_2) / per_epoch
        if not (math.isfinite(norm) and bool(means_2.isfinite().all())):
            raise LossNotFiniteError(
                f"loss or gradient is not finite at step {step} (epoch {epoch + 1})"
            )
        reports.append(epoch_report(config, epoch, per_epoch, means_2, rates[step], norm))
        if checkpoint is not None:
            save_checkpoint(checkpoint, trial_id, parameters, optimizer, reports, workers)
        yield reports[-1]


def epoch_report(
    config: TrialConfig, epoch: int, per_epoch: int, means_2: Tensor, rate: float, norm: float
) -> EpochReport:
    """What is told of an epoch: its mean L_F and L_R (fp64), their sum (equation 5), and more."""
    forgotten, retained = means_2
    metrics = {
        "forget_loss": forgotten.item(),
        **({"retain_loss": retained.item()} if uses(config.method, "beta") else {}),
        "loss": vgid_loss(forgotten, retained, config.alpha, config.beta).item(),
        "learning_rate": rate,
        "grad_norm": norm,
    }
    step = (epoch + 1) * per_epoch
    return EpochReport(epoch=epoch + 1, epochs=config.epochs, step=step, metrics=metrics)


def take_step(
    student: nn.Module,
    shares: Shares,
    optimizer: torch.optim.Optimizer,
    rate: float,
    config: TrialConfig,
    world_size: int = 1,
) -> tuple[Tensor, float]:
    """One clipped optimizer step at learning rate ``rate`` on alpha * L_F + beta * L_R: equation 5.

    Gives this rank's unweighted losses L_F and L_R, float64, and the gradient's whole norm.
    """
    # A backward pass for each part of each term: alpha * grad L_F + beta * grad L_R is the gradient
    # of the sum, and one part's activations are gone before the next one's are made.
    weights = {"forget": config.alpha, "retain": config.beta}
    losses = {term: torch.zeros((), dtype=torch.float64) for term in weights}
    parts = [
        (term, shares[term][k]) for k in range(config.gradient_accumulation) for term in shares
    ]
    optimizer.zero_grad(set_to_none=True)
    for number, (term, part) in enumerate(parts, 1):
        last = number == len(parts)
        losses[term] += backward_term(student, part, term, weights[term], world_size, last)
    (group,) = optimizer.param_groups
    norm = float(whole(nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)))
    group["lr"] = rate
    optimizer.step()
    return torch.stack(list(losses.values())), norm


def backward_term(
    student: nn.Module,
    part: DistillationBatch,
    term: Term,
    weight: float,
    world_size: int = 1,
    last: bool = True,
) -> Tensor:
    """Add a part of a term, times its ``weight`` alpha or beta, to the gradient; gives its loss."""
    # Behind the last addition of a step the ranks exchange their gradients.
    waits = not last and isinstance(student, DistributedDataParallel)
    with student.no_sync() if waits else nullcontext():  # type: ignore[operator]
        loss: Tensor = student(part, term)
        # DDP averages over the ranks, whose shares are meant to be summed.
        (weight * loss * world_size).backward()
    return loss.detach().double().cpu()
