"""The drawing kit: a picture is declared once, and drawn as a PNG and for a browser.

A ``Picture`` is panels side by side or one above the other; a panel holds series of marks, lines
or bars on two scales. matplotlib draws ``Picture.png``, plotly ``Picture.plotly``; both are
imported when something is drawn. Texts are plain: what would be markup to plotly is escaped here.
"""

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TRIAL, FRONT, HELD_OUT, BASE, INK = "#8a97a6", "#d1495b", "#1f6f8b", "#222222", "#333333"
STOPPED, OUTSIDE = "#e9a23b", "#7b5ea7"
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
    "x": "X",
}
"""The kinds of marks, as plotly and as matplotlib call them; an open one is a ring."""

BARS = {"bar": "v", "bar-right": "h"}
"""Marks that are bars, upwards or to the right, and plotly's names of these directions."""

POINTS_PER_PIXEL = 0.65
"""Diameter in a PNG of a mark of one pixel in a page."""

Places = Sequence[float | None]
Bounds = Sequence[tuple[float, float]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Marks, a line through them, or both; or bars, beside those of the panel's other series.

    Attributes:
        name: in the legend (if ``listed``), where all series of one name are one entry.
        x: places of the points; None ends a line, and what follows begins another.
        mark: a key of ``MARKERS``, or one for each point; empty for a line alone; or of ``BARS``.
        size: a mark's diameter in pixels of a page, as is the width of the ``line``.
        steps: the line goes up or down first, then right, instead of straight.
        x_bounds: low and high end of each point's interval; empty for none.
        hover: what hovering over each point shows in lines; of several the first is bold.
        keys: what a click on each point tells the page's script.
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
    def points(self) -> list[tuple[float, float]]:
        """The places of its points."""
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    @property
    def bars(self) -> str:
        """Direction of its bars as plotly calls it, if it has any."""
        return BARS.get(self.mark, "") if isinstance(self.mark, str) else ""


@dataclass(frozen=True)
class Scale:
    """One axis of a panel, ``range`` its ends from left or bottom, None to hold what is drawn.

    ``ticks`` are places and their texts instead of numbers, ``marked`` the one that stands out.
    """

    label: str = ""
    range: tuple[float, float] | None = None
    ticks: Sequence[tuple[float, str]] = ()
    marked: str = ""
    percent: bool = False
    shown: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes; of what is drawn, what comes later lies above what came before."""

    x: Scale
    y: Scale
    drawn: Sequence[Series]
    title: str = ""

    def ends(self, axis: str) -> tuple[float, float]:
        """The ends of its ``x`` or ``y`` scale, with some room around what is drawn."""
        scale: Scale = getattr(self, axis)
        if scale.range is not None:
            return scale.range
        values = [value for item in self.drawn for value in getattr(item, axis)]
        for item in self.drawn:
            values += [end for pair in getattr(item, f"{axis}_bounds") for end in pair]
        found = [value for value in values if value is not None] or [0.0, 1.0]
        room = max(0.1 * (max(found) - min(found)), 0.015)
        return min(found) - room, max(found) + room


@dataclass(frozen=True)
class Picture:
    """Panels from left to right, or ``stacked``; ``size`` is the PNG's in inches, of ``dpi``."""

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
        places = figure.subplots(*self._shape, squeeze=False).flat
        pairs = list(zip(places, self.panels, strict=True))
        headline = " · ".join(filter(None, (self.title, self.subtitle)))
        letters = int(11 * self.size[0])  # on one line
        headline = textwrap.fill(headline, letters, break_on_hyphens=False)
        figure.suptitle(headline, fontsize=12, color=BASE)
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
        from plotly.subplots import make_subplots

        rows, columns = self._shape
        gaps = {"horizontal_spacing": 0.14 / columns, "vertical_spacing": 0.28 / rows}
        titles = [_markup(panel.title) for panel in self.panels]
        figure = make_subplots(rows, columns, subplot_titles=titles, **gaps)
        figure.update_annotations(font={"size": 14})
        title = {"text": _markup(self.title), "subtitle": {"text": _markup(self.subtitle)}}
        figure.update_layout(
            template="none",
            title={**title, "x": 0.02, "xanchor": "left"},
            font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
            legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"},
            hoverlabel={"bgcolor": "white", "align": "left", "font": {"color": INK}},
            hovermode="closest",
            margin={"l": 70, "r": 30, "t": 115 if self.title else 45, "b": 60},
        )
        names: set[str] = set()
        for number, panel in enumerate(self.panels):
            row, column = divmod(number, columns)
            place = {"row": row + 1, "col": column + 1}
            figure.update_xaxes(_plotly_scale(panel.x), **place)
            figure.update_yaxes(_plotly_scale(panel.y), **place)
            for item in panel.drawn:
                listed = item.listed and item.name not in names
                names |= {item.name} if listed else set()
                figure.add_trace(_plotly_trace(item) | {"showlegend": listed}, **place)
            for text in _plotly_labels(panel, np.array((1150 / columns, 500 / rows))):
                figure.add_annotation(text, **place)
        return dict(figure.to_dict())

    @property
    def _shape(self) -> tuple[int, int]:
        return (len(self.panels), 1) if self.stacked else (1, len(self.panels))


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10.5, color=INK, loc="left")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    bars = [item for item in panel.drawn if item.bars]
    for order, item in enumerate(panel.drawn):
        if item.bars:
            _draw_bars(axes, item, (bars.index(item) + 0.5) / len(bars) - 0.5, len(bars))
        else:
            _draw_series(axes, item, 2 + order / 100)
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
    x, y = np.array((series.x, series.y), dtype=np.float64)
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
    if reaches := {f"{axis}err": reach for axis, reach in _reaches(series).items()}:
        axes.errorbar(x, y, **reaches, fmt="none", elinewidth=0.9, **paint)
    marks = np.array([series.mark] * len(x) if isinstance(series.mark, str) else series.mark)
    for mark in dict.fromkeys(marks[marks != ""].tolist()):
        edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.7}
        if mark.endswith("-open"):
            edge = {"markerfacecolor": "none", "markeredgewidth": 1.5}
        elif series.opacity < 1 or series.size < 8:
            edge = {"markeredgewidth": 0}
        shape = {"marker": MARKERS[mark], "markersize": POINTS_PER_PIXEL * series.size, **edge}
        axes.plot(x[marks == mark], y[marks == mark], **paint, **shape, linestyle="")
        line = shape | line  # the legend shows the first of several marks
    if series.listed:
        axes.plot([], [], **line, label=series.name)


