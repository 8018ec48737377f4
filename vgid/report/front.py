"""A study as people are shown it, and the picture of its front, ``front.png``.

Axes as in the paper's figure 4: how much of the forget people's ROUGE-L is gone against what is
left of the retain people's. The picture shows every trial that has both scores, the front, the base
model and the paper's default setting, and, where given, the front's held-out scores with their
intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vgid.config import TrialConfig, is_paper_default
from vgid.evaluation.suppression import MIN_FORGET, doubt, share_gone
from vgid.files import write_atomically
from vgid.report.drawing import (
    BASE,
    FRONT,
    HELD_OUT,
    OUTSIDE,
    STOPPED,
    TRIAL,
    Panel,
    Picture,
    Scale,
    Series,
)
from vgid.report.records import NOISE_LABELS, TrialRecord, describe, misses_of
from vgid.requirement import OBJECTIVES
from vgid.results import Score, origin

X_LABEL = "Reduction of forget-set ROUGE-L  (higher: more is forgotten)"
Y_LABEL = "Retain-set ROUGE-L  (higher: more is kept)"
MARKS = {"random": "circle", "gaussian": "square", "white": "triangle-up", None: "circle"}
"""Marks of trials by the noise of their teacher, None for methods without."""

LABELS = {
    OBJECTIVES[0]: "forget reduction",
    OBJECTIVES[1]: "retain ROUGE-L",
    "test_rougeL": "test ROUGE-L",
    "forget_cloze": "forget cloze",
}
"""The scores that are told of a trial, and what they are called."""


def label(score: str) -> str:
    """What a score is called on pages and pictures."""
    return LABELS.get(score, score)


@dataclass(frozen=True)
class Front:
    """A study as it is shown: its candidates, of which those without a score are only counted.

    Attributes:
        records: its trials, and what was harvested of each.
        base: the base model's scores on the search questions, by name.
        base_held_out: those on the held-out questions, if the front was scored again.
        pages: each run's page by trial id, relative to the tracking ``server``, whose address ends
            in ``/`` (``Tracker.pages``).
        growth: seconds from the study's start to each trial's end, and the hypervolume then.
        outlook: whether more trials are worth it, in a sentence.
        warnings: why the study has not all that it should have, in sentences.
        space: the parameters of the search space, as ``study.json`` has them.
    """

    title: str
    records: Sequence[TrialRecord]
    base: Mapping[str, Score]
    base_held_out: Mapping[str, Score] | None = None
    pages: Mapping[str, str] = field(default_factory=dict)
    server: str = ""
    growth: Sequence[tuple[float, float]] = ()
    outlook: str | None = None
    warnings: Sequence[str] = ()
    space: Mapping[str, Any] = field(default_factory=dict)

    @property
    def drawn(self) -> list[TrialRecord]:
        """The candidates that completed with both objectives."""
        return [record for record in self.records if record.place is not None]

    @property
    def trials(self) -> list[TrialRecord]:
        """Of these the trials themselves, each with its harvest's place on the front as its own."""
        found = {origin(record.result.trial_id)[0] for record in self.front}
        trials = [record for record in self.drawn if not record.is_harvested]
        return [replace(trial, on_front=trial.result.trial_id in found) for trial in trials]

    @property
    def stopped(self) -> list[TrialRecord]:
        """The trials that were stopped early, after they had been scored."""
        pruned = [record for record in self.records if record.result.status == "pruned"]
        return [record for record in pruned if record.result.metrics.keys() >= set(OBJECTIVES)]

    @property
    def front(self) -> list[TrialRecord]:
        """The front, from least to most forgotten."""
        return sorted((r for r in self.drawn if r.on_front), key=lambda r: r.place or (0.0, 0.0))

    @property
    def default(self) -> list[TrialRecord]:
        """The trials that ran the paper's default setting."""
        return [r for r in self.drawn if is_paper_default(r.config) and not r.is_harvested]

    def held_out(self) -> list[tuple[TrialRecord, Score, Score]]:
        """Front trials with their two objectives on the held-out questions."""
        first, second = OBJECTIVES
        scored = [(record, record.held_out or {}) for record in self.front]
        return [(r, s[first], s[second]) for r, s in scored if s.keys() >= set(OBJECTIVES)]

    @property
    def caption(self) -> str:
        """How many trials are on the front, and how many have no place in the picture."""
        stopped = sum(record.result.status == "pruned" for record in self.records)
        missing = len(self.records) - len(self.drawn) - stopped
        rest = f", {stopped} stopped early" if stopped else ""
        rest += f", {missing} not completed" if missing else ""
        infeasible = sum(not r.feasible for r in self.drawn if not r.is_harvested)
        rest += f", {infeasible} out of bounds" if infeasible else ""
        unsure = "" if self.doubt is None else "; the base may never have known these people"
        return f"{len(self.front)} on the front{rest}{unsure}"

    @property
    def doubt(self) -> str | None:
        """A sentence if the base may never have known its people."""
        return doubt(self.base)


