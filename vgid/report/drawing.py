"""The drawing kit: a picture is declared once, and drawn as a PNG and for a browser.

A ``Picture`` is panels side by side or one above the other; a panel holds series of marks and
lines, and bars, on two scales. matplotlib draws ``Picture.png``, plotly
``Picture.plotly`` (``vgid.report.page`` makes a page of it); both are imported when something is
drawn. All texts are plain: what would be markup to plotly is escaped here.
"""

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRIAL, FRONT, HELD_OUT, BASE, INK = "#8a97a6", "#d1495b", "#1f6f8b", "#222222", "#333333"
GRID = "#e6e9ed"

MARKERS = {
    "circle": "o",
    "circle-open": "o",
    "square": "s",
    "triangle-up": "^",
    "triangle-down": "v",
    "triangle-right": ">",
    "diamond": "D",
    "star": "*",
}
"""The kinds of marks, as plotly and as matplotlib call them; an open one is a ring."""

POINTS_PER_PIXEL = 0.65
"""A mark of one pixel in a page has this diameter in a PNG, whose figures are a bit smaller."""

Places = Sequence[float | None]
Bounds = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Marks, a line through them, or both.

    Attributes:
        name: in the legend, where all series of one name are one entry.
        x: places of the points; None ends a line, and what follows begins another.
        y: the same upwards.
        colour: as ``#rrggbb``.
        mark: a key of ``MARKERS``, or one for each point; empty for a line alone.
        size: a mark's diameter in pixels of a page.
        opacity: from 0 to 1.
        line: width of the line in pixels, 0 for none.
        dotted: whether the line is.
        steps: the line goes up or down first, then right, instead of straight.
        x_bounds: low and high end of each point's interval; empty for none.
        y_bounds: the same upwards.
        hover: what hovering over each point shows in lines; of several the first is bold.
        keys: what a click on each point tells the page's script.
        labels: a text beside each point.
        listed: whether the legend names it.
    """

    name: str
    x: Places
    y: Places
    colour: str
    mark: str | Sequence[str] = "circle"
    size: float = 9
    opacity: float = 1.0
    line: float = 0
    dotted: bool = False
    steps: bool = False
    x_bounds: Bounds = ()
    y_bounds: Bounds = ()
    hover: Sequence[str] = ()
    keys: Sequence[str] = ()
    labels: Sequence[str] = ()
    listed: bool = True

    @property
    def marks(self) -> list[str]:
        """The mark of each point; none for a line alone."""
        if isinstance(self.mark, str):
            return [self.mark] * len(self.x) if self.mark else []
        return list(self.mark)

    @property
    def points(self) -> list[tuple[float, float]]:
        """The places of its points."""
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if x is not None and y is not None]


@dataclass(frozen=True)
class Bars:
    """Bars at 0, 1, 2 and so on of a scale; those of several ``Bars`` stand beside each other.

    Attributes:
        name: in the legend.
        values: their lengths.
        colour: as ``#rrggbb``.
        horizontal: they lie along the x axis.
        bounds: low and high end of each value's interval; empty for none.
        hover: what hovering over each bar shows, as in ``Series``.
    """

    name: str
    values: Sequence[float]
    colour: str
    horizontal: bool = False
    bounds: Bounds = ()
    hover: Sequence[str] = ()
    listed: bool = True


@dataclass(frozen=True)
class Scale:
    """One axis of a panel.

    Attributes:
        label: its title.
        range: its ends, the first at the left or at the bottom; None to hold what is drawn.
        ticks: places and their texts instead of numbers.
        marked: the text among them that stands out.
        percent: numbers are shares, written as per cent.
        shown: whether there is anything of it to be seen.
    """

    label: str = ""
    range: tuple[float, float] | None = None
    ticks: Sequence[tuple[float, str]] = ()
    marked: str = ""
    percent: bool = False
    shown: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        x: the scale to the right.
        y: the scale upwards.
        drawn: its content, what comes later above what came before.
        title: above it.
    """

    x: Scale
    y: Scale
    drawn: Sequence[Series | Bars]
    title: str = ""

    def ends(self, axis: str) -> tuple[float, float]:
        """The ends of its ``x`` or ``y`` scale, with some room around what is drawn."""
        scale: Scale = getattr(self, axis)
        if scale.range is not None:
            return scale.range
        found = [0.0, 1.0]
        series = [item for item in self.drawn if isinstance(item, Series)]
        values = [value for item in series for value in getattr(item, axis) if value is not None]
        for item in series:
            values += [end for pair in getattr(item, f"{axis}_bounds") for end in pair]
        found = values or found
        room = 0.05 * (max(found) - min(found))
        return min(found) - room, max(found) + room


