"""An hour of one study with a kill every few minutes: what stays behind, and how memory grows.

``make soak``, or ``python -m tests.end_to_end.soak --minutes 60``. ``KILL_SEED`` draws other
moments.

A study of light trials runs in two slots on a Ray head that is there before and after it, recorded
on an MLflow server. Its driver is never killed: every few seconds its memory and its open files are
counted. Everything else is killed in turn. What must be as before is counted on the head after a
short study and again after the long one: placement groups, processes, files that the processes of
both times hold open, and temporary files. The slope is that of a least-squares line through the
driver's resident memory behind the first fifth; the interval is the 95 % of a bootstrap of blocks
of its residuals, for neighbouring values differ little. A driver keeps a record of each trial, so
that the memory of one whose trials end at a steady rate is flat when it grows by their records.
"""

import argparse
import json
import os
import random
import re
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
from ray._private.ray_constants import LOG_MONITOR_MAX_OPEN_FILES

from tests.end_to_end.head import Head, ray_head
from tests.end_to_end.light import LightStudy, assert_consistent
from tests.end_to_end.twenty_kills import END_THE_DRIVER, KILLS, SERVER, Server

EVERY_S = 5.0  # between two looks at the driver
WARM_UP = 0.2  # share of the looks that the slope leaves out
BLOCK_S = 120.0  # of the bootstrap, at most a tenth of the series
RESAMPLES = 2000
SETTLES_S = 120.0  # what Ray may take to end what is idle
LAST_KILL_S = 120.0  # before the time is up: a trial that is lost later is not tried again
AWAY_S = 5.0  # how long a killed MLflow server stays away
EPOCH_S = "1.5"
CLOSED = "closed socket"
LOG_MONITOR = "python -u log_monitor.py"
MOST_TRIALS = 100_000  # time ends it, not their number
TRIAL_MB = 0.04
"""What a driver keeps of a light trial, by a study that nothing is killed of: 0.039 [0.035, 0.044].
``python -m tests.end_to_end.soak --minutes 10 --every 1000`` grew by 57 MB an hour, 241 trials in
ten minutes. What kills leak comes on top."""


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
    closed_sockets: int
    """Of Ray's control store, which keeps some of a driver that has gone, of a mere ``ray.init()``
    too, for many minutes; a study with kills may leave no more of them than one without."""


class Watch:
    """Counts what is on a head, from a driver of its own."""

    def __init__(self, head: Head, temporary: Path) -> None:
        self._head, self._temporary = head, temporary
        self._lasting: set[psutil.Process] = set()

    def _processes(self) -> set[psutil.Process]:
        """Ray's own and the study's; idle workers come and go by themselves."""
        found = {self._head.process, *self._head.process.children(recursive=True)}
        # What a study leaves is nobody's child; it is known by its folder for temporary files.
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self._temporary):
                    found.add(process)
        return {process for process in found if not _cmdline(process).startswith("ray::IDLE")}

    def handles(self) -> Counter[tuple[str, str]]:
        """How many files the processes that were there at first hold open, by holder and kind."""
        found: Counter[tuple[str, str]] = Counter()
        for process in self._lasting:
            with suppress(psutil.Error, OSError):
                name = " ".join(Path(part).name for part in process.cmdline()[:3])[:40]
                sockets = _sockets(process)
                for handle in Path(f"/proc/{process.pid}/fd").iterdir():
                    with suppress(OSError):  # closed meanwhile
                        found[name, _kind(str(handle.readlink()), sockets)] += 1
        return found

    def names(self) -> set[str]:
        """The temporary files."""
        return {str(path.relative_to(self._temporary)) for path in self._temporary.rglob("*")}

    def left(self) -> Left:
        """What there is now; file handles are those of processes that were there at first."""
        groups = _placement_groups(self._head)
        found = self._processes()
        self._lasting = self._lasting & found if self._lasting else found
        held, closed = split(self.handles())
        return Left(groups, len(found), held, len(self.names()), closed)

    def settled(self, before: Left | None = None) -> Left:
        """What is left once Ray has ended what is idle: as before, or after ``SETTLES_S``."""
        deadline = time.monotonic() + SETTLES_S
        time.sleep(SETTLES_S / 6)
        now = self.left()
        while before is not None and more(before, now) and time.monotonic() < deadline:
            time.sleep(EVERY_S)
            now = self.left()
        return now


