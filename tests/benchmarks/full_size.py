"""A real backbone at its true size, random weights, phase by phase: seconds and peak memory.

    python -m tests.benchmarks.full_size                    # Qwen2.5-VL-3B in bf16 on the CPU
    python -m tests.benchmarks.full_size --layers 8         # of its 36, where memory is short
    python -m tests.benchmarks.full_size --layers-only      # all three, narrow, with all layers
    python -m tests.benchmarks.full_size --estimate         # the cost model's table, at once

A folder as the hub has it is written and loaded; the teacher rates 8 answers, a step is taken on
them, 8 questions are answered, the adapter is saved, and merged into the files. Peaks are of the
process's memory above what it had before it loaded, reset at each phase (Linux). Beside each
stands what the cost model says (``needed``).

The C library keeps freed tensors below 32 MB for a later one that fits, so that its holes are part
of a CPU process's memory. The measured process gives them back, for a peak is to be of what is
held; ``--keep-freed`` leaves the library as it is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.benchmarks.architectures import TEXT_SIZES, config_of, random_backbone
from tests.hub_folder import write_folder
from vgid.config import TrialConfig
from vgid.deployment.export import merge
from vgid.method.distillation import DistillationSet, distill
from vgid.method.profile_prompts import step_bytes
from vgid.method.samples import TrainingSample
from vgid.method.teacher import PLAIN, TeacherStore
from vgid.models import adapters, backbones
from vgid.models.adapter_files import read_adapter
from vgid.models.backbones import Backbone
from vgid.models.decoding import MAX_BATCH_TOKENS, greedy_tokens
from vgid.models.encoding import Query, encode
from vgid.models.memory import adapter_bytes, cache_bytes
from vgid.models.packing import pack
from vgid.models.store import ContentStore

QUESTIONS = 4  # of each of two portraits
ANSWER_TOKENS = 8  # at most
TRIAL = TrialConfig(
    epochs=1, batch_size=QUESTIONS, retain_batch_size=QUESTIONS, questions_per_image=QUESTIONS
)
PIXELS = 336
SHARD = "2GB"
HUB_SHARD = 5_000_000_000  # a file of the public repositories at most
PHASES = ("load", "teacher", "step", "answers", "export", "merge")
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def needed(backbone: Backbone, weights: int, shard: int, tokens: int) -> dict[str, int]:
    """Bytes of each of ``PHASES`` at its peak, as the cost model has it.

    Args:
        backbone: can lack its weights.
        weights: bytes of them.
        shard: bytes of their largest file; a merged one is made beside it.
        tokens: in the key-value cache while questions are answered.
    """
    text = backbone.model.config.get_text_config()
    adapter = adapter_bytes(text, TRIAL.lora_rank)
    # Behind the step, AdamW's moments are gone; LoRA and its last gradients are not.
    trained = weights + adapter // 2
    step = weights + step_bytes(backbone, TRIAL)
    answers = trained + cache_bytes(text, tokens)
    return dict(zip(PHASES, (weights, weights, step, answers, trained, 2 * shard), strict=True))


def estimate() -> None:
    """Print the table of all backbones in bf16, with as full a cache as an evaluation makes it."""
    print(f"| backbone | {' | '.join(PHASES)} |\n|{'---|' * (len(PHASES) + 1)}")
    for name in TEXT_SIZES:
        backbone = random_backbone(name, "meta")
        weights = sum(p.nbytes for p in backbone.model.parameters())
        found = needed(backbone, weights, min(HUB_SHARD, weights), MAX_BATCH_TOKENS)
        print(f"| {name} | {' | '.join(f'{n / 1e9:.1f} GB' for n in found.values())} |")


def write(name: str, folder: Path, config: Any) -> None:
    """The hub's folder of a backbone, with random weights of a config's sizes, in bf16."""
    from transformers import AutoModelForImageTextToText

    write_folder(name, folder)
    for path in folder.glob("model*"):
        path.unlink()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)


def samples(seed: int) -> list[TrainingSample]:
    """The questions on a portrait."""
    portrait = Image.effect_noise((PIXELS, PIXELS), 40 + seed).convert("RGB")
    return [
        TrainingSample(
            Query(f"ft_Data/{seed}/{k}", f"{'What else is known of them? ' * 4}{k}", portrait),
            f"Answer number {k}, which is made up and as long as others are.",
        )
        for k in range(QUESTIONS)
    ]


def held(what: str = "VmRSS") -> int:
    """Bytes of memory of this process, now or (``VmHWM``) at the peak since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def measure(name: str, folder: Path) -> None:
    """Print each phase's seconds, peak bytes and the cost model's, in this process."""
    backbones._dtype = lambda on_gpu: torch.bfloat16
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    shape = backbones.outline(name, str(folder))  # whose imports are none of it
    prompts = encode(shape, [sample.query for seed in (0, 1) for sample in samples(seed)])
    in_cache = len(prompts) * ANSWER_TOKENS + pack(shape, prompts).ids_BL.numel()
    predicted = needed(shape, sum(sizes), max(sizes), in_cache)
    before = held()

    def phase(label: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        made = work()
        seconds = time.perf_counter() - started
        row = {"phase": label, "seconds": seconds, "peak": held("VmHWM") - before}
        print(json.dumps({"backbone": name, **row, "predicted": predicted[label]}), flush=True)
        return made

    adapter = folder.parent / "adapter"
    trained_and_asked(phase, name, folder, adapter)
    merged = folder.parent / "merged"
    phase("merge", lambda: merge(folder, read_adapter(adapter), merged))


def trained_and_asked(
    phase: Callable[[str, Callable[[], Any]], Any], name: str, folder: Path, adapter: Path
) -> None:
    """The phases with the model in memory."""
    backbone: Backbone = phase("load", lambda: backbones.load(name, str(folder)))
    store = TeacherStore(ContentStore(folder.parent / "store", "teachers"), backbone)

    def taught(part: list[TrainingSample]) -> DistillationSet:
        prompts = encode(backbone, [sample.query for sample in part])
        targets = store.targets(part, PLAIN, "reference")
        return DistillationSet(prompts, [targets], [sample.task for sample in part])

    sets = phase("teacher", lambda: [taught(samples(0)), taught(samples(1))])
    prompts = [prompt for part in sets for prompt in part.prompts]
    with adapters.attached(backbone, TRIAL) as model:
        phase("step", lambda: list(distill(backbone, model, *sets, TRIAL)))
        phase("answers", lambda: greedy_tokens(backbone, prompts, ANSWER_TOKENS))
        phase("export", lambda: adapters.save(model, adapter))


def main() -> int:
    """Write, then measure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="qwen2.5-vl-3b", choices=TEXT_SIZES)
    parser.add_argument("--layers", type=int, metavar="N", help="so many, of the true width")
    parser.add_argument("--layers-only", action="store_true", help="all backbones, narrow")
    parser.add_argument("--estimate", action="store_true", help="print the cost model's table")
    parser.add_argument("--keep-freed", action="store_true", help="as the C library does")
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_folder is not None:
        measure(asked.backbone, asked.in_folder)
    elif asked.estimate:
        estimate()
    else:
        for name in TEXT_SIZES if asked.layers_only else [asked.backbone]:
            layers = TEXT_SIZES[name].layers if asked.layers_only else asked.layers
            in_own_process(name, config_of(name, asked.layers_only, layers), asked.keep_freed)
    return 0


def in_own_process(name: str, config: Any, keep_freed: bool) -> None:
    """Write a backbone's folder, and measure in a process that has not held its weights."""
    root = Path(tempfile.mkdtemp(prefix="full-size-"))
    try:
        write(name, root / name, config)
        command = [sys.executable, "-m", "tests.benchmarks.full_size", "--backbone", name]
        environment = os.environ if keep_freed else os.environ | GIVEN_BACK
        subprocess.run([*command, "--in-folder", str(root / name)], check=True, env=environment)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
