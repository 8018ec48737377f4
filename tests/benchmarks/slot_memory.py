"""What a slot takes of the memory: ``python -m tests.benchmarks.slot_memory [--json]``.

A study of ``tiny-llava`` with ``--slots`` slots, in a process of its own, is looked at while each
of them runs trials: at each round the proportional set sizes of all its processes (a page that n
processes share counts 1/n for each), by what Ray calls them. What is there once a slot is summed
to ``slot``; it is what ``RAY_BYTES`` and ``WORKER_BYTES`` in ``vgid/cluster/resources.py`` stand
for. Medians over the rounds and over the processes of a name, in 10^6 bytes; there is no target.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.machine import MIN_ROUNDS, ROOT, arguments, one_thread, report

PAUSE_S = 3.0
TIMEOUT_S = 600
TRAINABLE = "ray::ResourceTrainable"
WORKER = "ray::RayTrainWorker"


def measure(rounds: int = MIN_ROUNDS, slots: int = 2) -> dict[str, Any]:
    """Proportional set sizes by kind of process.

    Args:
        rounds: looks at the study, some seconds apart.
        slots: of the study.
    """
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "study"
        flags = ["--output", str(output), "--trials", "500", "--max-concurrent", str(slots)]
        driver = subprocess.Popen(
            [sys.executable, "studies/pareto_search.py", "--sampler", "random", *flags],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for_trials(driver, output, 2 * slots)
            for _ in range(rounds):
                time.sleep(PAUSE_S)
                for name, size in _sizes(psutil.Process(driver.pid)):
                    found[name].append(size / 1e6)
        finally:
            driver.terminate()
            driver.wait()
    median = {name: statistics.median(sizes) for name, sizes in sorted(found.items())}
    return {
        "benchmark": "slot_memory",
        "of": "tiny-llava",
        "n": rounds,
        "slots": slots,
        "processes": median,
        "slot": {
            "ray": median[TRAINABLE],
            "worker": median[WORKER],
        },
    }


def _wait_for_trials(driver: "subprocess.Popen[bytes]", output: Path, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(output.glob("adapters/[0-9]*"))) < count:
        if driver.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no {count} trials ended; see what the study says without this")
        time.sleep(1)


def _sizes(driver: psutil.Process) -> Iterator[tuple[str, int]]:
    """Name and proportional set size of a study's processes; Ray's titles without the method."""
    for process in [driver, *driver.children(recursive=True)]:
        try:
            first = process.cmdline()[0]
            title = first.split(".")[0] if first.startswith("ray::") else Path(first).name
            yield ("driver" if process == driver else title), process.memory_full_info().pss
        except (psutil.Error, IndexError):  # it has just ended
            continue


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, on=False)
    parser.add_argument("--slots", type=int, default=2, help="of the study (default 2)")
    options = parser.parse_args()
    one_thread()
    report(measure(options.rounds, options.slots), options.json)


if __name__ == "__main__":
    main()