def _sockets(process: psutil.Process) -> set[str]:
    """The inodes of the sockets that are something to the kernel."""
    tables = (Path(f"/proc/{process.pid}/net/{name}") for name in ("tcp", "tcp6", "udp", "unix"))
    return {word for table in tables for word in table.read_text().split()}


def _kind(target: str, sockets: set[str]) -> str:
    """What an open file is, by what its link says; of a path the folder and the first word."""
    if target.startswith("/"):
        ending = " (deleted)" if target.endswith("(deleted)") else ""
        return f"{Path(target).parent.name}/{re.split(r'[^a-z]', Path(target).name)[0]}{ending}"
    if target.startswith("socket:"):
        return "socket" if target[8:-1] in sockets else CLOSED
    return target.removeprefix("anon_inode:").split(":")[0]


def split(handles: Counter[tuple[str, str]]) -> tuple[int, int]:
    """How many of these are held for good, and how many closed sockets Ray's control store has.

    Left out are the logs that Ray's monitor of them reads, as far as Ray bounds them: it keeps
    those of dead workers open until it has ``LOG_MONITOR_MAX_OPEN_FILES``, then closes all and
    opens those of the living.
    """
    logs = sum(
        number
        for (holder, kind), number in handles.items()
        if holder == LOG_MONITOR and kind.startswith("logs/") and kind != "logs/log"  # its own
    )
    closed = sum(
        number
        for (holder, kind), number in handles.items()
        if holder.startswith("gcs_server") and kind == CLOSED
    )
    bounded = min(logs, LOG_MONITOR_MAX_OPEN_FILES)
    return handles.total() - bounded - closed, closed


def more(before: Left, after: Left) -> dict[str, tuple[int, int]]:
    """Of what there is more than before."""
    then, now = asdict(before), asdict(after)
    names = [name for name in then if name != "closed_sockets"]
    return {name: (then[name], now[name]) for name in names if now[name] > then[name]}


