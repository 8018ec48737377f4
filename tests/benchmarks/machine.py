"""What every benchmark shares: the machine in words, paired timing, peak memory, the report.

Seconds measured on a shared machine mean little on their own, so two ways of doing the same work
are run in turns and their ratio is reported, with the median and its interval over the rounds.
All runs on one torch thread, as a trial does on CPU: two threads on a shared machine can be slower.
"""

import argparse
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
MIN_ROUNDS = 5
"""Fewer give no interval worth the name."""
MODELS = ("tiny-llava", "100m")
"""What a benchmark runs on: the embedded backbone, and ``random_llava``."""
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


def paired(a: Callable[[], object], b: Callable[[], object], rounds: int = MIN_ROUNDS) -> Paired:
    """Run ``a`` and ``b`` in turns, after one call of each that is not timed.

    Raises:
        ValueError: fewer than five rounds, too few for an interval.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"paired: {rounds} rounds give no interval; take at least {MIN_ROUNDS}")
    return Paired(*in_turns(a, b, rounds=rounds))


def in_turns(*calls: Callable[[], object], rounds: int) -> tuple[tuple[Seconds, ...], ...]:
    """Run calls in turns, after one of each that is not timed.

    Args:
        calls: what is compared.
        rounds: timed turns; whoever reports an interval takes at least ``MIN_ROUNDS``.

    Returns:
        For each call its seconds, one entry a round.
    """
    for call in calls:
        call()
    timed = [tuple(_timed(call) for call in calls) for _ in range(rounds)]
    return tuple(zip(*timed, strict=True))


def ratio_fields(ratios: Sequence[float], target: float, at_most: bool = False) -> dict[str, Any]:
    """What every benchmark says of a ratio: median, interval, rounds, target, whether it is met.

    Args:
        ratios: one a round.
        target: what the median should reach.
        at_most: the target bounds the median from above.
    """
    found = median_interval(ratios)
    return {
        "ratio": found.median,
        "low": found.low,
        "high": found.high,
        "n": len(ratios),
        "target": target,
        "met": found.median <= target if at_most else found.median >= target,
    }


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


def headline(benchmark: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A benchmark's result, the ratio of its last model in front.

    Args:
        benchmark: its name.
        found: by model, each with ``ratio_fields``.
    """
    of = list(found)[-1]
    names = ("ratio", "low", "high", "n", "target", "met")
    return {"benchmark": benchmark, "of": of, **{n: found[of][n] for n in names}, **found}


def arguments(description: str | None, on: bool = True) -> argparse.ArgumentParser:
    """Command line that every benchmark has.

    Args:
        description: of the benchmark.
        on: whether the model can be chosen.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the result as one last line")
    parser.add_argument(
        "--rounds", type=_rounds, default=MIN_ROUNDS, help="timed turns, at least 5 (default 5)"
    )
    if on:
        parser.add_argument("--on", choices=[*MODELS, "both"], default="both", help="model")
    return parser


def models(on: str) -> tuple[str, ...]:
    """The models that ``--on`` names; the last one gives the headline."""
    return MODELS if on == "both" else (on,)


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"{rounds} rounds give no interval; take at least 5")
    return rounds


def one_thread() -> None:
    """From here on torch computes with one thread, as the workers of a study do."""
    import torch

    torch.set_num_threads(1)


def report(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result as a table, with the machine in one line and, if asked for, one of JSON."""
    described = machine()
    emit(result, as_json=False)
    print(machine_line(described), flush=True)
    if as_json:
        emit({**result, "machine": described}, as_json=True)


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
