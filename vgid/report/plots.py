"""The picture of a study: what it shows, and ``front.png`` (matplotlib).

Axes as in the paper's figure 4: how much of the forget people's ROUGE-L is gone against what is
left of the retain people's. The picture shows every completed trial, the front, the base model
and the paper's default setting, and, where given, the front's held-out scores with their
intervals. ``vgid.report.front_page`` draws the same for a browser. matplotlib is imported when a
picture is drawn.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgid.config import is_paper_default
from vgid.evaluation.suppression import doubt
from vgid.files import write_atomically
from vgid.report.records import NOISE_LABELS, TrialRecord, held_out_scores
from vgid.results import OBJECTIVES, Score

X_LABEL = "Reduction of forget-set ROUGE-L  (higher: more is forgotten)"
Y_LABEL = "Retain-set ROUGE-L  (higher: more is kept)"
TRIAL, FRONT, HELD_OUT, BASE, INK = "#8a97a6", "#d1495b", "#1f6f8b", "#222222", "#333333"
MARKERS = {"random": "o", "gaussian": "s", "white": "^", None: "o"}
SYMBOLS = {"random": "circle", "gaussian": "square", "white": "triangle-up", None: "circle"}
"""Marks of trials by the noise of their teacher, None for methods without."""


@dataclass(frozen=True)
class Front:
    """What a picture shows.

    Attributes:
        title: its headline, such as the backbone and the number of trials.
        records: the trials; those without both objectives are counted, not drawn.
        base: the base model's scores on the search questions, by name.
        base_held_out: its scores on the held-out questions, if the front was scored again.
        pages: page of each trial's run by trial id, relative to the address of the tracking
            server; see ``Tracker.pages``.
        server: that address, ending in ``/``; empty if there is none.
    """

    title: str
    records: Sequence[TrialRecord]
    base: Mapping[str, Score]
    base_held_out: Mapping[str, Score] | None = None
    pages: Mapping[str, str] = field(default_factory=dict)
    server: str = ""

    @property
    def drawn(self) -> list[TrialRecord]:
        """The trials that have a place in the picture."""
        return [record for record in self.records if record.point is not None]

    @property
    def front(self) -> list[TrialRecord]:
        """The front, from least to most forgotten."""
        return sorted((r for r in self.drawn if r.on_front), key=lambda r: r.point or (0.0, 0.0))

    @property
    def default(self) -> list[TrialRecord]:
        """The trials that ran the paper's default setting."""
        return [record for record in self.drawn if is_paper_default(record.config)]

    @property
    def base_point(self) -> tuple[float, float]:
        """Nothing forgotten, everything retained."""
        return 0.0, self.base["retain_rougeL"].value

    def held_out(self) -> list[tuple[TrialRecord, Score, Score]]:
        """Front trials with their two objectives on the held-out questions."""
        found = []
        for record in self.front:
            scores = held_out_scores(record) or {}
            if all(name in scores for name in OBJECTIVES):
                found.append((record, scores[OBJECTIVES[0]], scores[OBJECTIVES[1]]))
        return found

    @property
    def caption(self) -> str:
        """How many trials are on the front, and how many have no place in the picture."""
        missing = len(self.records) - len(self.drawn)
        rest = f", {missing} not completed" if missing else ""
        unsure = "" if self.doubt is None else "; the base may never have known these people"
        return f"{len(self.front)} on the front{rest}{unsure}"

    @property
    def doubt(self) -> str | None:
        """A sentence if the base may never have known its people."""
        return doubt(self.base)


def write_png(path: Path, front: Front, *, whole_only: bool = False) -> None:
    """Draw ``front.png``: the whole study on the left, its front from close by on the right.

    Args:
        path: the file.
        front: what to draw.
        whole_only: a small picture of the left half alone.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, dpi = ((7.2, 5.4), 100) if whole_only else ((11.5, 5.6), 140)
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    panels = figure.subplots(1, 1 if whole_only else 2, squeeze=False)[0]
    for axes in panels:
        _draw(axes, front)
        axes.set_xlabel(X_LABEL, color=INK)
    panels[0].set_ylabel(Y_LABEL, color=INK)
    figure.suptitle(f"{front.title}: {front.caption}", fontsize=12, color=BASE)
    if not whole_only:
        _draw_held_out(panels[1], front)
        _zoom(panels[1], front)
        for axes, title in zip(panels, ("All trials", "The front, from close by"), strict=True):
            axes.set_title(title, fontsize=10.5, color=INK, loc="left")

    handles, labels = panels[-1].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside lower center",
        ncols=3 if whole_only else 7,
        frameon=False,
        fontsize=8.5,
        handletextpad=0.4,
        columnspacing=1.2,
    )
    if not whole_only:
        figure.draw_without_rendering()  # the layout must stand before ids keep their distance
        _write_ids(panels[1], front)
    image = io.BytesIO()
    canvas.print_png(image, metadata={"Software": None})
    write_atomically(path, image.getvalue())


def coordinates(records: Iterable[TrialRecord]) -> dict[str, list[float]]:
    """The trials' two objectives as ``x`` and ``y``; those without are left out."""
    points = [record.point for record in records if record.point is not None]
    return {"x": [x for x, _ in points], "y": [y for _, y in points]}


