"""What a study shows while it runs and when it is done: a live display, or a line per event.

What Ray and other libraries print goes to ``study.log`` in the output folder instead.
"""

import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vgid.command_line import duration
from vgid.evaluation.suppression import doubt
from vgid.report.records import TrialRecord, describe, misses_of
from vgid.report.tables import Grid
from vgid.requirement import OBJECTIVES
from vgid.results import EpochReport, QuestionPart, Score, TrialResult, trial_order


@contextmanager
def libraries_silenced(log: Path) -> Iterator[TextIO]:
    """Send all output of this process and its children to ``log``; yield the real terminal."""
    # By file descriptor, because Ray's C++ parts and child processes write there directly.

    def lead(to_out: int, to_err: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(to_out, 1)
        os.dup2(to_err, 2)

    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace", buffering=1)
    with terminal, log.open("ab") as sink:
        lead(sink.fileno(), sink.fileno())
        try:
            yield terminal
        finally:
            lead(*saved)
            for descriptor in saved:
                os.close(descriptor)


@contextmanager
def last_words(sentence: str) -> Iterator[None]:
    """Have a sentence on stderr should this process be killed, or ended by Ray with its raylet.

    Python does not hear of it. A shell that reads from a pipe does, for the pipe ends too.
    """
    script = 'read -r _ || printf "%s\\n" "$0" >&2'
    shell = subprocess.Popen(
        ["sh", "-c", script, sentence], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        shell.communicate(b"all is well\n")


@dataclass
class Standing:
    """Where the study stands."""

    trials: int  # how many there are to be
    slots: int = 1
    counts: dict[str, int] = field(default_factory=dict)  # ended and lost trials by status
    front: int = 0  # how many are on it
    hypervolume: float | None = None  # of the front, None until the base model is scored
    trial_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))  # of this run's last
    budget_s: float | None = None  # for new trials

    @property
    def ended(self) -> int:
        """Trials that have ended; a lost one has not."""
        return sum(count for status, count in self.counts.items() if status != "lost")

    def left_s(self, elapsed_s: float) -> float | None:
        """Seconds that the remaining trials will take, None while there is nothing to go by."""
        if not self.trial_s:
            return None
        # The median, since a first trial also fills the stores and one that failed took little.
        left = (self.trials - self.ended) * statistics.median(self.trial_s) / self.slots
        if self.budget_s is not None:
            left = min(left, max(0.0, self.budget_s - elapsed_s) + self.trial_s[-1])
        return left


class StudyConsole:
    """The display of one study, which keeps ``standing`` up to date; use as a context manager."""

    def __init__(self, stream: TextIO, standing: Standing) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=not stream.isatty())
        self.standing = standing
        self._started = time.monotonic()
        self._stage = "Starting"
        self._running: dict[str, tuple[str, EpochReport | None]] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.transient = True
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """Print a line, above the live display."""
        self._console.print(line, markup=False)

    def stage(self, name: str) -> None:
        """Name what the study is doing now."""
        self._stage = name
        if self._live is None:
            self.say(f"[{duration(self._elapsed)}] {name}")

    def epoch(self, trial_id: str, label: str, report: EpochReport | None) -> None:
        """A trial started (no report) or reached the end of an epoch."""
        self._running[trial_id] = (label, report)

    def ended(self, trial_id: str, result: TrialResult) -> None:
        """A trial ended; ``standing`` already counts it."""
        self._running.pop(trial_id, None)
        if self._live is not None and result.status == "completed":
            return
        line = f"[{duration(self._elapsed)}] trial {trial_id} {result.status}"
        if result.status == "completed":
            reduction, retain = (result.metrics.get(name, float("nan")) for name in OBJECTIVES)
            line += f": forget reduction {reduction:.3f}, retain {retain:.3f}"
            if misses := misses_of(result):
                line += f", misses {misses}"
        elif result.error is not None:
            line += f": {result.error}"
        self.say(line if self._live else f"{line} | {self._summary()}")

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _summary(self) -> str:
        standing = self.standing
        counts = [f"{standing.ended}/{standing.trials} ended"]
        if self._running:
            counts.append(f"{len(self._running)} running")
        troubled = ((standing.counts.get(name), name) for name in ("failed", "pruned", "lost"))
        counts += [f"{count} {name}" for count, name in troubled if count]
        counts.append(f"front {standing.front}")
        if standing.hypervolume is not None:
            counts.append(f"hypervolume {standing.hypervolume:.4f}")
        left = standing.left_s(self._elapsed)
        if left is not None and standing.ended < standing.trials:
            counts.append(f"about {duration(left)} left")
        return ", ".join(counts)

    def _render(self) -> RenderableType:
        standing = self.standing
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._stage, style="bold"),
            ProgressBar(total=max(1, standing.trials), completed=standing.ended, width=30),
            Text(duration(self._elapsed)),
        )
        lines: list[RenderableType] = [head, Text(self._summary())]
        for name in sorted(self._running, key=trial_order):
            label, report = self._running[name]
            state = "waiting for its first epoch"
            if report is not None:
                state = f"epoch {report.epoch}/{report.epochs}"
                if report.epoch >= report.epochs:
                    state = "evaluating"
                elif "loss" in report.metrics:
                    state += f", loss {report.metrics['loss']:.4g}"
            lines.append(Text(f"  {name}  {label}  {state}", style="dim", no_wrap=True))
        return Group(*lines)


