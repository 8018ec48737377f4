"""The picture of a study: ``front.png`` (matplotlib) and ``front.html`` (plotly, self-contained).

Axes as in the paper's figure 4: how much of the forget people's ROUGE-L is gone against what is
left of the retain people's. Both pictures show every completed trial, the front, the base model
and the paper's default setting, and, where given, the front's held-out scores with their
intervals. matplotlib and plotly are imported when a picture is drawn.
"""

import base64
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vgid.outputs import (
    NOISE_LABELS,
    OBJECTIVES,
    TrialRecord,
    describe,
    held_out_scores,
    write_atomically,
)
from vgid.results import Score
from vgid.search_space import is_paper_default

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
    """

    title: str
    records: Sequence[TrialRecord]
    base: Mapping[str, Score]
    base_held_out: Mapping[str, Score] | None = None

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
            scores = held_out_scores(record, self.base_held_out) or {}
            if all(name in scores for name in OBJECTIVES):
                found.append((record, scores[OBJECTIVES[0]], scores[OBJECTIVES[1]]))
        return found

    @property
    def caption(self) -> str:
        """How many trials are on the front, and how many have no place in the picture."""
        missing = len(self.records) - len(self.drawn)
        rest = f", {missing} not completed" if missing else ""
        return f"{len(self.front)} on the front{rest}"


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


def write_html(path: Path, front: Front) -> None:
    """Write ``front.html``: one file that needs no network; hovering shows a trial's settings.

    plotly's JavaScript is kept compressed inside the page (a third of its size) and unpacked by
    the browser.

    Args:
        path: the file.
        front: what to draw.

    Raises:
        InputError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs

    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    # "<" cannot stand in a script element's JSON as it is: "</script>" would end it.
    data = json.dumps(plotly_figure(front), ensure_ascii=False).replace("<", "\\u003c")
    page = PAGE.format(title=escape(front.title), figure=data, library=library)
    write_atomically(path, page.encode())


