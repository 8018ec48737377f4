"""FLOPs of a step against the analytic minimum: ``python -m tests.benchmarks.flops [--json]``.

Counted by torch's ``FlopCounterMode`` on the project's own step, forward and backward, and on
filling the store for it. The counter does not know attention on the CPU, which is added here with
the formula that it has for attention on a GPU: all pairs of a query and a key in a kernel's call,
masked or not, and in the backward pass the scores once more. The minimum
(``tests.benchmarks.cost_model``) is of the same packs, and counts only pairs of tokens of which one
sees the other, without scores computed again. Nothing here is random, so nothing is repeated.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from tests.benchmarks.cost_model import (
    distinct_tokens,
    fill_minimum,
    step_minimum,
    vision_forward,
)
from tests.benchmarks.machine import arguments, headline, models, one_thread, ratio_fields, report
from tests.benchmarks.step import Sets, Workload, fill, our_steps, workload
from vgid.method.distillation import share
from vgid.method.teacher import Intervention, intervene
from vgid.models.encoding import encode
from vgid.models.packing import Packed, pack

TARGET = 1.15
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


def counted(call: Callable[[], object]) -> dict[str, int]:
    """FLOPs of a call by operation, such as ``aten.mm``."""
    counter = FlopCounterMode(display=False)
    counter.flop_registry.update(CPU_ATTENTION)
    with counter:
        call()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


def attention(operations: dict[str, int]) -> int:
    """What of the counted is products of queries, keys and values."""
    return sum(n for op, n in operations.items() if "attention" in op)


def measure(work: Workload) -> dict[str, Any]:
    """Count a step and a filling.

    Args:
        work: the questions; its model is without an adapter again afterwards.

    Returns:
        Counted over minimum, and FLOPs by part.
    """
    with tempfile.TemporaryDirectory() as folder:
        filled = counted(lambda: fill(work, Path(folder)))
        sets = fill(work, Path(folder))
    shown = teacher_packs(work, sets)
    packs: list[Packed] = [
        part.packed
        for data in sets
        for part in share(work.backbone, data, range(len(data)), epoch=0)
    ]
    config = work.backbone.model.config
    with our_steps(work, sets) as step:
        found = counted(step)
    least = step_minimum(config.get_text_config(), packs, work.trial.lora_rank)
    looked = {p.key: p.tokens for packed in (*shown, *packs) for p in packed.pictures}
    fill_least = fill_minimum(config.get_text_config(), shown).total + sum(
        vision_forward(config, tokens) for tokens in looked.values()
    )
    total = sum(found.values())
    return {
        **ratio_fields([total / least.total], TARGET, at_most=True),
        "counted_gflop": total / 1e9,
        "counted_attention_gflop": attention(found) / 1e9,
        "minimum_gflop": least.total / 1e9,
        "minimum_linear_gflop": least.linear / 1e9,
        "minimum_attention_gflop": least.attention / 1e9,
        "minimum_head_gflop": least.head / 1e9,
        "minimum_lora_gflop": least.lora / 1e9,
        "filling_ratio": sum(filled.values()) / fill_least,
        "filling_gflop": sum(filled.values()) / 1e9,
        "row_tokens": [pack.ids_BL.numel() for pack in packs],
        "tokens": [distinct_tokens(pack) for pack in packs],
    }


def teacher_packs(work: Workload, sets: Sets) -> list[Packed]:
    """What the teacher is shown to fill the store: the forget set's intervention, and nothing."""
    backbone, trial = work.backbone, work.trial
    packs = []
    for samples, data, seen in (
        (work.forget, sets[0], Intervention(trial.noise_type, trial.sigma, trial.prompt_style)),
        (work.retain, sets[1], Intervention()),
    ):
        prompts = encode(backbone, intervene(backbone, [s.query for s in samples], seen))
        packs.append(pack(backbone, prompts, [target.response for target in data.targets[0]]))
    return packs


def main() -> None:
    """Count and print; exit code 0 also where the target is missed."""
    options = arguments(__doc__).parse_args()
    one_thread()
    found = {name: measure(workload(name)) for name in models(options.on)}
    report(headline("flops", found), options.json)


if __name__ == "__main__":
    main()
