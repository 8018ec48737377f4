"""What a real-size step of distillation does on the accelerator at hand, or should do.

``python -m tests.benchmarks.profile --backbone llava-1.5-7b --random-weights``, and ``--estimate``.

``measure`` times whole steps as ``vgid.method.distillation.distill`` takes them (packing, both
losses, backward pass, clipping, AdamW) on synthetic prompts of the benchmark's lengths;
``estimate`` gives the same figures from the cost model. Both speak of the same work: the FLOPs are
the analytic minimum of ``tests.benchmarks.cost_model``, so MFU counts neither padding nor
recomputation as work done.
"""

import json
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tests.benchmarks.architectures import TEXT_SIZES, random_backbone
from tests.benchmarks.cost_model import (
    distinct_tokens,
    fill_minimum,
    released_minimum,
    step_minimum,
)
from vgid.config import TrialConfig, parse
from vgid.errors import InputError
from vgid.method.distillation import Student, backward_term, share
from vgid.method.profile_prompts import synthetic_set
from vgid.method.student import DistillationBatch
from vgid.models.adapters import attached
from vgid.models.backbones import Backbone, load
from vgid.models.memory import activation_bytes, adapter_bytes, vocabulary_bytes
from vgid.provenance import provenance

LORA_RANK, LORA_DROPOUT = 16, 0.05
"""As the real backbones' search spaces fix them."""
WARM_UP = 2
ASSUMED_MFU = 0.45
ESTIMATED_CARD, ESTIMATED_PEAK = "one H100 SXM", 989.4e12

PEAKS = (
    (r"\bMIG\b", None),  # a slice of a card has a slice of its peak
    (r"H[12]00 NVL", 835.5e12),
    (r"H100 PCIe", 756e12),
    (r"H100.*HBM3|H200|GH200", 989.4e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"RTX 4090", 165.2e12),
)
"""Dense bf16 peak in FLOP/s by device name, the first pattern that fits.

Sources: NVIDIA's data sheets of H100, H200, A100 and L40S (those that state the figure with
sparsity state twice as much) and, for the RTX 4090, appendix A of the Ada architecture white paper
(fp32 accumulation).
"""

COLUMNS = (
    "backbone",
    "source",
    "recomputed",
    "tokens a step",
    "TFLOP a step",
    "s a step",
    "questions/s",
    "tokens/s",
    "MFU",
    "peak memory",
    "released script's FLOPs",
)
TABLE_HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@dataclass(frozen=True)
class Figures:
    """One row: a step measured on a card, or estimated for one.

    Attributes:
        backbone: name.
        source: "estimate" and its assumptions, or card, date and commit.
        checkpointing: whether activations were computed again to save memory.
        questions: of a step, forget and retain.
        tokens: distinct tokens of a step.
        tflop: analytic minimum of a step, in 1e12 FLOPs.
        released_tflop: what the released script needs at the least for the same questions.
        seconds: of a step; measured, the median.
        mfu: share of the dense bf16 peak that did needed work; None where the peak is not known.
        peak_bytes: device memory at its peak, weights included; None on the CPU.
    """

    backbone: str
    source: str
    checkpointing: bool
    questions: int
    tokens: int
    tflop: float
    released_tflop: float
    seconds: float
    mfu: float | None
    peak_bytes: int | None

    def as_json(self) -> dict[str, Any]:
        """All attributes and the rates."""
        rates = {
            "steps_per_second": 1 / self.seconds,
            "questions_per_second": self.questions / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }
        return {**asdict(self), **rates}

    def row(self) -> str:
        """As a line of the Markdown table that ``TABLE_HEADER`` begins."""
        cells = (
            self.backbone,
            self.source,
            "layers" if self.checkpointing else "nothing",
            f"{self.tokens:,}",
            f"{self.tflop:.1f}",
            f"{self.seconds:.3f}",
            f"{self.questions / self.seconds:.1f}",
            f"{self.tokens / self.seconds:,.0f}",
            "unknown" if self.mfu is None else f"{self.mfu:.1%}",
            "not measured" if self.peak_bytes is None else f"{self.peak_bytes / 1e9:.1f} GB",
            f"{self.released_tflop / self.tflop:.1f} times",
        )
        return f"| {' | '.join(cells)} |"