def write_png(path: Path, front: Front, *, whole_only: bool = False) -> None:
    """Draw ``front.png``: the whole study on the left, its front from close by on the right.

    With ``whole_only``, and while there is no front, a small picture of the left half alone.
    """
    trials, marks = _trials(front), _marks(front)
    whole = Panel(Scale(X_LABEL), Scale(Y_LABEL), [*trials, *_front(front), *marks])
    picture = Picture(front.title, [whole], front.caption, (7.2, 5.4), dpi=100)
    if front.front and not whole_only:
        ends, drawn = corner(front), [*trials, *_held_out(front), *_front(front, ids=True), *marks]
        x, y = Scale(X_LABEL, ends.ends("x")), Scale("", ends.ends("y"))
        near = Panel(x, y, drawn, "The front, from close by")
        panels = [replace(whole, title="All trials"), near]
        picture = replace(picture, panels=panels, size=(11.5, 5.6), dpi=140)
    write_atomically(path, picture.png())


def page_picture(front: Front) -> Picture:
    """The same for the study's page; its last series is the ring around a clicked trial."""
    # Without a point at first: study.js moves it to the trial that is clicked.
    ring = Series("chosen trial", [], [], FRONT, "circle-open", 26, listed=False)
    drawn = [*_trials(front), *_held_out(front), *_front(front), *_marks(front), ring]
    return Picture("", [Panel(Scale(X_LABEL), Scale(Y_LABEL), drawn)])


def corner(front: Front) -> Panel:
    """What of the front is worth a closer look: where enough is forgotten, if it is anywhere.

    Nothing that it dominates is drawn, so that its ends are those of the panel.
    """
    known = front.base["forget_rougeL"].value
    gone = {id(r): share_gone(known, known - r.result.metrics[OBJECTIVES[0]]) for r in front.front}
    able = [record for record in front.front if gone[id(record)] >= MIN_FORGET]
    near = replace(front, records=able or front.front)
    return Panel(Scale(), Scale(), [*_held_out(near), *_front(near)])


def _trials(front: Front) -> list[Series]:
    others = [record for record in front.drawn if not record.on_front and record.feasible]
    found = _curves(front)
    if front.stopped:
        found.append(_of("trial stopped early", front.stopped, STOPPED, mark="triangle-down"))
    if outside := [record for record in front.drawn if not record.feasible]:
        found.append(_of("trial out of bounds", outside, OUTSIDE, mark="x"))
    for noise, mark in MARKS.items():
        if shown := [r for r in others if _noise(r) == noise and not r.is_harvested]:
            name = "trial" if noise is None else f"trial, {NOISE_LABELS[noise]}"
            found.append(_of(name, shown, TRIAL, mark=mark, opacity=0.85))
    return found


