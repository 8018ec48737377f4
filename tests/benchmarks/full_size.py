"""A real backbone at its true size, random weights, phase by phase: seconds and peak memory.

    python -m tests.benchmarks.full_size                    # Qwen2.5-VL-3B in bf16 on the CPU
    python -m tests.benchmarks.full_size --layers-only      # all three, narrow, with all layers

A folder as the hub has it is written and loaded; the teacher rates 8 answers, a step is taken on
them, 8 questions are answered, the adapter is saved, and merged into the files. Peaks are of the
process's memory above what it had before it loaded, reset at each phase (Linux). Beside each
stands what the cost model says: the weights, and for the step ``step_bytes``.
"""

import argparse
import json
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

from tests.benchmarks.architectures import TEXT_SIZES, config_of
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
from vgid.models.decoding import greedy_tokens
from vgid.models.encoding import Query, encode
from vgid.models.store import ContentStore

QUESTIONS = 4  # of each of two portraits
TRIAL = TrialConfig(
    epochs=1, batch_size=QUESTIONS, retain_batch_size=QUESTIONS, questions_per_image=QUESTIONS
)
PIXELS = 336
SHARD = "2GB"


def narrow(name: str) -> Any:
    """A backbone's config with all its layers and little else."""
    small, true = config_of(name, shrink=True), config_of(name)
    layers = true.get_text_config().num_hidden_layers
    small.get_text_config().num_hidden_layers = layers
    small.get_text_config().layer_types = None
    return small


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
    backbones.outline(name, str(folder))  # imports are none of it
    before = held()

    def phase(label: str, predicted: int, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        made = work()
        seconds = time.perf_counter() - started
        row = {"phase": label, "seconds": seconds, "peak": held("VmHWM") - before}
        print(json.dumps({"backbone": name, **row, "predicted": predicted}), flush=True)
        return made

    adapter = folder.parent / "adapter"
    trained_and_asked(phase, name, folder, adapter)
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    merged = folder.parent / "merged"
    phase("merge", 2 * shard, lambda: merge(folder, read_adapter(adapter), merged))


def trained_and_asked(
    phase: Callable[[str, int, Callable[[], Any]], Any], name: str, folder: Path, adapter: Path
) -> None:
    """The phases with the model in memory."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    backbone: Backbone = phase("load", weights, lambda: backbones.load(name, str(folder)))
    store = TeacherStore(ContentStore(folder.parent / "store", "teachers"), backbone)

    def taught(part: list[TrainingSample]) -> DistillationSet:
        prompts = encode(backbone, [sample.query for sample in part])
        targets = store.targets(part, PLAIN, "reference")
        return DistillationSet(prompts, [targets], [sample.task for sample in part])

    sets = phase("teacher", weights, lambda: [taught(samples(0)), taught(samples(1))])
    prompts = [prompt for part in sets for prompt in part.prompts]
    with adapters.attached(backbone, TRIAL) as model:
        predicted = weights + step_bytes(backbone, TRIAL)
        phase("step", predicted, lambda: list(distill(backbone, model, *sets, TRIAL)))
        phase("8 answers", weights, lambda: greedy_tokens(backbone, prompts, 8))
        phase("export", weights, lambda: adapters.save(model, adapter))


def main() -> int:
    """Write, then measure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="qwen2.5-vl-3b", choices=TEXT_SIZES)
    parser.add_argument("--layers-only", action="store_true", help="all backbones, narrow")
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_folder is not None:
        measure(asked.backbone, asked.in_folder)
        return 0
    for name in TEXT_SIZES if asked.layers_only else [asked.backbone]:
        root = Path(tempfile.mkdtemp(prefix="full-size-"))
        try:
            folder = root / name
            write(name, folder, narrow(name) if asked.layers_only else config_of(name))
            command = [sys.executable, "-m", "tests.benchmarks.full_size", "--backbone", name]
            subprocess.run([*command, "--in-folder", str(folder)], check=True)
        finally:
            shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
