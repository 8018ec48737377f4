"""What a harvest is worth: ``python -m tests.benchmarks.harvest``, no model is run.

It replays the trials of ``record_trials`` as studies that search at random: trials in random
orders, from each of which the candidates of a way are taken. Told is the held-out hypervolume of
the front on the search questions, above the study's reference point, and how many candidates that
front has; means over the orders, with the range of the middle 95 % of them. Seconds are processor
seconds of a trial: its training, its whole evaluation, and the objectives for each candidate more.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from tests.benchmarks.record_trials import BASE
from vgid.config import LADDER
from vgid.pareto import front_mask, hypervolume
from vgid.report.tables import Grid

DATA = Path(__file__).with_name("data") / "trials-tiny-llava.csv"
EVALUATION_S = 6.0
"""Of the other scores of a trial, which the file does not have: the objectives take a quarter."""
AFTER = (1, 2, 4, 8, 16, 32)

Way = Callable[[pd.DataFrame], "pd.Series[bool]"]
Points = np.ndarray[Any, Any]


def scales(*wanted: float) -> Way:
    """The trained adapter at these scales."""
    return lambda rows: (rows.epoch == rows.epoch.max()) & rows.scale.isin([1.0, *wanted])


WAYS: dict[str, Way] = {
    "plain": scales(),
    "epochs": lambda rows: rows.scale == 1,
    "scale 0.8": scales(0.8),
    "0.7, 0.8, 0.9": scales(0.7, 0.8, 0.9),
    "the default's": scales(*LADDER),
    "all nine scales": scales(*np.arange(0.5, 1.4, 0.05).round(2)),
    "all scales, and epochs": lambda rows: rows.scale > 0,
}


def candidates(rows: pd.DataFrame, base: Mapping[str, float]) -> Points:
    """Reduction and retain ROUGE-L on search, then on held-out questions: (candidates, 4)."""
    columns = []
    for part in ("search", "held_out"):
        columns.append(base[f"{part}_forget_rougeL"] - rows[f"{part}_forget_rougeL"])
        columns.append(rows[f"{part}_retain_rougeL"])
    return np.stack(columns, axis=1)


def reached(points: Points, base: Mapping[str, float]) -> tuple[float, int]:
    """Held-out hypervolume of the front on the search questions, and its size."""
    front = points[front_mask([(x, y) for x, y, *_ in points])]
    reference = 0.0, base["held_out_retain_rougeL"] / 2
    return hypervolume([(x, y) for *_, x, y in front], reference), len(front)


def replay(table: pd.DataFrame, orders: int) -> list[list[Any]]:
    """A row for each way: seconds a trial, then hypervolume and front after so many trials."""
    base = table[table.trial == BASE].iloc[0]
    trials = table[table.trial != BASE]
    numbers = trials.trial.unique()
    draw = np.random.default_rng(0)
    shuffled = [draw.permutation(numbers) for _ in range(orders)]
    rows: list[list[Any]] = []
    for name, way in WAYS.items():
        own = trials[way(trials)]
        of_trial = {n: candidates(group, base) for n, group in own.groupby("trial")}
        more = len(own) / len(numbers) - 1
        seconds = trials.groupby("trial").train_s.max().median() + EVALUATION_S
        seconds += more * trials.evaluate_s.median()
        cells: list[Any] = [name, f"{seconds:.0f}"]
        for count in (count for count in AFTER if count <= len(numbers)):
            found = [
                reached(np.concatenate([of_trial[n] for n in order[:count]]), base)
                for order in shuffled
            ]
            volumes, sizes = zip(*found, strict=True)
            low, high = np.quantile(volumes, [0.025, 0.975])
            cells.append(f"{np.mean(volumes):.3f} [{low:.3f}, {high:.3f}], {np.mean(sizes):.0f}")
        rows.append(cells)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Read flags, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args(arguments)
    table = pd.read_csv(asked.data)
    rows = replay(table, asked.orders)
    count = table[table.trial != BASE].trial.nunique()
    titles = ["candidates", "s a trial", *(f"after {n}" for n in AFTER if n <= count)]
    if asked.json:
        print(json.dumps([dict(zip(titles, row, strict=True)) for row in rows]))
        return
    if asked.markdown:
        print(Grid(titles, rows).markdown())
        return
    Console().print(Grid(titles, rows, f"Held-out hypervolume and front, {count} trials").rich())


if __name__ == "__main__":
    main()
