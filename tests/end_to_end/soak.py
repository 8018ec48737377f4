"""An hour of one study with a kill every few minutes: what stays behind, and how memory grows.

``make soak``, or ``python -m tests.end_to_end.soak --minutes 60``. ``KILL_SEED`` draws other
moments.

A study of light trials runs in two slots on a Ray head that is there before and after it, recorded
on an MLflow server. Its driver is never killed: every few seconds its memory and its open files are
counted. Everything else is killed in turn. What must be as before is counted on the head after a
short study and again after the long one: placement groups, processes, files that the processes of
both times hold open, and temporary files. The slope is that of a least-squares line through the
driver's resident memory behind the first fifth; the interval is the 95 % of a bootstrap of blocks
of its residuals, for neighbouring values differ little.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from tests.end_to_end.head import Head, ray_head
from tests.end_to_end.light import LightStudy, assert_consistent
from tests.end_to_end.twenty_kills import END_THE_DRIVER, KILLS, SERVER, Server

EVERY_S = 5.0  # between two looks at the driver
WARM_UP = 0.2  # share of the looks that the slope leaves out
BLOCK_S = 120.0  # of the bootstrap, at most a tenth of the series
RESAMPLES = 2000
SETTLES_S = 120.0  # what Ray may take to end what is idle
AWAY_S = 5.0  # how long a killed MLflow server stays away
EPOCH_S = "1.5"
MOST_TRIALS = 100_000  # time ends it, not their number
FLAT_MB_PER_H = 20.0
"""Growth above which the slope's interval may not lie; a trial is kept in some 0.01 MB."""


class SoakStudy(LightStudy):
    """A study whose Ray processes are another's children."""

    def __init__(self, head: Head, *arguments: Any, **environment: str) -> None:
        super().__init__(*arguments, **environment, **head.joining)
        self._head = head

    def _family(self) -> list[psutil.Process]:
        return [*super()._family(), *self._head.process.children(recursive=True)]

    def __exit__(self, *error: object) -> None:
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
            self._driver.wait()


@dataclass(frozen=True)
class Left:
    """What is there on the head while no study runs."""

    placement_groups: int
    processes: int
    file_handles: int
    temporary_files: int


class Watch:
    """Counts what is on a head, from a driver of its own."""

    def __init__(self, head: Head, server: Server, temporary: Path) -> None:
        self._head, self._server, self._temporary = head, server, temporary
        self._lasting: set[psutil.Process] = set()

    def _processes(self) -> set[psutil.Process]:
        """Ray's own and the study's; idle workers come and go by themselves."""
        found = {self._head.process, *self._head.process.children(recursive=True)}
        return {process for process in found if not _cmdline(process).startswith("ray::IDLE")}

    def handles(self) -> dict[str, int]:
        """How many files each of the processes that were there at first holds open, by its name."""
        found: Counter[str] = Counter()
        for process in self._lasting:
            with suppress(psutil.Error):
                line = " ".join(Path(part).name for part in process.cmdline()[:3])
                found[line[:40]] += process.num_fds()
        return dict(found)

    def names(self) -> set[str]:
        """The temporary files."""
        return {str(path.relative_to(self._temporary)) for path in self._temporary.rglob("*")}

    def left(self) -> Left:
        """What there is now; file handles are those of processes that were there at first."""
        found = self._processes()
        self._lasting = self._lasting & found if self._lasting else found
        return Left(
            placement_groups=_placement_groups(self._head),
            processes=len(found),
            file_handles=sum(self.handles().values()),
            temporary_files=len(self.names()),
        )

    def settled(self, before: Left | None = None) -> Left:
        """What is left once Ray has ended what is idle: as before, or after ``SETTLES_S``."""
        deadline = time.monotonic() + SETTLES_S
        time.sleep(SETTLES_S / 6)
        now = self.left()
        while before is not None and more(before, now) and time.monotonic() < deadline:
            time.sleep(EVERY_S)
            now = self.left()
        return now


def more(before: Left, after: Left) -> dict[str, tuple[int, int]]:
    """Of what there is more than before."""
    then, now = asdict(before), asdict(after)
    return {name: (then[name], now[name]) for name in then if now[name] > then[name]}


def _cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _placement_groups(head: Head) -> int:
    """How many are not removed, as a process of its own is told, which leaves no driver behind."""
    asked = (
        "import ray; from ray.util import placement_group_table as table; "
        "ray.init(logging_level='ERROR', log_to_driver=False); "
        "print('GROUPS', sum(row['state'] != 'REMOVED' for row in table().values()))"
    )
    command, environment = [sys.executable, "-c", asked], os.environ | head.joining
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(told.stdout.split("GROUPS")[1])


