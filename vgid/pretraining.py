"""Makes the embedded backbone ``tiny-llava`` from nothing, in two stages.

1. The vision tower learns the twelve attributes of drawn faces (nobody of any benchmark), and is
   frozen.
2. Projector and language model learn packs of questions about pictures (``embedded_recipe``). The
   questions of a pack share picture and instruction (``pretraining_packs``).

Rebuild the shipped weights, or make others, with::

    python -m vgid.pretraining OUT [--seed S] [--data-seed D] [--threads T]

It shows its progress, measures the result by the real path (``backbone_measure``), prints the
table, and writes ``OUT/MEASURED.json`` beside the weights. Weights out of bounds are marked there
(``"within_bounds": false``) and the exit code is 1. The same seed, data seed and thread count give
the same weights bit for bit on one machine.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from vgid.embedded_model import (
    IMAGE_TOKENS,
    build_model,
    build_processor,
    build_tokenizer,
    corpus,
    save,
)
from vgid.embedded_recipe import REFUSALS, Pack, PackKind, Recipe, attribute_pictures, make_recipe
from vgid.encoding import IGNORE
from vgid.errors import InputError
from vgid.portraits import ATTRIBUTE_SIZES
from vgid.pretraining_packs import PackEncoder


@dataclass(frozen=True)
class Schedule:
    """How long and how fast both stages learn.

    Attributes:
        tower_steps: optimizer steps of stage 1, on ``tower_batch`` of ``tower_pictures`` pictures.
        language_steps: optimizer steps of stage 2.
        packs: by kind: packs a step, questions a pack, weight of the loss.
    """

    tower_steps: int = 450
    tower_batch: int = 128
    tower_pictures: int = 6000
    tower_rate: float = 1.5e-3
    language_steps: int = 800
    language_rate: float = 2.5e-3
    packs: tuple[tuple[PackKind, int, int, float], ...] = (
        ("plain", 26, 3, 0.70),
        ("instructed", 5, 3, 0.18),
        ("degraded", 5, 2, 0.12),
    )


def pixel_values(processor: Any, pictures: Sequence[Any]) -> Tensor:
    """Pictures through the backbone's own image processor: float32 of shape (N, 3, 64, 64)."""
    output = processor.image_processor(images=list(pictures), return_tensors="np")
    return torch.from_numpy(output["pixel_values"])


