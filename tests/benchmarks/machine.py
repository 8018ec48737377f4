"""What every benchmark shares: the machine in words, paired timing, peak memory, the report.

Seconds measured on a shared machine mean little on their own, so two ways of doing the same work
are run in turns and their ratio is reported, with the median and its interval over the rounds.
"""

import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
RESET_PEAK = "5"
"""What ``/proc/PID/clear_refs`` takes to set ``VmHWM`` back to the present resident size."""


def machine() -> dict[str, str | int | float]:
    """CPU model, usable cores, memory in GiB, torch threads, versions and the commit measured."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def machine_line(described: Mapping[str, str | int | float]) -> str:
    """What ``machine`` found, as one line."""
    return (
        f"{described['cpu']}, {described['cores']} cores, {described['memory_gib']} GiB, "
        f"{described['threads']} torch threads, torch {described['torch']}, "
        f"Python {described['python']}, commit {described['commit']}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "vgid", "tests")
    return f"{commit} with changes" if changed else commit


@dataclass(frozen=True)
class Seconds:
    """How long one call took: on the wall, and of the processor over all its threads."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with an interval of order statistics, free of assumptions.

    Attributes:
        median: of the rounds' ratios.
        low: lower end of the interval for the median.
        high: upper end.
        coverage: chance that such an interval holds the true median. 0.95 or more from six rounds
            on; with five, the whole range covers it at 0.9375.
    """

    median: float
    low: float
    high: float
    coverage: float


@dataclass(frozen=True)
class Paired:
    """Rounds of two callables run in turns.

    Attributes:
        a: seconds of the first, one entry a round.
        b: seconds of the second.
    """

    a: tuple[Seconds, ...]
    b: tuple[Seconds, ...]

    @property
    def wall_ratio(self) -> Ratio:
        """Wall seconds of ``a`` over those of ``b``: how many times faster ``b`` is."""
        return median_interval([x.wall / y.wall for x, y in zip(self.a, self.b, strict=True)])

    @property
    def cpu_ratio(self) -> Ratio:
        """The same in processor seconds, which other processes disturb less."""
        return median_interval([x.cpu / y.cpu for x, y in zip(self.a, self.b, strict=True)])


def median_interval(values: Sequence[float], level: float = 0.95) -> Ratio:
    """Median with the narrowest symmetric order-statistic interval that covers ``level``.

    Source: David and Nagaraja, Order Statistics (2003), section 7.1: the k-th smallest and the
    k-th largest of n values hold the median with chance 1 - 2 P(Binomial(n, 1/2) < k).

    Args:
        values: independent measurements, at least one.
        level: wanted coverage; too few values give their range and its smaller coverage.
    """
    ordered = sorted(values)
    n = len(ordered)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k = max((k for k in range(1, (n + 1) // 2 + 1) if coverage(k) >= level), default=1)
    return Ratio(statistics.median(ordered), ordered[k - 1], ordered[-k], coverage(k))


def paired(a: Callable[[], object], b: Callable[[], object], rounds: int = 5) -> Paired:
    """Run ``a`` and ``b`` in turns, after one call of each that is not timed.

    Raises:
        ValueError: fewer than five rounds, too few for an interval.
    """
    if rounds < 5:
        raise ValueError(f"paired: {rounds} rounds give no interval; take at least 5")
    a()
    b()
    timed = [(_timed(a), _timed(b)) for _ in range(rounds)]
    return Paired(tuple(x for x, _ in timed), tuple(y for _, y in timed))


def _timed(call: Callable[[], object]) -> Seconds:
    gc.collect()  # the other call's garbage is not this one's time
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


@dataclass(frozen=True)
class Peak:
    """Resident memory of a process around one call, in bytes.

    Attributes:
        before: resident just before the call: weights, libraries, the optimizer's state.
        peak: the most that was resident during it.
        method: ``VmHWM`` (the kernel's high-water mark, exact) or ``sampled`` (every millisecond).
    """

    before: int
    peak: int
    method: Literal["VmHWM", "sampled"]

    @property
    def above(self) -> int:
        """What the call needed beyond what was there before it."""
        return self.peak - self.before


def peak_resident(prepare: Callable[[], Callable[[], object]]) -> Peak:
    """Peak resident memory of a call, measured in a fresh process.

    Args:
        prepare: picklable (a function of a module, or a ``functools.partial`` of one); called in
            the fresh process, it loads what the call needs and returns the call. The call is made
            twice: once to warm up caches, allocator and optimizer, then to be measured.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        return fresh.submit(_measure_peak, prepare, torch.get_num_threads()).result()


def _measure_peak(prepare: Callable[[], Callable[[], object]], threads: int) -> Peak:
    import torch

    torch.set_num_threads(threads)
    call = prepare()
    call()
    gc.collect()
    # Freed memory that the allocator keeps would count as there before, and hide what the call
    # takes from it.
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except OSError:
        with _sampled_resident() as sampled:
            call()
        return Peak(before, max(before, *sampled), "sampled")
    call()
    return Peak(before, _status_bytes("VmHWM"), "VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {name}")


@contextmanager
def _sampled_resident() -> Iterator[list[int]]:
    """Resident bytes, read every millisecond until the block is left."""
    values, stop = [_status_bytes("VmRSS")], threading.Event()

    def sample() -> None:
        while not stop.wait(0.001):
            values.append(_status_bytes("VmRSS"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        stop.set()
        thread.join()


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result: a table, or one last line of JSON.

    Args:
        result: numbers, texts, lists and mappings of them; nothing private.
        as_json: JSON, in which NaN and infinity are refused.
    """
    if as_json:
        print(json.dumps(result, allow_nan=False), flush=True)
        return
    table = Table("measured", "value")
    for name, value in _flat(result):
        table.add_row(name, value)
    Console().print(table)


def _flat(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(_cell(entry) for entry in value)
        else:
            yield f"{prefix}{name}", _cell(value)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