def slope(times_s: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> tuple[float, ...]:
    """Slope an hour of a least-squares line, and its 95 % interval."""
    hours = times_s / 3600
    line = np.polynomial.Polynomial.fit(hours, values, 1).convert()
    fitted = line(hours)
    residuals, n = values - fitted, len(values)
    length = max(2, min(int(BLOCK_S / EVERY_S), n // 10))
    found = []
    for _ in range(RESAMPLES):
        starts = rng.integers(0, n - length + 1, size=-(-n // length))
        drawn = np.concatenate([residuals[start : start + length] for start in starts])[:n]
        found.append(np.polyfit(hours, fitted + drawn, 1)[0])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(line.coef[1]), float(low), float(high)


@contextmanager
def place() -> Iterator[tuple[Path, Path, Head, Server]]:
    """A folder, one for temporary files of all processes, a head, and an MLflow server."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak")))
        temporary = folder / "temporary"
        temporary.mkdir()
        server = Server(folder / "server", stack)
        root = str(Path(__file__).parent.parent.parent)
        head = stack.enter_context(
            ray_head(2, TMPDIR=str(temporary), PYTHONPATH=root, LIGHT_EPOCH_S=EPOCH_S)
        )
        yield folder, temporary, head, server


def soak(minutes: float, every_min: float, draw: random.Random) -> dict[str, Any]:
    """Run it; all figures."""
    kinds = [kind for kind in KILLS if kind not in END_THE_DRIVER]
    with place() as (folder, temporary, head, server):
        watch = Watch(head, server, temporary)
        flags = ("--max-concurrent", "2")
        told = ("--tracking-uri", server.uri, "--time-budget", f"{int(minutes * 60)}s")

        def study(name: str, trials: int, *more: str) -> SoakStudy:
            (folder / name).mkdir()
            return SoakStudy(head, folder / name, trials, *flags, *more, TMPDIR=str(temporary))

        with study("short", 4) as first:
            assert first.finish() == 0, first.shown()
        before = watch.settled()
        handles, names = watch.handles(), watch.names()
        print(f"before: {before}", flush=True)
        began, looks, killed = time.monotonic(), [], []
        with study("long", MOST_TRIALS, *told) as long:
            (driver,) = long.wait_for(lambda: long.ended() and long.processes("driver"))
            next_kill = began + 60 * every_min
            while not long.over():
                with suppress(psutil.Error):  # it has just ended
                    memory, files = driver.memory_info().rss / 1e6, driver.num_fds()
                    looks.append((time.monotonic() - began, memory, files))
                if time.monotonic() > next_kill and time.monotonic() < began + 60 * minutes - 60:
                    next_kill += 60 * every_min * draw.uniform(0.7, 1.3)
                    if not kinds:
                        kinds = [kind for kind in KILLS if kind not in END_THE_DRIVER]
                    kind = kinds.pop(draw.randrange(len(kinds)))
                    if kind == SERVER:
                        server.kill(AWAY_S)
                    else:
                        long.kill(kind, draw.randrange(len(long.processes(kind)) or 1))
                    killed.append(kind)
                    print(f"{looks[-1][0]:6.0f} s, {len(long.ended())} ended: {kind}", flush=True)
                time.sleep(EVERY_S)
            assert long.finish() == 0, long.shown()
        after = watch.settled(before)
        grown = {
            name: (handles.get(name, 0), number)
            for name, number in watch.handles().items()
            if number > handles.get(name, 0)
        }
        new = sorted(watch.names() - names)
        table = pd.read_csv(long.output / "trials.csv")
        trials = len(table)
        assert set(table.status) == {"completed"}, table.status.value_counts()
        assert_consistent(long.output, trials, server.store)
    # While trials run: what is loaded to draw the outcome comes on top, once.
    looks = [look for look in looks if look[0] < 60 * minutes]
    times, memory, files = (np.array(column) for column in zip(*looks, strict=True))
    kept = slice(int(WARM_UP * len(times)), None)
    growth = slope(times[kept], memory[kept], np.random.default_rng(0))
    quarter = max(1, len(files[kept]) // 4)
    return {
        "minutes": round(times[-1] / 60, 1),
        "kills": len(killed),
        "trials": trials,
        "looks": len(times[kept]),
        "driver MB": [round(float(np.median(memory[kept][s])), 1) for s in _ends(quarter)],
        "driver MB/h": [round(value, 2) for value in growth],
        "driver files": [float(np.median(files[kept][s])) for s in _ends(quarter)],
        "before": asdict(before),
        "after": asdict(after),
        "more file handles": grown,
        "new temporary files": new,
    }


def _ends(quarter: int) -> tuple[slice, slice]:
    return slice(None, quarter), slice(-quarter, None)


def main() -> int:
    """Run it, print the figures as one line of JSON; 1 where something leaked or grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=3, help="minutes between two kills")
    options = parser.parse_args()
    draw = random.Random(int(os.environ.get("KILL_SEED", "0")))
    found = soak(options.minutes, options.every, draw)
    print(json.dumps(found))
    leaked = more(Left(**found["before"]), Left(**found["after"]))
    faults = [f"{name}: {then} before, {now} after" for name, (then, now) in leaked.items()]
    if found["driver MB/h"][1] > FLAT_MB_PER_H:
        faults.append(f"the driver's memory grows by {found['driver MB/h'][0]} MB/h")
    print("; ".join(faults) or "nothing leaked, and the driver's memory is flat")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
