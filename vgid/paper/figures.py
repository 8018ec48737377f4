"""The paper's figures 2 and 4 to 7 from the tables' outcomes, as PNG and as HTML.

Figures 4 to 7 show for every method how much of the forget set is gone against what is left of the
retain set, one panel a forget ratio; figure 2 shows what the first response token may be under the
interventions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vgid.files import write_atomically
from vgid.paper.experiments import Arm, Experiment, Outcome
from vgid.paper.tables import COMPARISONS, METRIC_LABELS, FilledTable
from vgid.report.drawing import INK, Panel, Picture, Scale, Series
from vgid.report.intervals import Interval, t_interval
from vgid.report.page import write_page

TRADE_OFFS: dict[int, str] = {4: "rougeL", 5: "bleu", 6: "classification", 7: "cloze"}
"""Metric of each of the paper's trade-off figures."""

FIRST_TOKEN_ARMS: dict[str, Arm] = {
    "base": Arm(probe="first_tokens"),
    "text only": Arm(style="strict", probe="first_tokens"),
    "dual": Arm(style="strict", noise_type="random", probe="first_tokens"),
}
"""What figure 2 asks: panels (a), (b) and (c)."""

COLOURS = {
    "base": "#222222", "ga": "#8a97a6", "ga_diff": "#6c5b7b", "kl_min": "#355c7d",
    "po_dpo": "#2a9d8f", "po_idk": "#8ab17d", "npo": "#b8860b", "rmu": "#a0522d",
    "icu_t": "#e9a23b", "noise_t": "#5fa8d3", "vgid": "#d1495b",
}  # fmt: skip
MARKS = {"base": "star", "vgid": "diamond", "icu_t": "triangle-up", "noise_t": "triangle-down"}
TOKENS = {"sensitive": "#e08a3c", "safe": "#4a9d6e"}
"""Kinds of tokens in figure 2, and their colours."""


def trade_off(number: int, filled: Sequence[FilledTable]) -> Picture:
    """Figure 4, 5, 6 or 7 of one backbone.

    Args:
        number: of the figure.
        filled: Tables 3, 8 and 9 of the backbone, or those of them that there are.
    """
    metric = TRADE_OFFS[number]
    x_label = f"reduction of forget {METRIC_LABELS[metric]}"
    y_label = f"retain {METRIC_LABELS[metric]}"
    panels = []
    for table in filled:
        base = table.values("base", f"forget_{metric}")
        drawn = []
        for row in table.table.rows:
            left = table.values(row.key, f"forget_{metric}")
            gone = t_interval(
                [None if a is None or b is None else a - b for a, b in zip(base, left, strict=True)]
            )
            kept = table.interval(row.key, f"retain_{metric}")
            if not (gone.n and kept.n):
                continue
            drawn.append(
                Series(
                    row.label,
                    [gone.mean],
                    [kept.mean],
                    COLOURS.get(row.key, INK),
                    MARKS.get(row.key, "circle"),
                    16 if row.key == "base" else 11,
                    x_bounds=[_bounds(gone)],
                    y_bounds=[_bounds(kept)],
                    hover=[f"{row.label}\n{x_label} {gone}\n{y_label} {kept}"],
                )
            )
        title = f"{table.table.forget_ratio} % forgotten"
        panels.append(Panel(Scale(x_label), Scale(y_label), drawn, title))
    title = f"Figure {number}: forgetting against utility by {METRIC_LABELS[metric]}"
    return _picture(f"{title} ({filled[0].backbone})", panels)


def first_tokens(
    backbone: str, seeds: Sequence[int], outcomes: Mapping[Experiment, Outcome]
) -> Picture | None:
    """Figure 2 of one backbone from the outcomes of ``FIRST_TOKEN_ARMS`` at 5 %; None without."""
    panels, known = [], 0
    for measure, y_label in (
        ("logit", "logit above the vocabulary's mean"),
        ("probability", "probability"),
    ):
        drawn = []
        for kind, colour in TOKENS.items():
            found = []
            for arm in FIRST_TOKEN_ARMS.values():
                runs = [outcomes[first_token_experiment(backbone, arm, seed)] for seed in seeds]
                scores = [outcome.scores.get(f"{kind}_{measure}") for outcome in runs]
                found.append(t_interval([None if s is None else s.value for s in scores]))
            known += sum(interval.n for interval in found)
            drawn.append(
                Series(
                    f"{kind} tokens",
                    range(len(found)),
                    [interval.mean if interval.n else 0.0 for interval in found],
                    colour,
                    "bar",
                    y_bounds=[_bounds(interval) for interval in found],
                    hover=[f"{kind} tokens\n{y_label} {interval}" for interval in found],
                )
            )
        ticks = list(enumerate(FIRST_TOKEN_ARMS))
        title = f"first response token: {measure}"
        panels.append(Panel(Scale(ticks=ticks), Scale(y_label), drawn, title))
    title = f"Figure 2: sensitive and safe tokens under the interventions ({backbone})"
    return _picture(title, panels) if known else None


def _picture(title: str, panels: Sequence[Panel]) -> Picture:
    return Picture(title, panels, size=(4.6 * len(panels) + 1, 4.6))


def _bounds(interval: Interval) -> tuple[float, float]:
    """Both ends of an interval; of one seed there is none, and of no seed no number."""
    if interval.n > 1:
        return interval.low, interval.high
    return (interval.mean, interval.mean) if interval.n else (0.0, 0.0)


def first_token_experiment(backbone: str, arm: Arm, seed: int) -> Experiment:
    """The experiment behind a bar of figure 2."""
    return Experiment(backbone=backbone, forget_ratio=5, seed=seed, arm=arm)


def pictures(filled: Sequence[FilledTable], backbone: str) -> dict[int, Picture]:
    """Figures 4 to 7 of a backbone by number, as far as its tables 3, 8 and 9 are there."""
    numbers = COMPARISONS.values()
    mine = [t for t in filled if t.backbone == backbone and t.table.number in numbers]
    return {number: trade_off(number, mine) for number in TRADE_OFFS} if mine else {}


def write_picture(folder: Path, stem: str, picture: Picture) -> list[str]:
    """Write ``<stem>.png`` and ``<stem>.html``; plotly's code lies once beside all pages.

    Returns:
        The names of both files.

    Raises:
        InputError: a file cannot be written.
    """
    write_atomically(folder / f"{stem}.png", picture.png())
    write_page(folder / f"{stem}.html", picture, beside=True)
    return [f"{stem}.png", f"{stem}.html"]
