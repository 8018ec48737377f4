"""The paper's figures 2 and 4 to 7 from the tables' outcomes, as PNG and as HTML.

Figures 4 to 7 show for every method how much of the forget set is gone against what is left of the
retain set, one panel a forget ratio; figure 2 shows what the first response token may be under the
interventions.
"""

from collections.abc import Mapping, Sequence

from vgid.paper.experiments import Arm, Experiment, Outcome
from vgid.paper.tables import COMPARISONS, METRIC_LABELS, FilledTable
from vgid.report.drawing import Panel, Picture, Scale, Series
from vgid.report.intervals import Interval, paired_interval, t_interval

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
    metric = METRIC_LABELS[TRADE_OFFS[number]]
    x, y = Scale(f"reduction of forget {metric}"), Scale(f"retain {metric}")
    panels = []
    for table in filled:
        forget, retain = (f"{split}_{TRADE_OFFS[number]}" for split in ("forget", "retain"))
        drawn = []
        for row in table.table.rows:
            gone = paired_interval(table.values("base", forget), table.values(row.key, forget))
            kept = table.interval(row.key, retain)
            if gone.n and kept.n:
                drawn.append(
                    Series(
                        row.label,
                        [gone.mean],
                        [kept.mean],
                        COLOURS[row.key],
                        MARKS.get(row.key, "circle"),
                        16 if row.key == "base" else 11,
                        x_bounds=[_bounds(gone)],
                        y_bounds=[_bounds(kept)],
                        hover=[f"{row.label}\n{x.label} {gone}\n{y.label} {kept}"],
                    )
                )
        panels.append(Panel(x, y, drawn, f"{table.table.forget_ratio} % forgotten"))
    title = f"Figure {number}: forgetting against utility by {metric} ({filled[0].backbone})"
    return Picture(title, panels, size=(4.6 * len(panels) + 1, 4.6))


def first_tokens(
    backbone: str, seeds: Sequence[int], outcomes: Mapping[Experiment, Outcome]
) -> Picture | None:
    """Figure 2 of one backbone from the outcomes of ``FIRST_TOKEN_ARMS`` at 5 %; None without."""
    runs = [
        [outcomes[first_token_experiment(backbone, arm, seed)].scores for seed in seeds]
        for arm in FIRST_TOKEN_ARMS.values()
    ]
    if not any(scores for of_arm in runs for scores in of_arm):
        return None
    panels = []
    labels = {"logit": "logit above the vocabulary's mean", "probability": "probability"}
    for measure, label in labels.items():
        drawn = []
        for kind, colour in TOKENS.items():
            name = f"{kind}_{measure}"
            found = [t_interval(s[name].value for s in of_arm if name in s) for of_arm in runs]
            drawn.append(
                Series(
                    f"{kind} tokens",
                    range(len(found)),
                    [interval.mean if interval.n else 0.0 for interval in found],
                    colour,
                    "bar",
                    y_bounds=[_bounds(interval) for interval in found],
                    hover=[f"{kind} tokens\n{label} {interval}" for interval in found],
                )
            )
        x = Scale(ticks=list(enumerate(FIRST_TOKEN_ARMS)))
        panels.append(Panel(x, Scale(label), drawn, f"first response token: {measure}"))
    title = f"Figure 2: sensitive and safe tokens under the interventions ({backbone})"
    return Picture(title, panels, size=(4.6 * len(panels) + 1, 4.6))


def _bounds(interval: Interval) -> tuple[float, float]:
    """Both ends of an interval; of one seed there is none, and of no seed no number."""
    if interval.n > 1:
        return interval.low, interval.high
    return (interval.mean, interval.mean) if interval.n else (0.0, 0.0)


def first_token_experiment(backbone: str, arm: Arm, seed: int) -> Experiment:
    """The experiment behind a bar of figure 2."""
    return Experiment(backbone=backbone, forget_ratio=5, seed=seed, arm=arm)


def pictures(
    filled: Sequence[FilledTable],
    backbone: str,
    seeds: Sequence[int],
    outcomes: Mapping[Experiment, Outcome],
) -> dict[int, Picture]:
    """A backbone's figures by number: 2 where Table 2 is there, 4 to 7 as far as 3, 8 and 9 are."""
    mine = {table.table.number: table for table in filled if table.backbone == backbone}
    found: dict[int, Picture] = {}
    if 2 in mine and (picture := first_tokens(backbone, seeds, outcomes)) is not None:
        found[2] = picture
    compared = [mine[number] for number in COMPARISONS.values() if number in mine]
    return found | {number: trade_off(number, compared) for number in TRADE_OFFS if compared}
