"""Trials with all that a search could know of them, to be replayed without a model.

``python -m tests.benchmarks.record_trials --output FILE.csv --trials 300`` trains settings that are
drawn at random from the backbone's search space, behind its first points, and scores each after
every epoch and, trained, at each of ``SCALES``: the objectives and test ROUGE-L, on search
questions and on held-out ones. A row is one adapter that a study might choose; its seconds are of
one thread's processor. Killed and started again it goes on behind the last trial of the file.
``--schedule`` trains the same settings at learning rates that do not fall from the first epoch on,
``--scales 1`` leaves the other scales out.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vgid.config import RequestConfig, TrialConfig
from vgid.data.synthetic import write_benchmark
from vgid.method import distillation
from vgid.method.sharding import parted
from vgid.models import adapters
from vgid.results import QuestionPart
from vgid.seeds import held_out_seed
from vgid.study.search_space import FOLDER, SearchSpace
from vgid.trial import TrialSession

SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35)
SCORES = ("forget_rougeL", "retain_rougeL", "test_rougeL")
PARTS: tuple[QuestionPart, ...] = ("search", "held_out")
BASE = -1
"""Number of the base's row; it has neither setting nor epochs."""
COLUMNS = ("trial", "epoch", "scale", "teacher_s", "train_s", "evaluate_s")

Row = dict[str, Any]


def constant(config: TrialConfig, steps: int) -> list[float]:
    """The trial's own warm-up, and no decay; as ``distillation.learning_rates``."""
    warmup = max(1, round(config.warmup_fraction * steps))
    return [config.learning_rate * min(1.0, (step + 1) / warmup) for step in range(steps + 1)]


def short_decay(config: TrialConfig, steps: int) -> list[float]:
    """The same until the last fifth of the steps, over which it falls to a tenth.

    Warm-up, stable, decay: Hu et al. 2024 (MiniCPM), section 4; a fifth: Haegele et al. 2024.
    """
    decay = steps / 5
    return [
        rate * (1 - 0.9 * max(0.0, step - (steps - decay)) / decay)
        for step, rate in enumerate(constant(config, steps))
    ]


SCHEDULES: dict[str, Callable[[TrialConfig, int], list[float]]] = {
    "linear": distillation.learning_rates,
    "short-decay": short_decay,
    "constant": constant,
}


def settings(space: SearchSpace, trials: int) -> list[TrialConfig]:
    """The first points, then random ones; the same whatever their number."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = [space.trial_config(point, 0) for point in space.first_points[:trials]]
    for number in range(len(found), trials):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
        found.append(space.trial_config(space.suggest(study.ask()), 0))
    return found


def session_of(backbone: str, forget_ratio: int, folder: Path) -> TrialSession:
    """A session over the synthetic benchmark in a folder, on one thread."""
    import torch

    torch.set_num_threads(1)
    if not (folder / "data").exists():
        write_benchmark(folder / "data")
    return TrialSession(
        RequestConfig(
            backbone=backbone,
            forget_ratio=forget_ratio,
            data=folder / "data",
            store=folder / "store",
            bootstrap_samples=100,
        )
    )


def scored(session: TrialSession) -> Row:
    """Scores of the model as it stands, and the seconds that they took."""
    row: Row = {}
    for part in PARTS:
        seed = 0 if part == "search" else held_out_seed(0, study=True)
        started = time.process_time()
        found = session.scorer.evaluate(part, seed, only=frozenset(SCORES)).scores
        if part == "search":  # what a study's trial pays for
            row["evaluate_s"] = round(time.process_time() - started, 3)
        row |= {f"{part}_{name}": round(found[name].value, 6) for name in SCORES}
    return row


def recorded(
    session: TrialSession, number: int, trial: TrialConfig, scales: Sequence[float] = SCALES
) -> Iterator[Row]:
    """A trial's rows: after each epoch, then at each scale."""
    started = time.process_time()
    epochs, _ = session.preparation.training(trial, str(number), None)
    teacher_s = time.process_time() - started
    with adapters.attached(session.backbone, trial) as model:
        train_s, started = 0.0, time.process_time()
        with parted(session.backbone, trial, session.workers):
            for report in epochs(model):
                train_s += time.process_time() - started
                spent = {"teacher_s": round(teacher_s, 3), "train_s": round(train_s, 3)}
                place = {"trial": number, "epoch": report.epoch, **spent}
                if report.epoch < trial.epochs:
                    model.eval()
                    yield {**place, "scale": 1.0, **scored(session)}
                started = time.process_time()
        for scale in scales:
            with adapters.scaled(model, scale):
                yield {**place, "scale": scale, **scored(session)}


_SESSION: list[TrialSession] = []  # a process's own


def _open(backbone: str, forget_ratio: int, folder: Path, schedule: str) -> None:
    distillation.learning_rates = SCHEDULES[schedule]  # in this process, which is the recorder's
    _SESSION.append(session_of(backbone, forget_ratio, folder))


def _base() -> list[Row]:
    return [{"trial": BASE, "epoch": 0, **scored(_SESSION[0])}]


def _trial(number: int, trial: TrialConfig, scales: Sequence[float]) -> list[Row]:
    return list(recorded(_SESSION[0], number, trial, scales))


def record(
    backbone: str,
    forget_ratio: int,
    trials: int,
    processes: int,
    output: Path,
    schedule: str = "linear",
    scales: Sequence[float] = SCALES,
) -> None:
    """Add to a file the trials that it lacks, each whole."""
    space = SearchSpace.load(FOLDER / f"{backbone}.yaml", backbone)
    planned = dict(enumerate(settings(space, trials)))
    fields = (*COLUMNS, *space.searched, *(f"{part}_{name}" for part in PARTS for name in SCORES))
    there = _numbers(output, fields)
    folder = output.with_suffix(".study")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():  # once, before the processes would
        write_benchmark(folder / "data")
    given = (backbone, forget_ratio, folder, schedule)
    with ProcessPoolExecutor(processes, get_context("spawn"), _open, given) as pool:
        jobs = {pool.submit(_base): BASE} if BASE not in there else {}
        jobs |= {pool.submit(_trial, n, t, scales): n for n, t in planned.items() if n not in there}
        done = as_completed(jobs)
        for job in track(done, "trials", total=len(jobs), console=Console(stderr=True)):
            number = jobs[job]
            searched = planned[number].used if number in planned else {}
            setting = {name: searched.get(name) for name in space.searched}
            _add(output, fields, [{**setting, **row} for row in job.result()])


def _numbers(output: Path, fields: Sequence[str]) -> set[int]:
    """The trials that a file has; it is made if it is not there."""
    if not output.exists():
        output.write_text(",".join(fields) + "\n")
    with output.open(newline="") as stream:
        return {int(row["trial"]) for row in csv.DictReader(stream)}


def _add(output: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    with output.open("a", newline="") as stream:
        csv.DictWriter(stream, fields, lineterminator="\n").writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read flags, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="tiny-llava")
    parser.add_argument("--forget-ratio", type=int, default=10, choices=(5, 10, 15))
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--schedule", default="linear", choices=SCHEDULES)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--output", type=Path, required=True, help="CSV, new or to be gone on with")
    asked = parser.parse_args(arguments)
    given = asked.backbone, asked.forget_ratio, asked.trials, asked.processes, asked.output
    record(*given, asked.schedule, asked.scales)


if __name__ == "__main__":
    main()