def tower_features(model: Any, pixels_NCHW: Tensor) -> Tensor:
    """What LLaVA hands to its projector: last hidden states less the class token."""
    states = model.model.vision_tower(pixels_NCHW, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def _optimizer(
    parameters: list[nn.Parameter], rate: float, steps: int, warmup: int, floor: float, decay: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=decay)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
        return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_tower(model: Any, processor: Any, schedule: Schedule, seed: int) -> Iterator[float]:
    """Stage 1: teach the vision tower to read the attributes of a face, then freeze it.

    Yields:
        The loss of each step.
    """
    pictures, attributes = attribute_pictures(seed, schedule.tower_pictures)
    pixels_NCHW = pixel_values(processor, pictures)
    targets_NA = torch.from_numpy(attributes)
    sizes = list(ATTRIBUTE_SIZES.values())
    generator = torch.Generator().manual_seed(seed)
    tower, width = model.model.vision_tower, model.config.vision_config.hidden_size
    head = nn.Sequential(
        nn.LayerNorm(width * IMAGE_TOKENS), nn.Linear(width * IMAGE_TOKENS, sum(sizes))
    )
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer, rates = _optimizer(
        parameters, schedule.tower_rate, schedule.tower_steps, warmup=40, floor=0.0, decay=0.02
    )
    batch = schedule.tower_batch
    for _ in range(schedule.tower_steps):
        rows = torch.randint(len(pixels_NCHW), (batch,), generator=generator)
        # A third of the pictures a little grainy, so that mild noise does not blind the tower.
        grain = (torch.rand(batch, 1, 1, 1, generator=generator) < 0.3) * torch.rand(
            batch, 1, 1, 1, generator=generator
        )
        chosen = pixels_NCHW[rows]
        chosen = chosen + grain * torch.randn(chosen.shape, generator=generator)
        logits = head(tower_features(model, chosen).flatten(1)).split(sizes, dim=1)
        loss = torch.stack(
            [F.cross_entropy(x, y) for x, y in zip(logits, targets_NA[rows].T, strict=True)]
        ).mean()
        _step(loss, parameters, optimizer, rates)
        yield loss.item()
    tower.requires_grad_(False)


def train_language(
    model: Any, processor: Any, recipe: Recipe, schedule: Schedule
) -> Iterator[float]:
    """Stage 2: teach projector and language model the recipe's packs.

    Yields:
        The weighted loss of each step.
    """
    core = model.model
    with torch.no_grad():
        features_NPD = torch.cat(
            [
                tower_features(model, pixel_values(processor, chunk))
                for chunk in _chunks(list(recipe.pictures.pixels_NHWC), 256)
            ]
        )
    encoder = PackEncoder(processor.tokenizer)
    modules = (core.multi_modal_projector, core.language_model, model.lm_head)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer, rates = _optimizer(
        parameters,
        schedule.language_rate,
        schedule.language_steps,
        warmup=50,
        floor=0.05,
        decay=0.01,
    )
    for _ in range(schedule.language_steps):
        total = 0.0
        for kind, count, turns, weight in schedule.packs:
            packs = recipe.draw(kind, count, turns)
            loss = weight * _pack_loss(model, encoder, packs, features_NPD)
            loss.backward()
            total += loss.item()
        _step(None, parameters, optimizer, rates)
        yield total


def _pack_loss(
    model: Any, encoder: PackEncoder, packs: Sequence[Pack], features_NPD: Tensor
) -> Tensor:
    """Mean cross-entropy over the response tokens of the packs."""
    batch = encoder.collate(packs)
    pictures = [pack.picture for pack in packs if pack.picture is not None]
    embedded_BLD = model.get_input_embeddings()(batch.ids_BL)
    if pictures:
        projected = model.model.multi_modal_projector(features_NPD[pictures])
        image_BL1 = (batch.ids_BL == model.config.image_token_id)[..., None]
        embedded_BLD = embedded_BLD.masked_scatter(image_BL1, projected)
    hidden_BLD = model.model.language_model(
        inputs_embeds=embedded_BLD,
        attention_mask=batch.mask_B1LL,
        position_ids=batch.positions_BL,
        use_cache=False,
    ).last_hidden_state
    targets_BL = batch.labels_BL[:, 1:]
    predicts_BL = targets_BL != IGNORE
    return F.cross_entropy(model.lm_head(hidden_BLD[:, :-1][predicts_BL]), targets_BL[predicts_BL])


def _step(
    loss: Tensor | None,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rates: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One clipped optimizer step; without a loss the gradients are already there."""
    if loss is not None:
        loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    rates.step()
    optimizer.zero_grad()


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def pretrain(
    seed: int, data_seed: int, schedule: Schedule, progress: Any | None = None
) -> tuple[Any, Any]:
    """Run both stages.

    Args:
        seed: initialisation and every draw of the training.
        data_seed: the people whom the model is to know.
        schedule: lengths and rates.
        progress: a rich ``Progress`` to report to.

    Returns:
        The model in evaluation mode and its processor.
    """
    refusals = [f" {text}" for text in REFUSALS.values()]
    tokenizer = build_tokenizer(corpus(refusals))
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, seed)
    model.train()
    recipe = make_recipe(data_seed, seed)
    stages = (
        ("vision tower", schedule.tower_steps, train_tower(model, processor, schedule, seed)),
        (
            "language model",
            schedule.language_steps,
            train_language(model, processor, recipe, schedule),
        ),
    )
    for name, steps, losses in stages:
        task = progress.add_task(name, total=steps) if progress is not None else None
        for loss in losses:
            if not math.isfinite(loss):
                raise ArithmeticError(f"{name}: the loss became {loss}")
            if progress is not None:
                progress.update(task, advance=1, description=f"{name}, loss {loss:.3f}")
    return model.eval(), processor


def main(
    out: Annotated[Path, typer.Argument(help="folder for the weights; replaced if it exists")],
    seed: Annotated[int, typer.Option(min=0, help="seed of the training")] = 0,
    data_seed: Annotated[int, typer.Option(min=0, help="seed of the people to know")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads")] = 1,
) -> None:
    """Make the embedded backbone from nothing, measure it, and write it to OUT."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    torch.set_num_threads(threads)
    console = Console()
    out = out.absolute()
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / "MEASURED.json").is_file()
    ):
        raise InputError(f"OUT: {out} holds something else than a backbone; name another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        model, processor = pretrain(seed, data_seed, Schedule(), progress)
    provenance = {
        "command": f"python -m vgid.pretraining OUT --seed {seed} --data-seed {data_seed} "
        f"--threads {threads}",
        "seed": seed,
        "data_seed": data_seed,
        "threads": threads,
        "training_seconds": round(time.monotonic() - started),
    }
    scores, misses = write_measured(model, processor, out, provenance)
    _print_table(console, scores, misses)
    if misses:
        console.print(f"Out of bounds, and marked so: {', '.join(misses)}.", style="bold red")
        sys.exit(1)


def write_measured(
    model: Any, processor: Any, out: Path, provenance: dict[str, Any]
) -> tuple[dict[str, float], list[str]]:
    """Save a backbone, load it as users do, measure it, and move it to ``out`` as a whole.

    Args:
        model: trained model.
        processor: its processor.
        out: final folder; a backbone that is there already is replaced.
        provenance: how it was made; ``data_seed`` names the people to measure on. Recorded in
            ``MEASURED.json`` together with the scores.

    Returns:
        The scores, and the names of those out of bounds.
    """
    from vgid.backbone_measure import measure, out_of_bounds
    from vgid.backbones import load

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        save(model, processor, folder)
        scores = measure(load("tiny-llava", str(folder)), provenance["data_seed"])
        misses = out_of_bounds(scores)
        record = {**provenance, "within_bounds": not misses, "scores": scores}
        (folder / "MEASURED.json").write_text(json.dumps(record, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)
    return scores, misses


def _print_table(console: Any, scores: dict[str, float], misses: Sequence[str]) -> None:
    from rich.table import Table

    from vgid.backbone_measure import BOUNDS

    table = Table("score", "value", "bounds")
    for name, score in scores.items():
        bounds = "{} to {}".format(*BOUNDS[name]) if name in BOUNDS else ""
        style = "red" if name in misses else None
        table.add_row(name, f"{score:.3f}", bounds, style=style)
    console.print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
