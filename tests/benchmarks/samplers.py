"""Which sampler finds most: ``python -m tests.benchmarks.samplers [--seeds 20] [--json]``.

No model is run: a trial's two objectives are computed from its setting, by formulas shaped like
tiny-llava's measured trials (base forget ROUGE-L 0.977, retain 0.98; what alpha / beta, learning
rate, noise and style do to them), but for Gaussian noise, whose best sigma is a target that differs
from seed to seed: so the front needs Gaussian noise, and near that sigma. Trials are jagged: each
setting has an error of its own, the same whenever it is run.

Two spaces: tiny-llava's own, in which sigma is conditional, and the same with random noise fixed.
Reported are, as means over the seeds with 95 % t intervals: the distance to the target of the
sigmas that were proposed after the sampler's start-up; the hypervolume that is missing to the best
front, without the errors, after so many trials; and processor seconds a proposal.
"""

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import optuna
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vgid.config import Sampler, TrialConfig
from vgid.pareto import hypervolume
from vgid.report.intervals import t_interval
from vgid.study.search import make_sampler
from vgid.study.search_space import FOLDER, Choices, SearchSpace

SAMPLERS: tuple[Sampler, ...] = ("gp", "tpe", "random")
TARGETS = (0.4, 0.8)
"""Best sigmas, one a seed in turn."""
AFTER = (16, 24, 32)
"""Numbers of trials after which the hypervolume is taken."""
START_UP = 10
"""Trials that every sampler of Optuna begins with at random."""
BASE = (0.977, 0.98)
ERROR = 0.01
NOISE = {"random": (0.0, 0.0), "white": (4.2, -1.6)}
STYLE = {"strict": (0.0, 0.0), "polite": (0.5, -0.2), "declarative": (1.0, -0.6)}
"""What a setting adds to the logit of what is left of the forget score, and to the logarithm of
the retain loss."""

Point = tuple[float, float]


def objectives(trial: TrialConfig, target: float) -> Point:
    """Reduction of forget ROUGE-L and retain ROUGE-L of a setting, without its error.

    Args:
        trial: the setting.
        target: the sigma that is best under Gaussian noise.
    """
    weight = math.log(trial.alpha / trial.beta)
    rate = math.log(trial.learning_rate / 2e-3)
    if trial.sigma is None:
        noise = NOISE[trial.noise_type]
    else:
        noise = 0.1 + 16 * (trial.sigma - target) ** 2, -1.0
    left, loss = (a + b for a, b in zip(noise, STYLE[trial.prompt_style], strict=True))
    left += -5.5 - 1.6 * weight - 2 * rate
    loss += -2.6 + 1.5 * weight + 2 * rate
    return BASE[0] * (1 - 1 / (1 + math.exp(-left))), BASE[1] - math.exp(min(loss, -0.1))


def with_error(trial: TrialConfig, target: float) -> Point:
    """The objectives as a trial reports them: with an error that depends on the setting only."""
    digest = hashlib.sha256(trial.model_dump_json().encode()).digest()
    error = np.random.default_rng(int.from_bytes(digest[:8])).normal(0, ERROR, 2)
    x, y = np.clip(np.add(objectives(trial, target), error), 0, BASE)
    return float(x), float(y)


@dataclass(frozen=True)
class Found:
    """What one study found.

    Attributes:
        distance: of the proposed sigmas to the target; None if none was proposed.
        missing: hypervolume that is missing after each of ``AFTER``.
        seconds: processor time of a proposal.
    """

    distance: float | None
    missing: tuple[float, ...]
    seconds: float