@dataclass(frozen=True)
class Picture:
    """A figure, drawn by ``png`` and ``plotly``.

    Attributes:
        title: its headline.
        panels: from left to right, or from top to bottom.
        subtitle: a second headline.
        size: width and height of the PNG in inches.
        dpi: its pixels an inch.
        stacked: panels stand one above the other.
    """

    title: str
    panels: Sequence[Panel]
    subtitle: str = ""
    size: tuple[float, float] = (8.4, 5.4)
    dpi: int = 130
    stacked: bool = False

    def png(self) -> bytes:
        """The picture as a PNG file; the same picture gives the same bytes."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, dpi=self.dpi, layout="constrained")
        canvas = FigureCanvasAgg(figure)  # no pyplot: no global state, no display
        shape = (len(self.panels), 1) if self.stacked else (1, len(self.panels))
        pairs = list(zip(figure.subplots(*shape, squeeze=False).flat, self.panels, strict=True))
        headline = " · ".join(filter(None, (self.title, self.subtitle)))
        letters = int(11 * self.size[0])  # on one line
        figure.suptitle(
            textwrap.fill(headline, letters, break_on_hyphens=False), fontsize=12, color=BASE
        )
        legend: dict[str, Any] = {}
        for axes, panel in pairs:
            _draw_panel(axes, panel)
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(name, handle)
        figure.legend(
            legend.values(),
            legend.keys(),
            loc="outside lower center",
            ncols=max(2, int(0.62 * self.size[0])),
            frameon=False,
            fontsize=8.5,
            columnspacing=1.4,
        )
        figure.draw_without_rendering()  # the layout must stand before labels keep their distance
        for axes, panel in pairs:
            _write_labels(axes, panel)
        image = io.BytesIO()
        canvas.print_png(image, metadata={"Software": None})
        return image.getvalue()

    def plotly(self) -> dict[str, Any]:
        """The interactive picture as plotly's JSON: ``data`` and ``layout``."""
        traces: list[dict[str, Any]] = []
        texts: list[dict[str, Any]] = []
        layout: dict[str, Any] = {
            "title": {
                "text": _markup(self.title),
                "subtitle": {"text": _markup(self.subtitle)},
                "x": 0.02,
                "xanchor": "left",
            },
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "legend": {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"},
            "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"color": INK}},
            "hovermode": "closest",
            "barmode": "group",
            "margin": {"l": 70, "r": 30, "t": 115, "b": 60},
            "plot_bgcolor": "white",
            "annotations": texts,
        }
        names: set[str] = set()
        gap = 0 if len(self.panels) == 1 else 0.14 if self.stacked else 0.07
        for number, panel in enumerate(self.panels):
            start, end = (number + gap) / len(self.panels), (number + 1 - gap) / len(self.panels)
            x, y = [start, end], [0.0, 1.0]
            if self.stacked:
                x, y = y, [1 - end, 1 - start]
            suffix = str(number + 1) if number else ""
            refs = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
            layout[f"xaxis{suffix}"] = _plotly_scale(panel.x, x, refs["yaxis"])
            layout[f"yaxis{suffix}"] = _plotly_scale(panel.y, y, refs["xaxis"])
            texts += _plotly_texts(panel, x, y, suffix)
            for item in panel.drawn:
                trace = _plotly_series(item) if isinstance(item, Series) else _plotly_bars(item)
                listed = item.listed and item.name not in names
                names |= {item.name} if listed else set()
                traces.append({**trace, **_told(item), **refs, "showlegend": listed})
        return {"data": traces, "layout": layout}


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10.5, color=INK, loc="left")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    bars = [item for item in panel.drawn if isinstance(item, Bars)]
    for order, item in enumerate(panel.drawn):
        if isinstance(item, Series):
            _draw_series(axes, item, 2 + order / 100)
        else:
            _draw_bars(axes, item, bars.index(item), len(bars))
    for name, scale, side in (("x", panel.x, "bottom"), ("y", panel.y, "left")):
        axis = getattr(axes, f"{name}axis")
        axis.set_label_text(scale.label, color=INK)
        if scale.ticks:
            axis.set_ticks([place for place, _ in scale.ticks], [text for _, text in scale.ticks])
            for label in axis.get_ticklabels():
                if label.get_text() == scale.marked:
                    label.set(color=FRONT, weight="bold")
        if scale.range is not None:
            axes.set(**{f"{name}lim": scale.range})
        if scale.percent:
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if not scale.shown:
            axis.set_visible(False)
            axes.spines[side].set_visible(False)