def _draw_bars(axes: Any, bars: Series, side: float, beside: int) -> None:
    draw, at, values = axes.bar, bars.x, bars.y
    if bars.bars == "h":
        draw, at, values = axes.barh, bars.y, bars.x
    style: dict[str, Any] = {"color": bars.colour, "error_kw": {"elinewidth": 0.8}}
    style |= {f"{axis}err": reach for axis, reach in _reaches(bars).items()}
    draw(np.array(at) + 0.8 * side, values, 0.76 / beside, label=bars.name, **style)


def _reaches(series: Series) -> dict[str, Floats]:
    """How far intervals reach to either side, (2, N), along ``x`` and ``y`` where there are any."""
    pairs = (("x", series.x_bounds, series.x), ("y", series.y_bounds, series.y))
    return {axis: np.abs(np.array(ends).T - np.array(at)) for axis, ends, at in pairs if ends}


def _write_labels(axes: Any, panel: Panel) -> None:
    from matplotlib.patheffects import withStroke

    frame = np.array(axes.bbox.size) * 72 / axes.figure.dpi
    halo = withStroke(linewidth=2, foreground="white")
    for label in _labels(panel, np.array((axes.get_xlim(), axes.get_ylim())), frame, 7.5):
        arrow = {"arrowstyle": "-", "linewidth": 0.8 if label.far else 0, "shrinkB": 2}
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
            path_effects=[halo],
            arrowprops={**arrow, "color": label.colour},
        )


