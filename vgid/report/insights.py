"""What made the difference in a study.

Above, how much of each objective's variance over the trials each hyperparameter explains (fANOVA,
Hutter et al. 2014, as Optuna computes it). Below, every trial as a line from its hyperparameters
to its objectives, the front in colour. Both are read from the trials alone, so they describe this
search space and say nothing of values that were not tried.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from vgid.report.drawing import BASE, FRONT, HELD_OUT, TRIAL, Panel, Picture, Scale, Series
from vgid.report.front import Front, label
from vgid.report.records import HYPERPARAMETERS, TrialRecord, run_name

MIN_TRIALS = 8
"""Completed trials below which shares of variance are noise and are not shown."""

MIN_EXPLAINED = 24
"""Completed trials below which a forest predicts too little to say that there is nothing."""

MAX_TRIALS = 256
"""Of more, so many are taken, evenly by id: fANOVA's time grows with the square of its trials, and
thousands of lines are one grey."""

T = TypeVar("T")
Shares = dict[str, dict[str, float]]
"""Share of variance by hyperparameter, by objective."""

OBJECTIVE_COLOURS = (FRONT, HELD_OUT, TRIAL, BASE)
LOGARITHMIC = ("alpha", "beta", "learning_rate")


class Axis(NamedTuple):
    """One vertical axis of the parallel coordinates.

    ``heights`` are between 0 and 1, None where the trial has no value; ``ticks`` are heights and
    what stands there: both ends, or every value of those without an order.
    """

    label: str
    heights: tuple[float | None, ...]
    ticks: tuple[tuple[float, str], ...]


def varied(records: Sequence[TrialRecord]) -> list[str]:
    """The hyperparameters that take more than one value in these trials."""
    names = [*HYPERPARAMETERS, "response_source", "lora_rank", "epochs", "preference_beta"]
    values = {name: {str(r.config.used.get(name)) for r in records} for name in names}
    return [name for name in names if len(values[name] - {"None"}) > 1]


def importances(records: Sequence[TrialRecord]) -> Shares:
    """Share of each objective's variance that each hyperparameter explains.

    A hyperparameter that only some trials have (sigma) is left out, as Optuna's evaluator asks. Of
    more than ``MAX_TRIALS`` completed trials, so many are looked at; fewer than ``MIN_TRIALS``
    give no shares.
    """
    records = _some(records)
    used = [record.config.used for record in records]
    names = [name for name in varied(records) if all(u.get(name) is not None for u in used)]
    if len(records) < MIN_TRIALS or not names:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(name, [u[name] for u in used]) for name in names}
    found = {}
    # A study an objective: fANOVA explains the variance of a single number.
    for objective in records[0].objectives:
        reached = [record.result.metrics[objective] for record in records]
        if max(reached) - min(reached) < 1e-12:  # nothing to explain
            found[objective] = dict.fromkeys(names, 0.0)
            continue
        study = optuna.create_study()
        for setting, value in zip(used, reached, strict=True):
            given = {"params": {name: setting[name] for name in names}, "value": value}
            study.add_trial(optuna.trial.create_trial(distributions=distributions, **given))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=names)
        found[objective] = {name: float(shares[name]) for name in names}
    return found


def explained(records: Sequence[TrialRecord]) -> dict[str, float]:
    """How well a setting foretells each objective that differs: R² out of the bag.

    That is of a random forest (Breiman, 2001), each trial predicted by the trees that did not see
    it: 1 is all, and at 0 or below the mean does as well. Of fewer than ``MIN_EXPLAINED`` trials,
    or without a hyperparameter that varied, none.
    """
    records = _some(records)
    names = varied(records)
    if len(records) < MIN_EXPLAINED or not names:
        return {}
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.feature_extraction import DictVectorizer

    used = [{name: r.config.used[name] for name in names if name in r.config.used} for r in records]
    settings = DictVectorizer(sparse=False).fit_transform(used)
    found = {}
    for objective in records[0].objectives:
        reached = [record.result.metrics[objective] for record in records]
        if max(reached) - min(reached) >= 1e-12:
            forest = RandomForestRegressor(oob_score=True, random_state=0)
            found[objective] = float(forest.fit(settings, reached).oob_score_)
    return found


def axes(records: Sequence[TrialRecord]) -> list[Axis]:
    """The axes of the parallel coordinates: what varied, then the objectives."""
    return [_axis(name, [r.config.used.get(name) for r in records]) for name in varied(records)] + [
        _axis(label(name), [r.result.metrics[name] for r in records])
        for name in records[0].objectives
    ]


def insights(front: Front, shares: Shares) -> Picture:
    """The picture of what made the difference; ``shares`` are the trials' ``importances``."""
    records = front.trials
    columns = axes(records) if records else []
    others = sum(not record.on_front for record in records)
    who = "Every trial" if others <= MAX_TRIALS else f"The front and {MAX_TRIALS} of the trials"
    names = [column.label.replace("_", "\n").replace(" ", "\n") for column in columns]
    ticks = [(x, *tick) for x, column in enumerate(columns) for tick in column.ticks]
    x, y, texts = zip(*ticks, strict=True) if ticks else ((), (), ())
    values = Series("", x, y, BASE, "", labels=texts, listed=False)
    lines = Panel(
        Scale(range=(-0.4, max(1, len(columns)) - 0.4), ticks=list(enumerate(names))),
        Scale(range=(-0.12, 1.12), shown=False),
        [*(_lines(records, columns, on_front) for on_front in (False, True)), values],
        f"{who} from setting to scores, the front in colour",
    )
    return Picture("", [_importances(records, shares), lines] if shares else [lines], stacked=True)


