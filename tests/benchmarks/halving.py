"""What successive halving is worth: ``python -m tests.benchmarks.halving``, no model is run.

First, whether an epoch's scores tell the last one's: Kendall's tau-b between them over recorded
trials (``record_trials``), on search questions, by objective and by front of a non-dominated sort,
with the middle 95 % of bootstraps over trials. Each file is a recording of the same settings by
another schedule of the learning rate; ``gain`` is a schedule's tau minus the first file's, paired.

Then the first file is replayed as studies of one slot that search at random and harvest the
default's scales: in random orders, of which ``vgid.study.halving`` stops what it does. Told are the
trials that are stopped and the seconds of all, the held-out hypervolume at their end and in as many
seconds as so many whole trials take, and the share of stops that were certain before the retain
people were asked, whatever those would have answered. Means over the orders, of hypervolumes with
the middle 95 % of them. Seconds are processor
seconds of a trial: training, evaluation, and the objectives for each rung and scale more.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from tests.benchmarks.harvest import DATA, EVALUATION_S, WAYS, Points, candidates, reached
from tests.benchmarks.record_trials import BASE, SCHEDULES
from vgid.pareto import front_mask
from vgid.report.tables import Grid
from vgid.results import rungs
from vgid.study.halving import goes_on

FILES = [DATA, *(DATA.with_stem(f"{DATA.stem}-{name}") for name in SCHEDULES if name != "linear")]
EPOCHS = 5
RULES: dict[str, tuple[int, list[int]]] = {
    "none": (1, []),
    "2": (2, rungs(2, EPOCHS)),
    "3": (3, rungs(3, EPOCHS)),
    "2, epoch 1 alone": (2, [1]),
    "2, epoch 2 alone": (2, [2]),
}
"""Eta and the epochs behind which it is asked."""
AFTER = (2, 3, 4, 5)  # whole trials; later a rule that stops half has run out of the recorded ones
RETAIN = np.linspace(0, 1, 51)  # what the retain people may answer


def curves(table: pd.DataFrame) -> Points:
    """Reduction and retain ROUGE-L on search questions after each epoch: (trials, epochs, 2)."""
    base, rows = table[table.trial == BASE].iloc[0], table[(table.trial != BASE)]
    plain = rows[rows.scale == 1].sort_values(["trial", "epoch"])
    return candidates(plain, base)[:, :2].reshape(-1, EPOCHS, 2)


def fronts(points: Points) -> Points:
    """The front of each maximised point, 0 for those that no other dominates: (N,) for (N, d)."""
    front, left = np.zeros(len(points)), np.arange(len(points))
    while len(left):
        left = left[~front_mask(points[left])]
        front[left] += 1
    return front


def taus(then: Points, last: Points) -> Points:
    """Kendall's tau-b of reduction, retain ROUGE-L and front: (3,) for two of (trials, 2)."""
    from scipy.stats import kendalltau

    pairs = [*zip(then.T, last.T, strict=True), (fronts(then), fronts(last))]
    return np.array([kendalltau(a, b).statistic for a, b in pairs])


def interval(of: Callable[[Any], Points], trials: int, resamples: int) -> list[str]:
    """What ``of`` gives for all trials, with the middle 95 % of what it gives for resamples."""
    draw = np.random.default_rng(0)
    drawn = np.array([of(draw.integers(trials, size=trials)) for _ in range(resamples)])
    bounds = np.nanquantile(drawn, [0.025, 0.975], axis=0).T
    return [
        f"{value:.2f} [{low:.2f}, {high:.2f}]"
        for value, (low, high) in zip(of(np.arange(trials)), bounds, strict=True)
    ]


def agreement(recorded: dict[str, Points], resamples: int) -> list[list[Any]]:
    """A row for each schedule and epoch before the last: how its scores tell the last one's."""
    rows: list[list[Any]] = []
    first = next(iter(recorded.values()))
    for name, own in recorded.items():
        for epoch in range(EPOCHS - 1):

            def tau(which: Any, curve: Points = own, epoch: int = epoch) -> Points:
                return taus(curve[which, epoch], curve[which, -1])

            def gain(which: Any, epoch: int = epoch, own: Points = own) -> Points:
                return taus(own[which, epoch], own[which, -1]) - taus(
                    first[which, epoch], first[which, -1]
                )

            both = min(len(own), len(first))
            cells = interval(tau, len(own), resamples)
            gained = ["", ""] if own is first else interval(gain, both, resamples)[:2]
            rows.append([name, len(own), epoch + 1, *cells, *gained])
    return rows


