"""Makes an embedded backbone from nothing, in two stages.

1. The vision tower learns the twelve attributes of drawn faces (nobody of any benchmark), and is
   frozen.
2. Projector and language model learn packs of questions about pictures (``recipe``).

Rebuild the shipped weights, or make others, with::

    python -m vgid.bases.pretraining OUT [--backbone NAME] [--seed S] [--data-seed D] [--threads T]

The result is measured by the real path (``measure``), and ``OUT/MEASURED.json`` written beside the
weights. Weights out of bounds are marked there (``"within_bounds": false``) and the exit code is 1.
The same seed, data seed and thread count give the same weights bit for bit on one machine.

What differs between architectures stands under the same names in ``tiny_llava`` and ``tiny_qwen``.

Shape legend: B packs, L tokens of the longest, A position axes, N pictures.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor, nn

from vgid.bases import tiny_llava, tiny_qwen
from vgid.bases.recipe import REFUSALS, Pack, PackKind, Recipe, attribute_pictures
from vgid.data.fictitious import make_world
from vgid.data.portraits import ATTRIBUTE_SIZES, PORTRAIT_SIZE
from vgid.errors import InputError
from vgid.files import appearing
from vgid.models.backbones import Backbone, spec
from vgid.models.encoding import Encoded, Query, encode, response_ids
from vgid.models.packing import Packed, beginning, pack, rotary_positions
from vgid.prompts import PromptStyle, with_instruction

ARCHITECTURES: dict[str, ModuleType] = {"tiny-llava": tiny_llava, "tiny-qwen2.5-vl": tiny_qwen}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast the tower learns in stage 1, the language model in stage 2.

    ``packs`` are those of a step by kind: how many, questions of each, weight of the loss.
    """

    language_steps: int
    tower_steps: int = 450
    tower_batch: int = 128
    tower_pictures: int = 6000
    tower_rate: float = 1.5e-3
    language_rate: float = 2.5e-3
    packs: tuple[tuple[PackKind, int, int, float], ...] = (
        ("plain", 26, 3, 0.70),
        ("instructed", 5, 3, 0.18),
        ("degraded", 5, 2, 0.12),
    )


def _stepper(
    parameters: list[nn.Parameter], rate: float, steps: int, warmup: int, floor: float, decay: float
) -> Callable[[], None]:
    """A clipped AdamW step at each call; linear warm-up, then a cosine down to ``floor``."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=decay)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
        return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)

    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def take_step() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()

    return take_step


def train_tower(
    parts: ModuleType, model: Any, processor: Any, schedule: Schedule, seed: int
) -> Iterator[float]:
    """Stage 1, by its losses: teach the tower to read the attributes of a face; then freeze it."""
    pictures, attributes = attribute_pictures(seed, schedule.tower_pictures)
    pixels = parts.pixel_values(processor, pictures)
    targets_NA = torch.from_numpy(attributes)
    sizes = list(ATTRIBUTE_SIZES.values())
    generator = torch.Generator().manual_seed(seed)
    tower = model.get_submodule(parts.TOWER)
    with torch.no_grad():
        width = parts.tower_features(model, pixels[:1]).numel()
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(sizes)))
    parameters = [*tower.parameters(), *head.parameters()]
    steps, batch = schedule.tower_steps, schedule.tower_batch
    take_step = _stepper(parameters, schedule.tower_rate, steps, warmup=40, floor=0.0, decay=0.02)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        chosen = pixels[rows]
        # A third of the pictures a little grainy, so that mild noise does not blind the tower.
        grainy, strength = (torch.rand(batch, generator=generator) for _ in range(2))
        grain = ((grainy < 0.3) * strength).view(-1, *[1] * (chosen.dim() - 1))
        chosen = chosen + grain * torch.randn(chosen.shape, generator=generator)
        logits = head(parts.tower_features(model, chosen).flatten(1)).split(sizes, dim=1)
        loss = torch.stack(
            [F.cross_entropy(x, y) for x, y in zip(logits, targets_NA[rows].T, strict=True)]
        ).mean()
        loss.backward()
        take_step()
        yield loss.item()
    tower.requires_grad_(False)


def train_language(
    parts: ModuleType, backbone: Backbone, recipe: Recipe, schedule: Schedule
) -> Iterator[float]:
    """Stage 2, by its losses: teach projector and language model the recipe's packs."""
    model, processor = backbone.model, backbone.processor
    pictures = list(recipe.pictures.pixels_NHWC)
    chunks = (pictures[i : i + 256] for i in range(0, len(pictures), 256))
    with torch.no_grad():
        # Once for all steps: the tower is frozen by now.
        pixels = (parts.pixel_values(processor, chunk) for chunk in chunks)
        features_N = torch.cat([parts.tower_features(model, chunk) for chunk in pixels])
    encoder = PackEncoder(parts, backbone)
    # Qwen's is a part of the frozen tower.
    projector = model.get_submodule(parts.PROJECTOR).requires_grad_(True)
    modules = (projector, model.model.language_model, model.lm_head)
    parameters = [p for module in modules for p in module.parameters()]
    steps = schedule.language_steps
    take_step = _stepper(
        parameters, schedule.language_rate, steps, warmup=50, floor=0.05, decay=0.01
    )
    for _ in range(steps):
        total = 0.0
        for kind, count, turns, weight in schedule.packs:
            # Kind by kind, so that each has its share of the gradient however many packs it has.
            loss = weight * _pack_loss(encoder, recipe.draw(kind, count, turns), features_N)
            loss.backward()
            total += loss.item()
        take_step()
        yield total