def tried(
    space: SearchSpace,
    sampler: Sampler,
    seed: int,
    count: int,
    score: Callable[[TrialConfig], Point],
) -> tuple[list[TrialConfig], list[float]]:
    """The trials of a study, first points included, and processor seconds of each proposal."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = optuna.create_study(directions=["maximize"] * 2)
    for point in space.first_points:
        search.enqueue_trial({k: value for k, value in point.items() if k in space.searched})
    trials, seconds = [], []
    for number in range(count):
        search.sampler = make_sampler(sampler, seed, number)
        started = time.process_time()
        asked = search.ask()
        trials.append(space.trial_config(space.suggest(asked), seed))
        seconds.append(time.process_time() - started)
        search.tell(asked, score(trials[-1]))
    return trials, seconds


def missing(
    space: SearchSpace, trials: Sequence[TrialConfig], target: float, after: Sequence[int]
) -> tuple[float, ...]:
    """Hypervolume, without errors, that the first so many trials lack to the best front."""
    reference, best = (0.0, BASE[1] / 2), best_hypervolume(space, target)
    points = [objectives(trial, target) for trial in trials]
    return tuple(best - hypervolume(points[:count], reference) for count in after)


def study(space: SearchSpace, sampler: Sampler, seed: int, after: Sequence[int] = AFTER) -> Found:
    """Run a study on the formulas, first points included."""
    target = TARGETS[seed % len(TARGETS)]
    score = partial(with_error, target=target)
    trials, seconds = tried(space, sampler, seed, max(after), score)
    sigmas = [trial.sigma for trial in trials[START_UP:] if trial.sigma is not None]
    return Found(
        statistics.fmean(abs(sigma - target) for sigma in sigmas) if sigmas else None,
        missing(space, trials, target, after),
        statistics.fmean(seconds[START_UP:]),
    )


def best_hypervolume(space: SearchSpace, target: float, points: int = 4000) -> float:
    """Of the best that the space holds: a dense draw under the best noise."""
    return _best(space.searched.keys() >= {"sigma"}, target, points)


@cache
def _best(gaussian: bool, target: float, points: int) -> float:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(points):
        alpha, beta, rate = np.exp(rng.uniform(np.log([0.3, 0.3, 1e-3]), np.log([3, 10, 5e-3])))
        noise = {"noise_type": "gaussian", "sigma": target} if gaussian else {}
        style = rng.choice(list(STYLE))
        setting = {"alpha": alpha, "beta": beta, "learning_rate": rate, "prompt_style": style}
        found.append(objectives(TrialConfig(**setting, **noise), target))
    return hypervolume(found, (0.0, BASE[1] / 2))


def spaces() -> dict[str, SearchSpace]:
    """Tiny-llava's space as it is, and with random noise fixed."""
    own = SearchSpace.load(FOLDER / "tiny-llava.yaml")
    searched = {k: v for k, v in own.searched.items() if k not in ("noise_type", "sigma")}
    points = tuple({**point, "noise_type": "random"} for point in own.first_points)
    for point in points:
        point.pop("sigma", None)
    fixed = replace(
        own, searched=searched, fixed={**own.fixed, "noise_type": "random"}, first_points=points
    )
    return {"sigma conditional": own, "noise fixed": fixed}


def by_chance(space: SearchSpace) -> float:
    """Mean distance of sigmas that are drawn at random, over the targets."""
    grid = space.searched["sigma"]
    assert not isinstance(grid, Choices) and grid.step is not None
    steps = round((grid.high - grid.low) / grid.step) + 1
    values = [grid.low + i * grid.step for i in range(steps)]
    return statistics.fmean(abs(value - target) for value in values for target in TARGETS)


def main() -> None:
    """Measure and print a table, with ``--json`` every study's numbers as one last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console, raw = Console(width=140), {}
    for name, space in spaces().items():
        chance = f", {by_chance(space):.3f} by chance" if "sigma" in space.searched else ""
        table = Table(
            "sampler",
            "sigma's distance",
            "n",
            *(f"missing (1e-3), {count} trials" for count in AFTER),
            "CPU s",
            title=f"{name}{chance}; {options.seeds} seeds",
        )
        for sampler in SAMPLERS:
            seeds = track(range(options.seeds), f"{name}, {sampler}", console=Console(stderr=True))
            found = [study(space, sampler, seed) for seed in seeds]
            distance = t_interval([one.distance for one in found])
            missing = (
                t_interval([1000 * one.missing[i] for one in found]) for i in range(len(AFTER))
            )
            seconds = statistics.fmean(one.seconds for one in found)
            cells = (str(distance), str(distance.n), *map(str, missing), f"{seconds:.3f}")
            table.add_row(sampler, *cells)
            raw[f"{name}, {sampler}"] = [vars(one) for one in found]
        console.print(table)
    if options.json:
        print(json.dumps(raw))


if __name__ == "__main__":
    main()
