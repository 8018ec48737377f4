"""Would several adapters on one base pay? ``python -m tests.benchmarks.batches [--json]``.

Trials that train together in one process would share the forward pass over the frozen base, as one
step of so many times the questions shares it at best: each adapter's own matrices come on top. So a
step is timed with 1, 2 and 4 times the batch, in turns. Where 4 times the batch takes less than
``TARGET`` times as long, it would be worth building.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import (
    arguments,
    headline,
    in_turns,
    median_interval,
    one_thread,
    ratio_fields,
    report,
)
from tests.benchmarks.step import Workload, fill, large_workload, our_steps, tiny_workload
from vgid.config import TrialConfig

TARGET = 2.5
TIMES = (1, 2, 4)
EACH = TrialConfig().batch_size


def workloads(name: str) -> list[Workload]:
    """A step of one trial, and of as many questions as two and four would have."""
    if name == "100m":
        return [large_workload(portraits_each=times) for times in TIMES]
    return [tiny_workload(name, EACH * times) for times in TIMES]


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Time the steps of a model in turns: how many times as long the larger ones take."""
    with ExitStack() as stack:
        steps = []
        for work in workloads(name):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            sets = fill(work, Path(folder))
            steps.append(stack.enter_context(our_steps(work, sets)))
        one, two, four = in_turns(*steps, rounds=rounds)
    ratios = [[many.cpu / own.cpu for many, own in zip(s, one, strict=True)] for s in (two, four)]
    twice = median_interval(ratios[0])
    return {
        **ratio_fields(ratios[1], TARGET, at_most=True),
        "twice": [twice.median, twice.low, twice.high],
        "step_s": median_interval([own.cpu for own in one]).median,
    }


def main() -> None:
    """Measure and print; exit code 0 also where it would not pay."""
    options = arguments(__doc__, on=False).parse_args()
    one_thread()
    names = ("tiny-llava", "tiny-qwen2.5-vl", "100m")
    found = {name: measure(name, options.rounds) for name in names}
    report(headline("batches", found), options.json)


if __name__ == "__main__":
    main()