def plotly_figure(front: Front) -> dict[str, Any]:
    """The interactive picture as plotly's JSON: ``data`` and ``layout``."""
    traces = [_plotly_trials(front, noise) for noise in MARKERS]
    traces = [trace for trace in traces if trace["x"]]
    line = front.front
    held_out = front.held_out()
    if held_out:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "front, held-out questions (95 %)",
                "x": [x.value for _, x, _ in held_out],
                "y": [y.value for _, _, y in held_out],
                "error_x": _plotly_bars([x for _, x, _ in held_out]),
                "error_y": _plotly_bars([y for _, _, y in held_out]),
                "marker": {"symbol": "diamond", "size": 9, "color": HELD_OUT},
                "hovertext": [_hover(r, x, y) for r, x, y in held_out],
                "hoverinfo": "text",
            }
        )
    if line:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "front",
                **_coordinates(line),
                "line": {"shape": "vh", "color": FRONT, "width": 1.5},
                "marker": {
                    "size": 12,
                    "color": FRONT,
                    "symbol": [SYMBOLS[_noise(record)] for record in line],
                },
                "hovertext": [_hover(record) for record in line],
                "hoverinfo": "text",
            }
        )
    if front.default:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "the paper's default setting",
                **_coordinates(front.default),
                "marker": {
                    "symbol": "circle-open",
                    "size": 21,
                    "color": BASE,
                    "line": {"width": 2},
                },
                "hoverinfo": "skip",
            }
        )
    base_x, base_y = front.base_point
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "base model",
            "x": [base_x],
            "y": [base_y],
            "marker": {"symbol": "star", "size": 16, "color": BASE},
            "hovertext": [f"<b>base model</b><br>retain ROUGE-L {base_y:.3f}"],
            "hoverinfo": "text",
        }
    )
    axis = {"gridcolor": "#e6e9ed", "zeroline": False, "linecolor": INK, "ticks": "outside"}
    layout = {
        "title": {
            "text": escape(front.title),
            "subtitle": {"text": front.caption},
            "x": 0.02,
            "xanchor": "left",
        },
        "xaxis": {**axis, "title": {"text": X_LABEL}},
        "yaxis": {**axis, "title": {"text": Y_LABEL}},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "legend": {"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0, "xanchor": "left"},
        "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"color": INK}},
        "margin": {"l": 70, "r": 30, "t": 80, "b": 60},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
    }
    return {"data": traces, "layout": layout}


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>html, body, #front {{ height: 100%; margin: 0; }} #front {{ min-height: 480px; }}</style>
<div id="front"></div>
<script id="figure" type="application/json">{figure}</script>
<script id="library" type="text/plain">{library}</script>
<script>
const text = (id) => document.getElementById(id).textContent;
const packed = Uint8Array.from(atob(text("library")), (c) => c.charCodeAt(0));
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
new Response(unpacked).text().then((code) => {{
  const script = document.createElement("script");
  script.textContent = code;
  document.head.append(script);
  const {{ data, layout }} = JSON.parse(text("figure"));
  Plotly.newPlot("front", data, layout, {{ responsive: true, displaylogo: false }});
}}).catch((error) => {{
  document.getElementById("front").textContent =
    `This picture needs a browser of 2023 or later (${{error}}); front.png shows the same.`;
}});
</script>
</html>
"""


def _coordinates(records: Iterable[TrialRecord]) -> dict[str, list[float]]:
    points = [record.point for record in records if record.point is not None]
    return {"x": [x for x, _ in points], "y": [y for _, y in points]}


def _noise(record: TrialRecord) -> str | None:
    return record.config.used.get("noise_type")


def _label(noise: str | None) -> str:
    return "trial" if noise is None else f"trial, {NOISE_LABELS[noise]}"


def _plotly_trials(front: Front, noise: str | None) -> dict[str, Any]:
    shown = [r for r in front.drawn if _noise(r) == noise and not r.on_front]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": _label(noise),
        **_coordinates(shown),
        "marker": {"symbol": SYMBOLS[noise], "size": 9, "color": TRIAL, "opacity": 0.85},
        "hovertext": [_hover(record) for record in shown],
        "hoverinfo": "text",
    }


def _plotly_bars(scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [score.high - score.value for score in scores],
        "arrayminus": [score.value - score.low for score in scores],
        "thickness": 1,
        "width": 3,
        "color": HELD_OUT,
    }


def _hover(record: TrialRecord, x: Score | None = None, y: Score | None = None) -> str:
    config, metrics = record.config, record.result.metrics
    name = f"<b>trial {escape(record.result.trial_id)}</b>"
    lines = [f"{name} · held-out questions" if x else name, escape(describe(config))]
    if x is not None and y is not None:
        lines += [
            f"forget reduction {x.value:.3f}  [{x.low:.3f}, {x.high:.3f}], n = {x.n}",
            f"retain ROUGE-L {y.value:.3f}  [{y.low:.3f}, {y.high:.3f}], n = {y.n}",
        ]
        return "<br>".join(lines)
    source = config.used.get("response_source")
    responses = "" if source is None else f" · {source} responses"
    lines += [
        f"rank {config.lora_rank} · {config.epochs} epochs{responses}",
        f"forget reduction {metrics[OBJECTIVES[0]]:.3f}",
        f"retain ROUGE-L {metrics[OBJECTIVES[1]]:.3f}",
    ]
    lines += [
        f"{label} {metrics[key]:.3f}"
        for key, label in (("test_rougeL", "test ROUGE-L"), ("forget_cloze", "forget cloze"))
        if key in metrics
    ]
    return "<br>".join(lines)


def _draw(axes: Any, front: Front) -> None:
    """Draw the trials, the front and the marks on one pair of axes."""
    axes.grid(color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    for noise, marker in MARKERS.items():
        shown = [r for r in front.drawn if _noise(r) == noise and not r.on_front]
        if shown:
            label = _label(noise)
            at = _coordinates(shown)
            axes.scatter(at["x"], at["y"], 34, TRIAL, marker, label=label, alpha=0.85, linewidths=0)
    line = _coordinates(front.front)
    # "pre" walks down, then right: the border of what the front dominates.
    axes.step(line["x"], line["y"], where="pre", color=FRONT, linewidth=1.4, zorder=3)
    for record in front.front:
        marker = MARKERS[_noise(record)]
        axes.scatter(*(record.point or ()), 62, FRONT, marker, zorder=4, edgecolors="white")
    axes.plot([], [], color=FRONT, marker="o", linewidth=1.4, label="front")
    if front.default:
        at, label = _coordinates(front.default), "the paper's default setting"
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
