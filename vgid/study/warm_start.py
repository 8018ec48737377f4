"""A study's first points from an earlier study, of another forget ratio or another backbone.

The best few settings of its front are tried right after the search space's own first point, and
told to Optuna as any other trial. So nothing of the earlier scores is believed: what this study's
trials confirm draws the search there, and what they refute has cost these few trials. Telling
Optuna of the earlier trials themselves, ever fewer, gained no more
(``python -m tests.benchmarks.warm_start``; numbers in ``tests/benchmarks/README.md``).
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vgid.config import Config, StudyConfig, TrialConfig
from vgid.errors import InputError
from vgid.pareto import hypervolume
from vgid.results import origin
from vgid.study.finished import Trial, open_source
from vgid.study.search_space import Range, SearchSpace

FLAG = "--warm-start"
SETTINGS = 2  # more gain nothing where they are right, and cost more where they are not


class Prior(Config):
    """What an earlier study gives a new one: recorded with it, so that a resume needs no other."""

    study_id: str
    backbone: str
    forget_ratio: int
    rate_factor: float  # that its learning rates were multiplied by
    points: tuple[dict[str, Any], ...]  # searched fields; the one that adds most first
    left_out: int  # settings of its front that lie outside the new search space

    @property
    def told(self) -> str:
        """What it gives, for people."""
        outside = f", {self.left_out} outside the search space left out" if self.left_out else ""
        return (
            f"{self.study_id}, {self.backbone}, {self.forget_ratio} % forgotten: "
            f"{len(self.points)} settings of its front, learning rates times "
            f"{self.rate_factor:.3g}{outside}"
        )


def read_prior(config: StudyConfig, space: SearchSpace) -> Prior:
    """What the study that ``config.warm_start`` names gives to one of this space.

    Raises:
        InputError: no study that has ended is there, it is of another method, or no setting of its
            front can be tried.
    """
    named = str(config.warm_start)
    with tempfile.TemporaryDirectory(prefix="vgid-warm-start-") as scratch:
        source = open_source(named, config.tracking_uri, Path(scratch), FLAG, adapters=False)
    earlier = source.config
    if earlier.method != config.method:
        raise InputError(
            f"{FLAG} {named}: is a study of '{earlier.method}' and this one runs "
            f"'{config.method}'; name a study of that method or leave the option out."
        )
    factor = _rate_factor(earlier, config)
    reference = source.reference("search") if "search" in source.base else (0.0, 0.0)
    points, left_out = carried(source.trials, reference, space, factor)
    if not points:
        raise InputError(
            f"{FLAG} {named}: its front has no setting for this search space but what it starts "
            f"with anyway ({left_out} lie outside); name another study or leave the option out."
        )
    return Prior(
        study_id=source.study_id,
        backbone=earlier.backbone,
        forget_ratio=earlier.forget_ratio,
        rate_factor=factor,
        points=points,
        left_out=left_out,
    )


def carried(
    front: Sequence[Trial],
    reference: tuple[float, float],
    space: SearchSpace,
    rate_factor: float = 1.0,
) -> tuple[tuple[dict[str, Any], ...], int]:
    """The best ``SETTINGS`` settings of a front as points of a space; how many lie outside it.

    Best is what adds most hypervolume above ``reference`` to those chosen before, which spreads
    them out: what so many can reach, this greedy choice reaches to a share of 1 - 1/e at least
    (Nemhauser, Wolsey and Fisher, 1978). A trial's scales are one setting, and what the space
    starts with is none.
    """
    settings: dict[str, tuple[dict[str, Any], list[tuple[float, float]]]] = {}
    outside = set()
    for trial in front:
        point = _point(trial.config, space, rate_factor)
        if point is None:
            outside.add(origin(trial.trial_id)[0])
        elif point not in space.first_points[:1]:
            settings.setdefault(str(point), (point, []))[1].append(trial.point)
    chosen: list[dict[str, Any]] = []
    reached: list[tuple[float, float]] = []
    left, volume = list(settings.values()), 0.0
    while left and len(chosen) < SETTINGS:
        grown = [hypervolume([*reached, *points], reference) for _, points in left]
        if max(grown) <= volume:  # the others keep too little
            break
        volume = max(grown)
        point, points = left.pop(grown.index(volume))
        chosen.append({name: point[name] for name in space.searched if name in point})
        reached += points
    return tuple(chosen), len(outside)


def _point(trial: TrialConfig, space: SearchSpace, rate_factor: float) -> dict[str, Any] | None:
    """A setting in a space, whole: what that fixes stays; None if it lacks one of the choices."""
    point = {}
    for name, domain in space.searched.items():
        value = getattr(trial, name)
        if value is None:  # stands for no number; the space has a default
            continue
        if name == "learning_rate":
            value *= rate_factor
        is_moved = isinstance(domain, Range) and value not in domain
        point[name] = domain.nearest(value) if is_moved else value
    try:
        return space.completed(point, space.source)
    except InputError:
        return None


def _rate_factor(earlier: StudyConfig, config: StudyConfig) -> float:
    """What to multiply an earlier study's learning rates by.

    The inverse ratio of the hidden widths: Adam's rate for matrices between hidden layers falls
    with 1 / width in muP (Yang and others, "Tensor Programs V", arXiv:2203.03466, table 3). It is
    what lies between the ranges of tiny-llava's and LLaVA-7B's search space too, found without it:
    their middles are 2.2e-3 at width 128 and 7.1e-5 at 4,096, a factor of 1 / 32. Of LoRA's two
    matrices the rule is for A (Hayou and others, "LoRA+", arXiv:2402.12354).
    """
    from vgid.models.backbones import width

    if (earlier.backbone, earlier.model_path) == (config.backbone, config.model_path):
        return 1.0
    # A row is an architecture: where the earlier weights are gone, its own are as wide.
    there = earlier.model_path if Path(earlier.model_path or "").is_dir() else None
    return width(earlier.backbone, there) / width(config.backbone, config.model_path)