def noise_of(record: TrialRecord) -> str | None:
    """The trial's visual perturbation, None where its method has none."""
    return record.config.used.get("noise_type")


def trial_label(noise: str | None) -> str:
    """What a legend calls the trials of one perturbation."""
    return "trial" if noise is None else f"trial, {NOISE_LABELS[noise]}"


def _draw(axes: Any, front: Front) -> None:
    """Draw the trials, the front and the marks on one pair of axes."""
    axes.grid(color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    for noise, marker in MARKERS.items():
        shown = [r for r in front.drawn if noise_of(r) == noise and not r.on_front]
        if shown:
            label = trial_label(noise)
            at = coordinates(shown)
            axes.scatter(at["x"], at["y"], 34, TRIAL, marker, label=label, alpha=0.85, linewidths=0)
    line = coordinates(front.front)
    # "pre" walks down, then right: the border of what the front dominates.
    axes.step(line["x"], line["y"], where="pre", color=FRONT, linewidth=1.4, zorder=3)
    for record in front.front:
        marker = MARKERS[noise_of(record)]
        axes.scatter(*(record.point or ()), 62, FRONT, marker, zorder=4, edgecolors="white")
    axes.plot([], [], color=FRONT, marker="o", linewidth=1.4, label="front")
    if front.default:
        at, label = coordinates(front.default), "the paper's default setting"
        ring = {"facecolors": "none", "edgecolors": BASE, "linewidths": 1.5}
        axes.scatter(at["x"], at["y"], 190, **ring, zorder=5, label=label)
    axes.scatter(*front.base_point, 170, BASE, "*", label="base model", zorder=5, linewidths=0)


def _draw_held_out(axes: Any, front: Front) -> None:
    """Held-out scores with their intervals, each tied to the trial's own point."""
    for record, x, y in front.held_out():
        start = record.point or (x.value, y.value)
        axes.plot((start[0], x.value), (start[1], y.value), ":", color=HELD_OUT, linewidth=0.8)
        axes.errorbar(
            x.value,
            y.value,
            xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[y.value - y.low], [y.high - y.value]],
            fmt="D",
            markersize=4.5,
            color=HELD_OUT,
            elinewidth=0.8,
            alpha=0.6,
            label="front, held-out questions (95 %)",
        )


def _zoom(axes: Any, front: Front) -> None:
    """Show the front and its held-out intervals with some room around them."""
    shown = [record.point for record in front.front if record.point is not None]
    for _, x, y in front.held_out():
        shown += [(x.low, y.low), (x.high, y.high)]
    shown = shown or [front.base_point]
    for values, limit in (
        ([x for x, _ in shown], axes.set_xlim),
        ([y for _, y in shown], axes.set_ylim),
    ):
        room = max(0.1 * (max(values) - min(values)), 0.015)
        limit(min(values) - room, max(values) + room)


def _write_ids(axes: Any, front: Front) -> None:
    """Write the front's trial ids up and right of their points, never one over another."""
    to_points = 72 / axes.figure.dpi
    last = (-1000.0, -1000.0)
    for record in reversed(front.front):  # from the lowest point upwards
        x, y = (value * to_points for value in axes.transData.transform(record.point))
        height = max(y + 5, last[1] + 9) if abs(x - last[0]) < 28 else y + 5
        axes.annotate(
            record.result.trial_id,
            record.point,
            xytext=(6, height - y),
            textcoords="offset points",
            fontsize=7.5,
            color=FRONT,
            zorder=6,
            annotation_clip=True,
        )
        last = (x, height)