class PackEncoder:
    """Lays packs out: a row each in the order of the draws, which ``pack`` would sort and bin."""

    def __init__(self, architecture: ModuleType, backbone: Backbone) -> None:
        self.architecture, self.backbone = architecture, backbone
        self._turn = cache(self._turn_of)  # texts come again in most packs

    def collate(self, packs: Sequence[Pack]) -> Packed:
        """One batch, each pack a tree: its turns branch off what stands before their questions."""
        prompts: list[Encoded] = []
        responses: list[list[int]] = []
        trees = []
        for drawn in packs:
            first, stem, tokens = len(prompts), 0, 0
            for text, response in drawn.turns:
                shown = drawn.picture is not None
                stem, prompt, answer = self._turn(text, response, drawn.style, shown)
                # Its own words count as its own even where another question begins with them.
                own = [-1 - len(prompts)] * (len(prompt.prompt_ids) - stem)
                identity = prompt.prompt_ids[:stem] + own
                prompts.append(replace(prompt, identity=identity, pictures=()))
                responses.append(answer)
                tokens += len(own) + len(answer)
            trees.append((list(range(first, len(prompts))), stem + tokens))
        return pack(self.backbone, prompts, responses, trees=trees)

    def _turn_of(
        self, text: str, response: str, style: PromptStyle | None, shown: bool
    ) -> tuple[int, Encoded, list[int]]:
        """How many tokens stand before a question, its prompt, and the response's tokens."""
        image = Image.new("RGB", (PORTRAIT_SIZE, PORTRAIT_SIZE)) if shown else None
        # "the" is one token behind a space too, and no question begins with it.
        asked = [Query("a turn", with_instruction(each, style), image) for each in (text, "the")]
        prompt, other = encode(self.backbone, asked)
        stem = beginning(prompt.prompt_ids, other.prompt_ids)
        return stem, prompt, response_ids(self.backbone, response)


def _pack_loss(encoder: PackEncoder, packs: Sequence[Pack], features_N: Tensor) -> Tensor:
    """Mean cross-entropy over the response tokens of the packs."""
    model = encoder.backbone.model
    batch = encoder.collate(packs)
    pictures = [pack.picture for pack in packs if pack.picture is not None]
    embedded_BLD = model.get_input_embeddings()(batch.ids_BL)
    if pictures:
        projector = model.get_submodule(encoder.architecture.PROJECTOR)
        image_BL1 = (batch.ids_BL == model.config.image_token_id)[..., None]
        embedded_BLD = embedded_BLD.masked_scatter(image_BL1, projector(features_N[pictures]))
    hidden_BLD = model.model.language_model(
        inputs_embeds=embedded_BLD,
        attention_mask=batch.mask_B1LL,
        position_ids=rotary_positions(batch.positions_ABL),
        use_cache=False,
    ).last_hidden_state
    return F.cross_entropy(model.lm_head(batch.predicting(hidden_BLD)), batch.response_ids_R)


