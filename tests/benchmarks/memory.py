"""Peak memory of a step above the weights: ``python -m tests.benchmarks.memory [--json]``.

On ``random_llava``, one portrait of each set with 7 questions, as in ``step``. Each figure is from
a fresh process that took one step before the measured one; weights, adapter, optimizer state and
cached teacher targets are there before it, and what the step needs beyond is what counts.

Above the weights means above those of one model: the public script's second model, although there
before the step, is added to what its step needs. Its questions come in batches of 4, so its peak is
that of 4 questions; a pair of such batches is enough to reach it.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import (
    MIN_ROUNDS,
    arguments,
    median_interval,
    one_thread,
    peak_resident,
    ratio_fields,
    report,
)
from tests.benchmarks.released_step import ReleasedStep
from tests.benchmarks.step import fill, large_workload, our_steps

TARGET = 0.4
SCRIPT_BATCH = 4
MIB = 2**20
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_accumulation_2": {"gradient_accumulation": 2},
    "ours_checkpointing": {"gradient_checkpointing": True},
    "ours_both": {"gradient_accumulation": 2, "gradient_checkpointing": True},
}
"""Settings of our trial; the first is the one that the target is about."""


def prepare_ours(sizes: dict[str, int], settings: dict[str, Any]) -> Callable[[], object]:
    """Our step, its store filled.

    Args:
        sizes: of ``large_workload``.
        settings: of the trial.
    """
    work = large_workload(**sizes)
    with tempfile.TemporaryDirectory() as folder:
        sets = fill(work, Path(folder))
    training = our_steps(work, sets, **settings)
    step = training.__enter__()
    # Held by the call and never left, which would take the adapter off: the process ends with it.
    return partial(_step, step, training)


def _step(step: Callable[[], object], training: object) -> None:
    step()


def prepare_theirs(sizes: dict[str, int]) -> Callable[[], object]:
    """The public script's step on a batch of each set."""
    work = large_workload(**sizes)
    script = ReleasedStep(work.backbone, batch_size=SCRIPT_BATCH)
    forget, retain = work.forget[:SCRIPT_BATCH], work.retain[:SCRIPT_BATCH]
    return lambda: script.step(forget, retain)


def second_model_bytes(sizes: dict[str, int]) -> int:
    """Size of a model's weights."""
    model = large_workload(**sizes).backbone.model
    return sum(p.numel() * p.element_size() for p in model.parameters())


def measure(
    rounds: int = MIN_ROUNDS, variants: Sequence[str] = tuple(VARIANTS), **sizes: int
) -> dict[str, Any]:
    """Peaks of both steps in turns, ours in every variant.

    Args:
        rounds: fresh processes for each.
        variants: of ours, ``ours`` among them.
        sizes: of ``large_workload``.

    Returns:
        The ratio of ours to the script's, and MiB above the weights.
    """
    second = second_model_bytes(sizes)
    peaks: dict[str, list[int]] = {name: [] for name in ("theirs", *variants)}
    methods = set()
    for _ in range(rounds):
        peak = peak_resident(partial(prepare_theirs, sizes))
        peaks["theirs"].append(peak.above + second)
        methods.add(peak.method)
        for name in variants:
            peak = peak_resident(partial(prepare_ours, sizes, VARIANTS[name]))
            peaks[name].append(peak.above)
    ratios = {
        name: [a / b for a, b in zip(peaks[name], peaks["theirs"], strict=True)]
        for name in variants
    }
    return {
        "benchmark": "memory",
        "of": "100m",
        **ratio_fields(ratios["ours"], TARGET, at_most=True),
        **{f"ratio_{name}": median_interval(values).median for name, values in ratios.items()},
        **{f"{name}_mib": median_interval(values).median / MIB for name, values in peaks.items()},
        "second_model_mib": second / MIB,
        "method": ", ".join(sorted(methods)),
    }


def main() -> None:
    """Measure and print; exit code 0 also where the target is missed."""
    options = arguments(__doc__, on=False).parse_args()
    one_thread()
    report(measure(options.rounds), options.json)


if __name__ == "__main__":
    main()