def _draw_series(axes: Any, series: Series, order: float) -> None:
    x, y = (np.array(values, dtype=np.float64) for values in (series.x, series.y))
    paint: dict[str, Any] = {"color": series.colour, "alpha": series.opacity, "zorder": order}
    line = {
        **paint,
        "linewidth": 0.9 * series.line,
        "linestyle": (":" if series.dotted else "-") if series.line else "",
        "drawstyle": "steps-pre" if series.steps else "default",
    }
    # One by one, so that lines through each other are seen as several.
    for path in np.split(np.column_stack((x, y)), np.flatnonzero(np.isnan(x))):
        axes.plot(path[:, 0], path[:, 1], **line)
    reach = {
        f"{name}err": np.abs(np.array(bounds).T - middle)
        for name, bounds, middle in (("x", series.x_bounds, x), ("y", series.y_bounds, y))
        if bounds
    }
    if reach:
        axes.errorbar(x, y, **reach, fmt="none", elinewidth=0.9, **paint)
    for mark in dict.fromkeys(series.marks):
        edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.7}
        if mark.endswith("-open"):
            edge = {"markerfacecolor": "none", "markeredgewidth": 1.5}
        elif series.opacity < 1 or series.size < 8:
            edge = {"markeredgewidth": 0}
        shape = {"marker": MARKERS[mark], "markersize": POINTS_PER_PIXEL * series.size, **edge}
        chosen = np.array(series.marks) == mark
        axes.plot(x[chosen], y[chosen], **paint, **shape, linestyle="")
        line = shape | line  # the legend shows the first of several marks
    if series.listed:
        axes.plot([], [], **line, label=series.name)


def _draw_bars(axes: Any, bars: Bars, index: int, count: int) -> None:
    draw, direction = (axes.barh, "x") if bars.horizontal else (axes.bar, "y")
    reach = np.abs(np.array(bars.bounds).T - bars.values) if bars.bounds else None
    draw(
        np.arange(len(bars.values)) + 0.8 * ((index + 0.5) / count - 0.5),
        bars.values,
        0.76 / count,
        color=bars.colour,
        label=bars.name,
        error_kw={"elinewidth": 0.8},
        **{f"{direction}err": reach},
    )


def _write_labels(axes: Any, panel: Panel) -> None:
    """Write the labels of a panel whose layout stands."""
    from matplotlib.patheffects import withStroke

    to_points = 72 / axes.figure.dpi
    box = axes.bbox

    def place(points: NDArray[np.float64]) -> NDArray[np.float64]:
        moved = axes.transData.transform(points) - (box.x0, box.y0)
        return np.asarray(moved * to_points, dtype=np.float64)

    frame = np.array((box.width, box.height)) * to_points
    for label in _labels(panel, place, frame, 7.5):
        axes.annotate(
            label.text,
            label.at,
            xytext=label.offset,
            textcoords="offset points",
            fontsize=7.5,
            color=label.colour,
            ha="center",
            va="center",
            zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={
                "arrowstyle": "-",
                "linewidth": 0.8 if label.far else 0,
                "color": label.colour,
                "shrinkB": 2,
            },
        )


@dataclass(frozen=True)
class _Label:
    """A text beside its point; ``offset`` is how far its middle lies to the right and above."""

    text: str
    at: tuple[float, float]
    offset: tuple[float, float]
    colour: str
    far: bool


def _labels(
    panel: Panel,
    place: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    frame: NDArray[np.float64],
    font: float,
) -> Iterator[_Label]:
    """The labels of a panel, each near its point, and over no other or mark if there is room.

    Args:
        panel: what has labels.
        place: from coordinates of the data to lengths from the panel's lower left corner.
        frame: width and height of the panel in these lengths.
        font: height of the letters in these lengths.
    """
    series = [item for item in panel.drawn if isinstance(item, Series)]
    marks = [at for item in series if item.mark for at in item.points]
    points = place(np.array(marks or [(np.nan, np.nan)], dtype=np.float64))
    # The corners first, which no interval crosses; and all that farther and farther off.
    sides = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)])
    gaps = font * np.array([0.4, 1.3, 2.5, 3.7, 5.1, 6.7, 8.5])
    taken = np.empty((0, 4))
    for item in series:
        for text, at in zip(item.labels, item.points, strict=False):
            own = place(np.array([at]))[0]
            if (own < 0).any() or (own > frame).any():
                continue
            half = np.array((0.32 * len(text) + 0.1, 0.6)) * font
            offsets = (sides * (half + gaps[:, None, None])).reshape(-1, 2)
            middles = own + offsets
            texts = (np.abs(middles[:, None] - taken[:, :2]) < half + taken[:, 2:]).all(-1).sum(1)
            others = (np.abs(middles[:, None] - points) < half + 0.4 * font).all(-1).sum(1)
            outside = ((middles < half) | (middles > frame - half)).any(-1)
            ring = np.arange(len(offsets)) // len(sides)
            best = int(np.argmin(12 * texts + 1.5 * others + 20 * outside + ring))
            taken = np.vstack((taken, (*middles[best], *half)))
            right, above = offsets[best].tolist()
            yield _Label(text, at, (right, above), item.colour, bool(ring[best]))