def pretrain(
    seed: int,
    data_seed: int,
    schedule: Schedule,
    progress: Progress | None = None,
    backbone: str = "tiny-llava",
) -> tuple[Any, Any]:
    """Run both stages; gives the model in evaluation mode and its processor.

    ``seed`` is of every draw but those of the people to know, which are of ``data_seed``.
    ArithmeticError where a loss is not finite.
    """
    progress = progress or Progress(disable=True)
    parts = ARCHITECTURES[backbone]
    refusals = [parts.FRAME.separator + text for text in REFUSALS.values()]
    tokenizer = parts.build_tokenizer(parts.corpus(refusals))
    processor = tiny_llava.processor(backbone, tokenizer)
    model = tiny_llava.untrained(backbone, tokenizer, seed)
    model.train()
    recipe = Recipe(make_world(data_seed), seed, parts.OBEDIENCE)
    seeing = train_tower(parts, model, processor, schedule, seed)
    untaught = Backbone(spec(backbone), model, processor, "no revision")
    reading = train_language(parts, untaught, recipe, schedule)
    stages = (
        ("vision tower", schedule.tower_steps, seeing),
        ("language model", schedule.language_steps, reading),
    )
    for name, steps, losses in stages:
        task = progress.add_task(name, total=steps)
        for loss in losses:
            if not math.isfinite(loss):
                raise ArithmeticError(f"{name}: the loss became {loss}")
            progress.update(task, advance=1, description=f"{name}, loss {loss:.3f}")
    return model.eval(), processor


def main(
    out: Annotated[Path, typer.Argument(help="folder for the weights; replaced if it exists")],
    seed: Annotated[int, typer.Option(min=0, help="seed of the training")] = 0,
    data_seed: Annotated[int, typer.Option(min=0, help="seed of the people to know")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads")] = 1,
    backbone: Annotated[str, typer.Option(help=", ".join(ARCHITECTURES))] = "tiny-llava",
) -> None:
    """Make an embedded backbone from nothing, measure it, and write it to OUT."""
    from vgid.bases.measure import BOUNDS
    from vgid.report.tables import Grid

    torch.set_num_threads(threads)
    console = Console()
    if backbone not in ARCHITECTURES:
        raise InputError(
            f"--backbone: {backbone} is no embedded backbone; choose one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    out = out.absolute()
    ours = (out / "MEASURED.json").is_file()
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not ours):
        raise InputError(f"OUT: {out} holds something else than a backbone; name another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(language_steps=ARCHITECTURES[backbone].LANGUAGE_STEPS)
    started = time.monotonic()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        model, processor = pretrain(seed, data_seed, schedule, progress, backbone)
    provenance = {
        "command": f"python -m vgid.bases.pretraining OUT --backbone {backbone} --seed {seed} "
        f"--data-seed {data_seed} --threads {threads}",
        "seed": seed,
        "data_seed": data_seed,
        "threads": threads,
        "training_seconds": round(time.monotonic() - started),
    }
    scores, misses = write_measured(backbone, model, processor, out, provenance)
    bounds = {name: f"{low} to {high}" for name, (low, high) in BOUNDS.items()}
    rows = [(name, score, bounds.get(name)) for name, score in scores.items()]
    wrong = [number for number, name in enumerate(scores) if name in misses]
    grid = Grid(("score", "value", "bounds"), rows, marks=dict.fromkeys(wrong, "wrong"))
    console.print(grid.rich())
    if misses:
        console.print(f"Out of bounds, and marked so: {', '.join(misses)}.", style="bold red")
        sys.exit(1)


def write_measured(
    backbone: str, model: Any, processor: Any, out: Path, provenance: dict[str, Any]
) -> tuple[dict[str, float], list[str]]:
    """Save a backbone, load it as users do, measure it, and move it to ``out`` as a whole.

    ``MEASURED.json`` records ``provenance`` and what is returned: the scores, and the names of
    those out of bounds.
    """
    from vgid.bases.measure import measure, out_of_bounds
    from vgid.models.backbones import load

    with appearing(out, replace=True) as folder:
        tiny_llava.save(backbone, model, processor.tokenizer, folder)
        scores = measure(load(backbone, str(folder)), provenance["data_seed"])
        misses = out_of_bounds(scores)
        record = {**provenance, "within_bounds": not misses, "scores": scores}
        (folder / "MEASURED.json").write_text(json.dumps(record, indent=2) + "\n")
    return scores, misses


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