@dataclass(frozen=True)
class Recorded:
    """A trial as a replay knows it."""

    curve: Points  # (epochs, 2), see ``curves``
    epoch_s: float
    scoring_s: float  # of the objectives, once
    found: Points  # its candidates, see ``harvest.candidates``


def recordings(table: pd.DataFrame) -> list[Recorded]:
    """The trials of a file."""
    base, rows = table[table.trial == BASE].iloc[0], table[table.trial != BASE]
    return [
        Recorded(
            curve,
            group.train_s.max() / EPOCHS,
            group.evaluate_s.median(),
            candidates(group[WAYS["the default's"](group)], base),
        )
        for curve, (_, group) in zip(curves(table), rows.groupby("trial"), strict=True)
    ]


@dataclass
class Study:
    """A study of one slot under a rule; its trials are told one after the other."""

    eta: int
    asked: list[int]

    def __post_init__(self) -> None:
        self.rungs: dict[int, list[tuple[float, ...]]] = {epoch: [] for epoch in self.asked}
        self.seconds, self.stopped, self.certain = 0.0, 0, 0
        self.ended: list[tuple[float, Recorded]] = []

    def run(self, trial: Recorded) -> None:
        """Train a trial until it is stopped or ends."""
        for epoch in range(1, EPOCHS + 1):
            self.seconds += trial.epoch_s
            if epoch not in self.asked:
                continue
            self.seconds += trial.scoring_s
            own, others = tuple(trial.curve[epoch - 1].tolist()), self.rungs[epoch]
            verdict = goes_on(own, others, self.eta)
            if not verdict:
                self.stopped += 1
                self.certain += not any(goes_on((own[0], y), others, self.eta) for y in RETAIN)
            others.append(own)
            if not verdict:
                return
        self.seconds += EVALUATION_S + (len(trial.found) - 1) * trial.scoring_s
        self.ended.append((self.seconds, trial))

    def volume(self, seconds: float, base: Any) -> float:
        """Held-out hypervolume of what has ended by then."""
        found = [trial.found for at, trial in self.ended if at <= seconds]
        return reached(np.concatenate(found), base)[0] if found else 0.0


def _spread_over_orders(volumes: Points) -> str:
    low, high = np.quantile(volumes, [0.025, 0.975])
    return f"{volumes.mean():.4f} [{low:.3f}, {high:.3f}]"


def replay(table: pd.DataFrame, orders: int) -> tuple[list[str], list[list[Any]]]:
    """Titles, and a row for each rule."""
    base = table[table.trial == BASE].iloc[0]
    trials = recordings(table)
    draw = np.random.default_rng(0)
    shuffled = [draw.permutation(len(trials)) for _ in range(orders)]
    rows, whole, after = [], 0.0, list(AFTER)
    for name, (eta, asked) in RULES.items():
        studies = []
        for order in shuffled:
            studies.append(study := Study(eta, asked))
            for i in order:
                study.run(trials[i])
        seconds = float(np.mean([study.seconds for study in studies]))
        if not asked:
            whole = seconds / len(trials)
        volumes = [
            np.array([study.volume(limit, base) for study in studies])
            for limit in (np.inf, *(1.01 * whole * count for count in after))
        ]
        stopped = sum(study.stopped for study in studies)
        certain = sum(study.certain for study in studies)
        rows.append(
            [
                name,
                f"{stopped / orders:.1f}",
                f"{seconds:.0f}",
                f"{certain / stopped:.2f}" if stopped else "",
                *map(_spread_over_orders, volumes),
            ]
        )
    titles = ["eta", "stopped", "s of all", "certain", "after all"]
    return [*titles, *(f"in the time of {count}" for count in after)], rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Read flags, compare, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", default=FILES)
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args(arguments)
    tables = {path.stem: pd.read_csv(path) for path in asked.data}
    recorded = {name: curves(table) for name, table in tables.items()}
    titles = ["file", "n", "epoch", "reduction", "retain", "front", "gain, reduction", "retain"]
    told = Grid(titles, agreement(recorded, asked.resamples), "Kendall's tau with the last epoch")
    replayed = Grid(*replay(next(iter(tables.values())), asked.orders), "Replay")
    for grid in (told, replayed):
        if asked.json:
            print(json.dumps([dict(zip(grid.header, row, strict=True)) for row in grid.rows]))
        elif asked.markdown:
            print(grid.markdown() + "\n")
        else:
            Console().print(grid.rich())


if __name__ == "__main__":
    main()