def _curves(front: Front) -> list[Series]:
    """What was harvested of each trial: its adapter's scales as a path."""
    paths: dict[str, list[TrialRecord]] = {}
    for record in front.drawn:
        paths.setdefault(origin(record.result.trial_id)[0], []).append(record)
    curves = [
        sorted(path, key=lambda record: record.config.adapter_scale)
        for path in paths.values()
        if len(path) > 1
    ]
    if not curves:
        return []
    name = "trial, other scales"
    ends: list[tuple[float | None, float | None]] = []
    for curve in curves:
        ends += [*zip(*_places(curve), strict=True), (None, None)]
    x, y = zip(*ends, strict=True)
    line = Series(name, x, y, TRIAL, "", line=0.7, opacity=0.5, listed=False)
    drawn = [record for curve in curves for record in curve if record.is_harvested]
    rest = [record for record in drawn if record.feasible and not record.on_front]
    return [line, _of(name, rest, TRIAL, size=4, opacity=0.6)]


def _front(front: Front, ids: bool = False) -> list[Series]:
    """The front; of the picture's own two objectives as steps, the border of what it dominates."""
    line = front.front
    marks = [MARKS[_noise(record)] for record in line]
    labels = [record.result.trial_id for record in line] if ids else []
    style: dict[str, Any] = {"mark": marks, "size": 12, "labels": labels}
    if all(record.objectives == OBJECTIVES for record in line):
        style |= {"line": 1.5, "steps": True}
    return [_of("front", line, FRONT, **style)] if line else []


def _of(name: str, records: Sequence[TrialRecord], colour: str, **style: Any) -> Series:
    ids = [record.result.trial_id for record in records]
    hover = [
        "\n".join([f"trial {trial_id}", *setting_lines(record.config), *_score_lines(record)])
        for trial_id, record in zip(ids, records, strict=True)
    ]
    return Series(name, *_places(records), colour, hover=hover, keys=ids, **style)


def _held_out(front: Front) -> list[Series]:
    """The front on held-out questions with its intervals, each tied to the trial's own point."""
    found = front.held_out()
    if not found:
        return []
    name = "front, held-out questions (95 %)"
    records, x, y = zip(*found, strict=True)
    ties_x, ties_y = (
        [end for place, score in zip(own, again, strict=True) for end in (place, score.value, None)]
        for own, again in zip(_places(records), (x, y), strict=True)
    )
    hover = [
        f"trial {record.result.trial_id} · held-out questions\n{describe(record.config)}\n"
        f"forget reduction {x}, n = {x.n}\nretain ROUGE-L {y}, n = {y.n}"
        for record, x, y in found
    ]
    again = Series(
        name,
        [score.value for score in x],
        [score.value for score in y],
        HELD_OUT,
        "diamond",
        7,
        0.7,
        x_bounds=[(score.low, score.high) for score in x],
        y_bounds=[(score.low, score.high) for score in y],
        hover=hover,
        keys=[record.result.trial_id for record in records],
    )
    ties = Series(name, ties_x, ties_y, HELD_OUT, "", line=0.9, dotted=True, listed=False)
    return [ties, again]


def _marks(front: Front) -> list[Series]:
    y = front.base["retain_rougeL"].value
    ring = Series("the paper's default setting", *_places(front.default), BASE, "circle-open", 21)
    told = [f"base model\nretain ROUGE-L {y:.3f}"]
    star = Series("base model", [0.0], [y], BASE, "star", 20, hover=told)
    return [ring, star] if front.default else [star]


def _places(records: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    x, y = ([record.result.metrics[name] for record in records] for name in OBJECTIVES)
    return x, y


def _noise(record: TrialRecord) -> str | None:
    return record.config.used.get("noise_type")


def setting_lines(config: TrialConfig) -> list[str]:
    """A trial's setting as hovering shows it, in two lines."""
    source = config.used.get("response_source")
    responses = "" if source is None else f" · {source} responses"
    return [describe(config), f"rank {config.lora_rank} · {config.epochs} epochs{responses}"]


def _score_lines(record: TrialRecord) -> list[str]:
    metrics = record.result.metrics
    names = dict.fromkeys([*LABELS, *record.objectives])
    lines = [f"{label(name)} {metrics[name]:.3f}" for name in names if name in metrics]
    misses = misses_of(record.result)
    return [*lines, f"misses {misses}"] if misses else lines