def print_summary(
    stream: TextIO, summary: Mapping[str, Any], front: Sequence[TrialRecord], ui_command: str
) -> None:
    """Print what ``study.json`` and the front hold; the last line opens the MLflow UI."""
    console = Console(
        file=stream, highlight=False, markup=False, width=None if stream.isatty() else 140
    )
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items() if count)
    hypervolume = summary["hypervolume"]
    volume = "" if hypervolume is None else f", hypervolume {hypervolume:.4f}"
    console.print(f"\nTrials: {counts or 'none ended'}{volume}")
    if front:
        console.print(_front_table(front, summary["base"]).rich())
    for said in ("outlook", "agreement"):
        if summary[said] is not None:
            console.print(summary[said])
    unsure = doubt(summary["base"].get("search", {}))
    if unsure is not None:
        console.print(f"Warning: {unsure}")
    phases = [(k, row["total_s"], row.get("median_s")) for k, row in summary["phases"].items()]
    if phases:
        console.print(Grid(("phase", "total s", "median s a trial"), phases, "Phases").rich())
    store = summary["store"]
    if store.get("hit_rate_after_first_trial") is not None:
        console.print(
            f"Teacher store: {store['hit_rate_after_first_trial']:.1%} of "
            f"{store['targets_after_first_trial']:,} targets were there after the first trial; "
            f"{decimal(store['bytes'])} on disk."
        )
    files = (f"  {name}" for name in summary["files"])
    last = [f"Files in {summary['output']}:", *files, ui_command]
    console.print("\n".join(last), soft_wrap=True)


def _front_table(
    front: Sequence[TrialRecord], base: Mapping[QuestionPart, Mapping[str, Score]]
) -> Grid:
    search, held_out_base = base.get("search", {}), base.get("held_out", {})
    reduction, retain = OBJECTIVES
    scored = {reduction: "forget red.", retain: "retain", "test_rougeL": "test"}
    scored |= {name: name for record in front for name in record.objectives if name not in scored}
    again = {reduction: "held-out red.", retain: "held-out retain"}
    if "celebrity_rougeL" in held_out_base:
        again["celebrity_rougeL"] = "held-out celebrities"
    rows: list[list[Any]] = []
    for record in sorted(front, key=lambda record: record.place or (0.0, 0.0)):
        metrics, held_out = record.result.metrics, record.held_out or {}
        cells = [*map(metrics.get, scored), *map(held_out.get, again)]
        rows.append([record.result.trial_id, describe(record.config), *cells])
    before = [_before(search, name) for name in scored]
    before += [_before(held_out_base, name) for name in again]
    return Grid(
        ("trial", "setting", *scored.values(), *again.values()),
        [*rows, ["base", "", *before]],
        "Pareto front",
        marks={len(rows): "base"},
    )


def _before(base: Mapping[str, Score], name: str) -> str | float | None:
    """The base's cell in a column: what a reduction is of, or the score itself."""
    score = base.get(name.removesuffix("_reduction"))
    if score is None:
        return None
    return f"of {score.value:.3f}" if name.endswith("_reduction") else score.value