def bf16_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a card by its name, None where it is not in ``PEAKS``."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def profile(
    name: str,
    *,
    random_weights: bool,
    model_path: str | None = None,
    portraits: int = 2,
    questions: int = 7,
    steps: int = 5,
    gradient_checkpointing: bool = False,
    peak_flops: float | None = None,
) -> Figures:
    """Measure a backbone at its true size on the GPU: what the command does.

    Args:
        name: of the backbone.
        random_weights: random weights of the true size in place of the real ones.
        model_path: where the real weights are, in place of the backbone's own source.
        portraits: forget people of a step, and as many retain people.
        questions: of a portrait.
        steps: timed, after a warm-up.
        gradient_checkpointing: compute activations again to save memory.
        peak_flops: dense bf16 FLOP/s of the card, in place of what its name tells.

    Raises:
        InputError: no GPU, not enough memory on it, or no such backbone or weights.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "profile: there is no GPU here to measure; run it where there is one, or add "
            "--estimate for what the cost model predicts."
        )
    if random_weights and model_path is not None:
        raise InputError("profile: --model-path is of no use with --random-weights; drop one.")
    remedy = "--portraits 1" if gradient_checkpointing else "--gradient-checkpointing"
    with out_of_memory_explained(name, remedy):
        backbone = random_backbone(name, "cuda") if random_weights else load(name, model_path)
        return measure(backbone, portraits, questions, steps, gradient_checkpointing, peak_flops)


@contextmanager
def out_of_memory_explained(name: str, remedy: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into the sentence that a user needs.

    Raises:
        InputError: in its place.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"profile: a step of {name} does not fit into the GPU's memory; try {remedy}."
        ) from None


def measure(
    backbone: Backbone,
    portraits: int = 2,
    questions: int = 7,
    steps: int = 5,
    gradient_checkpointing: bool = False,
    peak_flops: float | None = None,
) -> Figures:
    """Time whole steps of distillation on the backbone's device.

    Args:
        backbone: frozen base; it is left as it was.
        portraits: forget people of a step, and as many retain people.
        questions: of a portrait.
        steps: timed, after ``WARM_UP`` others, which also let the tower see each image once.
        gradient_checkpointing: compute activations again to save memory.
        peak_flops: dense bf16 FLOP/s of the device, in place of what its name tells.
    """
    config = _trial(gradient_checkpointing)
    sets = [synthetic_set(backbone, portraits, questions, seed) for seed in (0, 1)]
    chosen = range(portraits * questions)
    on_gpu = backbone.device.type == "cuda"
    seconds = []
    with attached(backbone, config) as model:
        student = Student(model, backbone)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
        model.train()
        for step in range(WARM_UP + steps):
            if on_gpu and step == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
            start = _now(on_gpu)
            batches = [share(backbone, data, chosen, 0)[0] for data in sets]
            _step(student, batches, config, parameters, optimizer)
            seconds.append(_now(on_gpu) - start)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    median = statistics.median(seconds[WARM_UP:])
    peak_flops = peak_flops or bf16_peak(device)
    work = _work(backbone, batches)
    return Figures(
        backbone=backbone.spec.name,
        source=f"{device}, {datetime.now(UTC):%Y-%m-%d}, commit {_commit()}",
        checkpointing=gradient_checkpointing,
        seconds=median,
        mfu=work["tflop"] * 1e12 / median / peak_flops if peak_flops else None,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        **work,
    )


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _trial(gradient_checkpointing: bool) -> TrialConfig:
    values = {
        "lora_rank": LORA_RANK,
        "lora_dropout": LORA_DROPOUT,
        "learning_rate": 1e-4,
        "gradient_checkpointing": gradient_checkpointing,
    }
    return parse(TrialConfig, values, "profile")


def _step(
    student: nn.Module,
    batches: Sequence[DistillationBatch],
    config: TrialConfig,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """One step as ``distill`` takes it."""
    optimizer.zero_grad(set_to_none=True)
    forget, retain = batches
    backward_term(student, forget, "forget", config.alpha)
    backward_term(student, retain, "retain", config.beta)
    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()


def _work(backbone: Backbone, batches: Sequence[DistillationBatch]) -> dict[str, Any]:
    """What the figures say about the work of a step, however long it took."""
    packs = [batch.packed for batch in batches]
    config = backbone.model.config
    return {
        "questions": sum(len(packed.rows) for packed in packs),
        "tokens": sum(map(distinct_tokens, packs)),
        "tflop": step_minimum(config.get_text_config(), packs, LORA_RANK).total / 1e12,
        "released_tflop": released_minimum(config, packs, LORA_RANK).total / 1e12,
    }


def _commit() -> str:
    found = provenance()
    commit = (found["git_commit"] or "unknown")[:7]
    return f"{commit} with changes" if found["git_dirty"] else commit


def estimate(
    name: str,
    portraits: int = 2,
    questions: int = 7,
    peak_flops: float | None = None,
    mfu: float = ASSUMED_MFU,
) -> list[Figures]:
    """What the cost model predicts of ``measure``, without and with gradient checkpointing.

    ``mfu`` is assumed for all that is computed, so that checkpointing, which runs the forward pass
    twice, has a lower one. Peak memory is the sum of the weights in bf16, LoRA in training, the
    kept activations of a term (``vgid.models.memory.activation_bytes``) and two vocabulary
    buffers.

    Args:
        name: of a real backbone.
        portraits: forget people of a step, and as many retain people.
        questions: of a portrait.
        peak_flops: dense bf16 FLOP/s of the card, None for ``ESTIMATED_CARD``.
        mfu: assumed share of it.

    Raises:
        InputError: a backbone whose sizes are not known.
    """
    card = ESTIMATED_CARD if peak_flops is None else f"{peak_flops / 1e12:g} TFLOP/s"
    peak_flops = peak_flops or ESTIMATED_PEAK
    backbone = _outline(name)
    chosen = range(portraits * questions)
    batches = [
        share(backbone, synthetic_set(backbone, portraits, questions, seed), chosen, 0)[0]
        for seed in (0, 1)
    ]
    packs = [batch.packed for batch in batches]
    work = _work(backbone, batches)
    text_config = backbone.model.config.get_text_config()
    forward = fill_minimum(text_config, packs).total / 1e12
    resident = (
        2 * backbone.model.parameters
        + adapter_bytes(text_config, LORA_RANK)
        + vocabulary_bytes(text_config, max(len(batch.teacher_RD) for batch in batches))
    )
    figures = []
    for checkpointing in (False, True):
        computed = work["tflop"] + (forward if checkpointing else 0.0)
        seconds = computed * 1e12 / (mfu * peak_flops)
        activations = max(  # the terms of the loss come one after the other
            activation_bytes(text_config, [pack], LORA_RANK, checkpointing, LORA_DROPOUT > 0)
            for pack in packs
        )
        figures.append(
            Figures(
                backbone=name,
                source=f"estimate for {card}",
                checkpointing=checkpointing,
                seconds=seconds,
                mfu=mfu * work["tflop"] / computed,
                peak_bytes=resident + activations,
                **work,
            )
        )
    return figures


def _outline(name: str) -> Backbone:
    """A backbone without weights that samples can be packed for, on the CPU."""
    backbone = random_backbone(name, "meta")
    backbone.model = SimpleNamespace(
        config=backbone.model.config,
        dtype=backbone.model.dtype,
        device=torch.device("cpu"),
        parameters=sum(p.numel() for p in backbone.model.parameters()),
    )
    return backbone


def main(
    backbone: Annotated[
        str, typer.Option(help="Backbone to profile; with --estimate also `all`.")
    ] = "llava-1.5-7b",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights of the true size; no download.")
    ] = False,
    model_path: Annotated[
        str | None, typer.Option(help="Folder or hub id of the real weights.")
    ] = None,
    portraits: Annotated[
        int, typer.Option(min=1, help="Forget people of a step, and as many retain people.")
    ] = 2,
    questions: Annotated[int, typer.Option(min=1, help="Questions of a portrait.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, after a warm-up.")] = 5,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again.")
    ] = False,
    peak_tflops: Annotated[
        float | None, typer.Option(min=1, help="Dense bf16 peak of the card, if it is not known.")
    ] = None,
    estimated: Annotated[
        bool, typer.Option("--estimate", help="What the cost model predicts; needs no GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Time a real-size training step on the GPU: tokens a second, MFU, peak memory."""
    peak = None if peak_tflops is None else peak_tflops * 1e12
    if estimated:
        names = list(TEXT_SIZES) if backbone == "all" else [backbone]
        rows = [row for name in names for row in estimate(name, portraits, questions, peak)]
    else:
        rows = [
            profile(
                backbone,
                random_weights=random_weights,
                model_path=model_path,
                portraits=portraits,
                questions=questions,
                steps=steps,
                gradient_checkpointing=checkpointing,
                peak_flops=peak,
            )
        ]
    if as_json:
        found = [row.as_json() for row in rows]
        print(json.dumps({"estimates": found} if estimated else found[0]))
    else:
        print("\n".join([TABLE_HEADER, *(row.row() for row in rows)]))


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
