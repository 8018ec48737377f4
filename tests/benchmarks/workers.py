"""How much faster two workers evaluate than one: ``python -m tests.benchmarks.workers``.

tiny-llava on the synthetic benchmark, each round with other few-shot people, poses and resamples,
so that nothing is taken from what is kept; the first round warms up and does not count. Each worker
has one thread. ``cpu`` is the busiest worker's processor time, which other programs on the machine
hardly change; ``wall`` means something only where each worker has a core to itself.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.workers import run_workers
from vgid.config import RequestConfig
from vgid.data.synthetic import write_benchmark
from vgid.method.workers import Workers
from vgid.trial import TrialSession

ROUNDS = 5


def evaluate(workers: Workers, root: Path) -> list[tuple[float, float]]:
    """Wall and processor seconds of each round."""
    torch.set_num_threads(1)
    store = root / f"store-{workers.count}"
    request = RequestConfig(data=root / "data", store=store, retain_people=20)
    session = TrialSession(request, workers.rank, workers.count)
    seconds = []
    for seed in range(ROUNDS + 1):
        workers.first(seed)  # they begin together
        began = time.perf_counter(), time.process_time()
        session.scores_under("search", seed)
        seconds.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return seconds[1:]


def main() -> int:
    """Print both medians and the ratio of each round."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_benchmark(root / "data")
        found = {n: run_workers(evaluate, n, root / f"{n}", root) for n in (1, 2)}
    for number, clock in enumerate(("wall", "cpu")):
        slowest = {
            n: [max(worker[k][number] for worker in of) for k in range(ROUNDS)]
            for n, of in found.items()
        }
        ratios = [two / one for one, two in zip(slowest[1], slowest[2], strict=True)]
        medians = {f"seconds_{n}": statistics.median(of) for n, of in slowest.items()}
        low, high = min(ratios), max(ratios)
        ratio = {"ratio": statistics.median(ratios), "range": [low, high], "n": ROUNDS}
        print(json.dumps({"clock": clock, **medians, **ratio}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
