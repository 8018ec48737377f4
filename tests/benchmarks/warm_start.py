"""What a prior is worth: ``python -m tests.benchmarks.warm_start [--seeds 12] [--json]``.

No model is run: trials are those of ``tests.benchmarks.samplers``, on tiny-llava's search space, as
it is and with the paper's default alone for a first point, as a space has that nobody tuned. Each
seed has three earlier studies of 32 trials by TPE: of the same formulas with errors of its own
(right); with another best sigma (another backbone); and of inverted objectives, so that its front
is what forgets least and keeps least (wrong). Each is given to a study by ``carried`` with so many
settings, and, to compare, as ended trials that the sampler is told of: 16 of them with their
scores, one less with every trial of the study's own (told).

Reported is the hypervolume, without errors, that the first so many trials lack to the best front,
in thousandths (the best is some 470), as means over the seeds with 95 % t intervals. The first
column is what it is, the others are paired differences to the study without a prior.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import optuna
from rich.console import Console
from rich.progress import track

from tests.benchmarks.samplers import BASE, TARGETS, Point, missing, spaces, tried, with_error
from vgid.config import Sampler, TrialConfig
from vgid.pareto import front_mask
from vgid.report.intervals import t_interval
from vgid.report.tables import Grid
from vgid.study.finished import Trial
from vgid.study.search import make_sampler
from vgid.study.search_space import SearchSpace
from vgid.study.warm_start import carried

AFTER = (4, 8, 16, 32)
SETTINGS = (2, 4)
TOLD = 16


def inverted(trial: TrialConfig, target: float) -> Point:
    """The objectives of somebody who wants to forget little and keep little."""
    x, y = with_error(trial, target)
    return BASE[0] - x, BASE[1] - y


def earlier(space: SearchSpace, seed: int) -> dict[str, list[Trial]]:
    """The three earlier studies of a seed, all their trials."""
    target, other = (TARGETS[(seed + n) % len(TARGETS)] for n in range(2))
    scores = {
        "right": partial(with_error, target=target),
        "another backbone": partial(with_error, target=other),
        "wrong": partial(inverted, target=target),
    }
    return {
        name: [
            Trial(f"{number:04d}", trial, score(trial), Path())
            for number, trial in enumerate(tried(space, "tpe", 1000 + seed, 32, score)[0])
        ]
        for name, score in scores.items()
    }


def front_of(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other dominates."""
    mask = front_mask([trial.point for trial in trials])
    return [trial for trial, on_front in zip(trials, mask, strict=True) if on_front]


def told(
    space: SearchSpace, sampler: Sampler, seed: int, target: float, prior: Sequence[Trial]
) -> list[TrialConfig]:
    """The trials of a study whose sampler counts a prior's trials, ever fewer, as its own."""
    best = sorted(prior, key=lambda trial: trial not in front_of(prior))[:TOLD]
    known = [_ended(space, trial.config, trial.point) for trial in best]
    own: list[optuna.trial.FrozenTrial] = []
    trials: list[TrialConfig] = []
    for number in range(max(AFTER)):
        search = optuna.create_study(directions=["maximize"] * 2)
        search.add_trials([*known[: max(0, TOLD - number)], *own])
        if number < len(space.first_points):
            search.enqueue_trial(dict(space.first_points[number]))
        search.sampler = make_sampler(sampler, seed, number)
        trials.append(space.trial_config(space.suggest(search.ask()), seed))
        own.append(_ended(space, trials[-1], with_error(trials[-1], target)))
    return trials


def _ended(space: SearchSpace, trial: TrialConfig, values: Point) -> optuna.trial.FrozenTrial:
    asked = space.distributions(trial.model_dump())
    params = {name: getattr(trial, name) for name in asked}
    return optuna.trial.create_trial(params=params, distributions=asked, values=values)


def studies(space: SearchSpace, sampler: Sampler, seed: int) -> dict[str, tuple[float, ...]]:
    """What is missing after each of ``AFTER``, of one seed's studies by what they were given."""
    target = TARGETS[seed % len(TARGETS)]
    score = partial(with_error, target=target)

    def run(begun: SearchSpace) -> tuple[float, ...]:
        trials, _ = tried(begun, sampler, seed, max(AFTER), score)
        return missing(space, trials, target, AFTER)

    found = {"no prior": run(space)}
    for name, prior in earlier(space, seed).items():
        reference = (0.0, 0.0 if name == "wrong" else BASE[1] / 2)
        for count in SETTINGS:
            with patch("vgid.study.warm_start.SETTINGS", count):
                points, _ = carried(front_of(prior), reference, space)
            found[f"{name}, {count} settings"] = run(space.started_from(points))
        trials = told(space, sampler, seed, target, prior)
        found[f"{name}, told"] = missing(space, trials, target, AFTER)
    return found


def main() -> None:
    """Measure and print a table a space, with ``--json`` every number as one last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--sampler", choices=("auto", "tpe", "random"), default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    own, raw = spaces()["sigma conditional"], {}
    bare = replace(own, first_points=own.first_points[:1])
    for name, space in {
        "tiny-llava's first points": own,
        "the paper's default first": bare,
    }.items():
        seeds = track(range(options.seeds), name, console=Console(stderr=True))
        found = [studies(space, options.sampler, seed) for seed in seeds]
        columns = (name, *(f"{count} trials" for count in AFTER))
        rows = []
        for given in found[0]:
            cells = []
            for i in range(len(AFTER)):
                less = [0.0 if given == "no prior" else one["no prior"][i] for one in found]
                values = [1000 * (one[given][i] - by) for one, by in zip(found, less, strict=True)]
                cells.append(str(t_interval(values)))
            rows.append([given, *cells])
        print(Grid(columns, rows).markdown())
        raw[name] = found
    if options.json:
        print(json.dumps(raw))


if __name__ == "__main__":
    main()
