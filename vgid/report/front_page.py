"""``front.html``: the front to hover over and to click on, in one file that needs no network.

Hovering shows a trial's setting and scores. A click keeps them below the picture, names the
trial's run on the tracking server and links to it; MLflow's artifact viewer lets no page open
another, so there the click copies the run's address instead.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vgid.report.page import write_page
from vgid.report.plots import (
    BASE,
    FRONT,
    HELD_OUT,
    INK,
    MARKERS,
    SYMBOLS,
    TRIAL,
    X_LABEL,
    Y_LABEL,
    Front,
    coordinates,
    noise_of,
    trial_label,
)
from vgid.report.records import TrialRecord, describe, run_name
from vgid.results import OBJECTIVES, Score

_STYLE = """#front { flex: 1; min-height: 360px; }
#chosen { padding: 8px 20px 12px; border-top: 1px solid #e6e9ed; min-height: 42px; }
#chosen div { margin-top: 3px; color: #555; }
#address { color: #1f6f8b; }
span#address { user-select: all; }"""

_BODY = """<div id="front"></div>
<div id="chosen" aria-live="polite">Click a point to keep its trial here.</div>"""

_SCRIPT = """  const { data, layout, trials, server } = payload;
  const plot = document.getElementById("front");
  const chosen = document.getElementById("chosen");
  // Inside MLflow the page is a blob of the server's own address, shut off from everything else.
  const framed = location.protocol === "blob:";
  const address = (page) => (framed ? new URL(location.href.slice(5)).origin + "/" : server) + page;
  const element = (kind, content, id) => {
    const made = document.createElement(kind);
    made.textContent = content;
    if (id) made.id = id;
    return made;
  };
  const copy = (content) => {
    const area = element("textarea", content);
    chosen.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  const choose = (point) => {
    const trial = trials[point.customdata];
    if (trial === undefined) return;
    Plotly.restyle(plot, { x: [[point.x]], y: [[point.y]] }, [data.length - 1]);
    chosen.replaceChildren(element("b", trial.name, "run"), element("div", trial.scores));
    if (!trial.page) return;
    const line = element("div", "");
    if (framed) {
      const copied = copy(address(trial.page));
      line.append(copied ? "Address of its run, copied: " : "Address of its run: ");
      line.append(element("span", address(trial.page), "address"));
    } else {
      const link = element("a", "Open its run", "address");
      link.setAttribute("href", address(trial.page));
      link.setAttribute("target", "_blank");
      line.append(link);
    }
    chosen.append(line);
  };
  Plotly.newPlot(plot, data, layout, options).then(() => {
    plot.on("plotly_click", (event) => choose(event.points[0]));
  });"""


def write_html(path: Path, front: Front) -> None:
    """Write ``front.html``.

    Args:
        path: the file.
        front: what to draw, and where its trials' runs are.

    Raises:
        InputError: the file cannot be written.
    """
    payload = {**plotly_figure(front), "trials": _trials(front), "server": front.server}
    write_page(path, front.title, payload, style=_STYLE, body=_BODY, script=_SCRIPT)


def plotly_figure(front: Front) -> dict[str, Any]:
    """The interactive picture as plotly's JSON: ``data`` and ``layout``."""
    traces = [_plotly_trials(front, noise) for noise in MARKERS]
    traces = [trace for trace in traces if trace["x"]]
    if front.held_out():
        traces.append(_plotly_held_out(front))
    if front.front:
        traces.append(_plotly_front(front))
    return {"data": traces + _plotly_marks(front), "layout": _layout(front)}


def _plotly_held_out(front: Front) -> dict[str, Any]:
    """The front's trials on held-out questions, with their intervals."""
    held_out = front.held_out()
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "front, held-out questions (95 %)",
        "x": [x.value for _, x, _ in held_out],
        "y": [y.value for _, _, y in held_out],
        "error_x": _plotly_bars([x for _, x, _ in held_out]),
        "error_y": _plotly_bars([y for _, _, y in held_out]),
        "marker": {"symbol": "diamond", "size": 9, "color": HELD_OUT},
        "customdata": [r.result.trial_id for r, _, _ in held_out],
        "hovertext": [_hover(r, x, y) for r, x, y in held_out],
        "hoverinfo": "text",
    }


def _plotly_front(front: Front) -> dict[str, Any]:
    """The front as steps: what lies below and left of them is dominated."""
    line = front.front
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "front",
        **coordinates(line),
        "line": {"shape": "vh", "color": FRONT, "width": 1.5},
        "marker": {
            "size": 12,
            "color": FRONT,
            "symbol": [SYMBOLS[noise_of(record)] for record in line],
        },
        "customdata": [record.result.trial_id for record in line],
        "hovertext": [_hover(record) for record in line],
        "hoverinfo": "text",
    }


def _plotly_marks(front: Front) -> list[dict[str, Any]]:
    """Rings around the paper's default and around a clicked trial, and the base's star."""

    def ring(size: int, colour: str, width: int) -> dict[str, Any]:
        line = {"width": width}
        return {"symbol": "circle-open", "size": size, "color": colour, "line": line}

    marks: list[dict[str, Any]] = []
    if front.default:
        marks.append(
            {
                "name": "the paper's default setting",
                **coordinates(front.default),
                "marker": ring(21, BASE, 2),
                "hoverinfo": "skip",
            }
        )
    base_x, base_y = front.base_point
    marks += [
        {
            "name": "base model",
            "x": [base_x],
            "y": [base_y],
            "marker": {"symbol": "star", "size": 16, "color": BASE},
            "hovertext": [f"<b>base model</b><br>retain ROUGE-L {base_y:.3f}"],
            "hoverinfo": "text",
        },
        {
            "name": "chosen trial",
            "x": [],
            "y": [],
            "marker": ring(26, FRONT, 3),
            "hoverinfo": "skip",
            "showlegend": False,
        },
    ]
    return [{"type": "scatter", "mode": "markers", **mark} for mark in marks]


def _layout(front: Front) -> dict[str, Any]:
    axis = {"gridcolor": "#e6e9ed", "zeroline": False, "linecolor": INK, "ticks": "outside"}
    return {
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
        "hovermode": "closest",
        "margin": {"l": 70, "r": 30, "t": 80, "b": 60},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
    }


def _trials(front: Front) -> dict[str, dict[str, str]]:
    """What a click shows of each trial, by trial id."""
    shown = {}
    for record in front.drawn:
        trial_id = record.result.trial_id
        shown[trial_id] = {
            "name": run_name(record.config, trial_id),
            "scores": " · ".join(_score_lines(record)),
            "page": front.pages.get(trial_id, ""),
        }
    return shown


def _plotly_trials(front: Front, noise: str | None) -> dict[str, Any]:
    shown = [r for r in front.drawn if noise_of(r) == noise and not r.on_front]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": trial_label(noise),
        **coordinates(shown),
        "marker": {"symbol": SYMBOLS[noise], "size": 9, "color": TRIAL, "opacity": 0.85},
        "customdata": [record.result.trial_id for record in shown],
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
    config = record.config
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
    lines.append(f"rank {config.lora_rank} · {config.epochs} epochs{responses}")
    return "<br>".join(lines + _score_lines(record))


def _score_lines(record: TrialRecord) -> list[str]:
    metrics = record.result.metrics
    labels = {
        OBJECTIVES[0]: "forget reduction",
        OBJECTIVES[1]: "retain ROUGE-L",
        "test_rougeL": "test ROUGE-L",
        "forget_cloze": "forget cloze",
    }
    return [f"{label} {metrics[key]:.3f}" for key, label in labels.items() if key in metrics]