class _Label(NamedTuple):
    """A text beside its point; ``offset`` is how far its middle lies to the right and above."""

    text: str
    at: tuple[float, float]
    offset: tuple[float, float]
    colour: str
    far: bool


def _labels(panel: Panel, ends: Floats, frame: Floats, font: float) -> Iterator[_Label]:
    """The labels of a panel, each near its point, and over no other or mark if there is room.

    ``ends`` are those of both scales, (2, 2); ``frame`` is the panel's width and height, in the
    unit of the letters' height ``font``.
    """
    marks = [at for item in panel.drawn if item.mark for at in item.points]
    points = _placed(marks or [(np.nan, np.nan)], ends, frame)
    # The corners first, which no interval crosses; and all that farther and farther off.
    sides = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)])
    gaps = font * np.array([0.4, 1.3, 2.5, 3.7, 5.1, 6.7, 8.5])
    taken = np.empty((0, 4))
    for item in panel.drawn:
        for text, at in zip(item.labels, item.points, strict=False):
            own = _placed([at], ends, frame)[0]
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


def _placed(points: Sequence[tuple[float, float]], ends: Floats, frame: Floats) -> Floats:
    """Where points lie in a panel, from its lower left corner, (N, 2)."""
    return np.asarray((np.array(points) - ends[:, 0]) / (ends[:, 1] - ends[:, 0]) * frame)


def _plotly_trace(series: Series) -> dict[str, Any]:
    name = _markup(series.name)
    trace: dict[str, Any] = {
        "type": "bar" if series.bars else "scatter",
        "name": name,
        "legendgroup": name,
        "x": list(series.x),
        "y": list(series.y),
        "opacity": series.opacity,
        "hoverinfo": "text" if series.hover else "skip",
        "hovertext": [_told(text) for text in series.hover] or None,
        "customdata": list(series.keys) or None,
    }
    for axis, (below, above) in _reaches(series).items():
        ink = INK if series.bars else series.colour
        ends = {"symmetric": False, "array": above.tolist(), "arrayminus": below.tolist()}
        trace[f"error_{axis}"] = {**ends, "thickness": 1, "width": 3, "color": ink}
    if series.bars:
        bars = {"orientation": series.bars, "marker": {"color": series.colour}}
        return trace | bars
    open_mark = isinstance(series.mark, str) and series.mark.endswith("-open")
    return trace | {
        "mode": "+".join(["lines"] * bool(series.line) + ["markers"] * bool(series.mark)) or "none",
        "marker": {
            "symbol": series.mark or None,
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


def _told(text: str) -> str:
    first, *rest = _markup(text).split("<br>")
    return "<br>".join([f"<b>{first}</b>", *rest]) if rest else first


def _plotly_scale(scale: Scale) -> dict[str, Any]:
    marked = _markup(scale.marked)
    texts = [_markup(text) for _, text in scale.ticks]
    return {
        "title": {"text": _markup(scale.label)},
        "range": scale.range,
        "tickformat": ".0%" if scale.percent else None,
        "tickvals": [place for place, _ in scale.ticks] or None,
        "ticktext": [f"<b>{text}</b>" if text == marked else text for text in texts] or None,
        "gridcolor": GRID,
        "zeroline": False,
        "visible": scale.shown,
        "automargin": True,
    }


def _plotly_labels(panel: Panel, frame: Floats) -> Iterator[dict[str, Any]]:
    """The labels, which keep their distance on a panel of the usual size."""
    for label in _labels(panel, np.array((panel.ends("x"), panel.ends("y"))), frame, 11):
        yield {
            "text": _markup(label.text),
            "x": label.at[0],
            "y": label.at[1],
            "ax": label.offset[0],
            "ay": -label.offset[1],  # plotly counts pixels downwards
            "font": {"size": 11, "color": label.colour},
            "bgcolor": "rgba(255,255,255,0.7)",
            "borderpad": 0,
            "arrowhead": 0,
            "arrowwidth": 0.7,
            "arrowcolor": label.colour if label.far else "rgba(0,0,0,0)",
        }


def _markup(text: str) -> str:
    return escape(text, quote=False).replace("\n", "<br>")