def _importances(records: Sequence[TrialRecord], shares: Shares) -> Panel:
    names = list(next(iter(shares.values())))
    some = f"{MAX_TRIALS} of " if len(records) > MAX_TRIALS else ""
    bars = [
        Series(
            label(objective),
            list(by_name.values()),
            range(len(names)),
            colour,
            "bar-right",
            hover=[f"{name} explains {share:.0%}" for name, share in by_name.items()],
        )
        for (objective, by_name), colour in zip(shares.items(), OBJECTIVE_COLOURS, strict=False)
    ]
    return Panel(
        Scale(percent=True),
        Scale(range=(len(names) - 0.5, -0.5), ticks=list(enumerate(names))),
        bars,
        f"Share of each objective's variance over {some}the trials (fANOVA)",
    )


def _lines(records: Sequence[TrialRecord], columns: Sequence[Axis], on_front: bool) -> Series:
    """All lines of one kind as one series: a trace for each of thousands would choke a browser."""
    drawn = [n for n, record in enumerate(records) if record.on_front == on_front]
    x: list[float | None] = []
    y: list[float | None] = []
    hover = []
    for number in drawn if on_front else _some(drawn):
        heights = [column.heights[number] for column in columns]
        found = [(place, height) for place, height in enumerate(heights) if height is not None]
        x += [*(place for place, _ in found), None]
        y += [*(height for _, height in found), None]
        text = run_name(records[number].config, records[number].result.trial_id)
        hover += [*[text] * len(found), ""]
    name = "trials on the front" if on_front else "other trials"
    colour, line, opacity = (FRONT, 2, 1.0) if on_front else (TRIAL, 1, 0.4)
    return Series(name, x, y, colour, "circle", 5, opacity, line, hover=hover, listed=bool(drawn))


def _some(all_of_them: Sequence[T]) -> list[T]:
    taken = min(len(all_of_them), MAX_TRIALS)
    return [all_of_them[number * len(all_of_them) // taken] for number in range(taken)]


def _distribution(name: str, values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if all(isinstance(value, int) for value in values):
        return IntDistribution(min(values), max(values))
    if all(isinstance(value, float) for value in values):
        logarithmic = name in LOGARITHMIC and min(values) > 0
        return FloatDistribution(min(values), max(values), log=logarithmic)
    return CategoricalDistribution(sorted(set(values)))


def _axis(label: str, values: Sequence[Any]) -> Axis:
    present = sorted({value for value in values if value is not None})
    low, high = present[0], present[-1]
    if isinstance(low, str):
        places = {kind: index / max(1, len(present) - 1) for index, kind in enumerate(present)}
        ticks = tuple((place, kind) for kind, place in places.items())
    else:
        scale = math.log if label in LOGARITHMIC and low > 0 else float
        span = scale(high) - scale(low)
        places = {value: (scale(value) - scale(low)) / span if span else 0.5 for value in present}
        ticks = ((0.0, f"{low:.3g}"), (1.0, f"{high:.3g}"))
    return Axis(label, tuple(places.get(value) for value in values), ticks)