def _cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _placement_groups(head: Head) -> int:
    """How many are not removed, as a process of its own is told that is no driver."""
    asked = (
        "import os; from ray._private.state import GlobalState; "
        "from ray._raylet import GcsClientOptions; state = GlobalState(); "
        "asked = GcsClientOptions.create(os.environ['RAY_ADDRESS'], None, True, True); "
        "state._initialize_global_state(asked); rows = state.placement_group_table().values(); "
        "print('GROUPS', sum(row['state'] != 'REMOVED' for row in rows))"
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


class Series:
    """What was seen of the driver while its study ran: seconds, MB, open files."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._looks: list[tuple[float, float, int]] = []

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def look(self, driver: psutil.Process) -> None:
        """Look at the driver, unless it has just ended."""
        with suppress(psutil.Error):
            now = (self.seconds, driver.memory_info().rss / 1e6, driver.num_fds())
            self._looks.append(now)

    def figures(self, until_s: float) -> dict[str, Any]:
        """Medians of the first and last quarter behind the warm-up, and the slope of the memory.

        While trials run: what is loaded to draw the outcome comes on top, once.
        """
        looks = [look for look in self._looks if look[0] < until_s]
        kept = looks[int(WARM_UP * len(looks)) :]
        times, memory, files = (np.array(column) for column in zip(*kept, strict=True))
        quarter = max(1, len(kept) // 4)
        growth = slope(times, memory, np.random.default_rng(0))
        return {
            "minutes": round(float(times[-1]) / 60, 1),
            "looks": len(kept),
            "driver MB": [_median(memory[:quarter]), _median(memory[-quarter:])],
            "driver MB/h": [round(value, 2) for value in growth],
            "driver files": [_median(files[:quarter]), _median(files[-quarter:])],
        }


def _median(values: np.ndarray) -> float:
    return round(float(np.median(values)), 1)


def kill_in_turn(
    study: SoakStudy, server: Server, minutes: float, every_min: float, draw: random.Random
) -> tuple[Series, list[str]]:
    """Kill a process each few minutes until the study is over; what was seen, what was killed."""
    series, killed = Series(), []
    (driver,) = study.wait_for(lambda: study.ended() and study.processes("driver"))
    next_kill, last_kill = 60 * every_min, 60 * minutes - LAST_KILL_S
    kinds: list[str] = []
    while not study.over():
        series.look(driver)
        if next_kill < series.seconds < last_kill:
            next_kill += 60 * every_min * draw.uniform(0.7, 1.3)
            kinds = kinds or [kind for kind in KILLS if kind not in END_THE_DRIVER]
            kind = kinds.pop(draw.randrange(len(kinds)))
            if kind == SERVER:
                server.kill(AWAY_S)
            else:
                study.kill(kind, draw.randrange(len(study.processes(kind)) or 1))
            killed.append(kind)
            print(f"{series.seconds:6.0f} s, {len(study.ended())} ended: {kind}", flush=True)
        time.sleep(EVERY_S)
    return series, killed


def soak(minutes: float, every_min: float, draw: random.Random) -> list[str]:
    """Run it and print its figures as one line of JSON; what leaked, grew or was lost."""
    with place() as (folder, temporary, head, server):
        watch = Watch(head, temporary)

        def study(name: str, trials: int, *more: str) -> SoakStudy:
            (folder / name).mkdir()
            flags = ("--max-concurrent", "2", *more)
            return SoakStudy(head, folder / name, trials, *flags, TMPDIR=str(temporary))

        counted = []
        for name in ("first", "short"):  # what Ray makes once, then what each study leaves
            with study(name, 4) as short:
                assert short.finish() == 0, short.shown()
            counted.append(watch.settled())
            print(f"after the {name} study: {counted[-1]}", flush=True)
        before, handles, names = counted[-1], watch.handles(), watch.names()
        told = ("--tracking-uri", server.uri, "--time-budget", f"{int(minutes * 60)}s")
        with study("long", MOST_TRIALS, *told) as long:
            series, killed = kill_in_turn(long, server, minutes, every_min, draw)
        after = watch.settled(before)
        ended = len(long.ended())
        figures = series.figures(60 * minutes) | {
            "kills": dict(Counter(killed)),
            "trials": ended,
            "before": asdict(before),
            "closed sockets of a short study": before.closed_sockets - counted[0].closed_sockets,
            "after": asdict(after),
            "more file handles": {
                " ".join(key): (handles[key], number)
                for key, number in watch.handles().items()
                if number > handles[key]
            },
            "new temporary files": sorted(watch.names() - names),
        }
        print(json.dumps(figures), flush=True)
        faults = [f"{what}: {n} before, {m} after" for what, (n, m) in more(before, after).items()]
        a_study = before.closed_sockets - counted[0].closed_sockets
        if after.closed_sockets - before.closed_sockets > a_study:
            faults.append(f"closed sockets: {a_study} of a study without kills, more of this one")
        growth, explained = figures["driver MB/h"], TRIAL_MB * ended / minutes * 60
        if growth[1] > explained:
            faults.append(f"memory grows by {growth} MB/h, its trials explain {explained:.0f}")
        assert long.finish() == 0, long.shown()
        statuses = Counter(pd.read_csv(long.output / "trials.csv").status)
        if statuses != {"completed": ended}:
            faults.append(f"trials ended as {dict(statuses)}")
        assert_consistent(long.output, ended, server.store)
        return faults


def main() -> int:
    """Run it; 1 where something leaked, grew or was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=3, help="minutes between two kills")
    options = parser.parse_args()
    draw = random.Random(int(os.environ.get("KILL_SEED", "0")))
    faults = soak(options.minutes, options.every, draw)
    print("; ".join(faults) or "nothing leaked, and the driver keeps no more than its trials")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