def _told(item: Series | Bars) -> dict[str, Any]:
    """What plotly's legend and hovering say of a trace."""
    name = _markup(item.name)
    if not item.hover:
        return {"name": name, "legendgroup": name, "hoverinfo": "skip"}
    texts = []
    for text in item.hover:
        first, *rest = _markup(text).split("<br>")
        texts.append("<br>".join([f"<b>{first}</b>", *rest]) if rest else first)
    return {"name": name, "legendgroup": name, "hoverinfo": "text", "hovertext": texts}


def _plotly_series(series: Series) -> dict[str, Any]:
    open_mark = isinstance(series.mark, str) and series.mark.endswith("-open")
    return {
        "type": "scatter",
        "mode": "+".join(["lines"] * bool(series.line) + ["markers"] * bool(series.mark)) or "none",
        "x": list(series.x),
        "y": list(series.y),
        "error_x": _plotly_reach(series.x_bounds, series.x, series.colour),
        "error_y": _plotly_reach(series.y_bounds, series.y, series.colour),
        "opacity": series.opacity,
        "customdata": list(series.keys),
        "marker": {
            "symbol": series.mark or "circle",
            "size": series.size,
            "color": series.colour,
            "line": {"width": 2 if open_mark else 0},
        },
        "line": {
            "color": series.colour,
            "width": series.line,
            "shape": "vh" if series.steps else "linear",
            "dash": "dot" if series.dotted else "solid",
        },
    }


def _plotly_bars(bars: Bars) -> dict[str, Any]:
    along, across = ("x", "y") if bars.horizontal else ("y", "x")
    return {
        "type": "bar",
        "orientation": "h" if bars.horizontal else "v",
        across: list(range(len(bars.values))),
        along: list(bars.values),
        f"error_{along}": _plotly_reach(bars.bounds, bars.values, INK),
        "marker": {"color": bars.colour},
    }


def _plotly_reach(bounds: Bounds, middles: Places, colour: str) -> dict[str, Any]:
    pairs = list(zip(bounds, middles, strict=False))
    return {
        "visible": bool(bounds),
        "type": "data",
        "symmetric": False,
        "array": [high - x for (_, high), x in pairs if x is not None],
        "arrayminus": [x - low for (low, _), x in pairs if x is not None],
        "thickness": 1,
        "width": 3,
        "color": colour,
    }


def _plotly_scale(scale: Scale, domain: list[float], anchor: str) -> dict[str, Any]:
    texts = [_markup(text) for _, text in scale.ticks]
    marked = _markup(scale.marked)
    ticks = {
        "tickvals": [place for place, _ in scale.ticks],
        "ticktext": [f"<b>{text}</b>" if text == marked else text for text in texts],
    }
    return {
        "domain": domain,
        "anchor": anchor,
        "title": {"text": _markup(scale.label)},
        "range": scale.range,
        "tickformat": ".0%" if scale.percent else "",
        "gridcolor": GRID,
        "zeroline": False,
        "visible": scale.shown,
        "automargin": True,
        **(ticks if texts else {}),
    }


def _plotly_texts(
    panel: Panel, x: Sequence[float], y: Sequence[float], suffix: str
) -> list[dict[str, Any]]:
    """Title and labels; the labels keep their distance on a panel of the usual size."""
    frame = np.array((1150 * (x[1] - x[0]), 500 * (y[1] - y[0])))
    low, high = np.array([panel.ends("x"), panel.ends("y")]).T
    span = np.where(high == low, 1.0, high - low)

    def place(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((points - low) / span * frame, dtype=np.float64)

    title = {"x": x[0], "y": y[1], "xref": "paper", "yref": "paper", "font": {"size": 14}}
    title |= {"xanchor": "left", "yanchor": "bottom", "yshift": 4, "showarrow": False}
    return [{**title, "text": _markup(panel.title)}] + [
        {
            "x": label.at[0],
            "y": label.at[1],
            "xref": f"x{suffix}",
            "yref": f"y{suffix}",
            "ax": label.offset[0],
            "ay": -label.offset[1],  # plotly counts pixels downwards
            "text": _markup(label.text),
            "font": {"size": 11, "color": label.colour},
            "bgcolor": "rgba(255,255,255,0.7)",
            "borderpad": 0,
            "arrowhead": 0,
            "arrowwidth": 0.7,
            "arrowcolor": label.colour if label.far else "rgba(0,0,0,0)",
        }
        for label in _labels(panel, place, frame, 11)
    ]


def _markup(text: str) -> str:
    return escape(text, quote=False).replace("\n", "<br>")
