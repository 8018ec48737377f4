"""The paper's nine tables: which rows each has, and how its numbers are written down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any, NamedTuple, get_args

import yaml

from vgid.config import ForgetRatio, Method, TrialConfig, parse
from vgid.paper.experiments import Arm, Experiment, Outcome
from vgid.paper.printed import TABLE_7, closest_backbone, paper_row
from vgid.prompts import PromptStyle
from vgid.report.intervals import Interval, count_seeds, t_interval
from vgid.report.page import rendered
from vgid.report.records import METHOD_LABELS
from vgid.report.tables import Grid, as_text, four_cells

METRIC_LABELS = {"cloze": "cloze", "classification": "class", "rougeL": "ROUGE-L", "bleu": "BLEU"}
ARROWS = {"forget": "↓", "test": "↓", "retain": "↑", "celebrity": "↑"}


def _three(*splits: str) -> tuple[str, ...]:
    return tuple(
        f"{s}_{metric}" for s in splits for metric in ("cloze", "classification", "rougeL")
    )


FORGET_AND_TEST = _three("forget", "test")
ALL_NINE = _three("forget", "test", "retain")
TEXT_SCORES = ("forget_rougeL", "forget_bleu", "test_rougeL", "test_bleu")
CELEBRITIES = _three("celebrity")
"""General utility, beside the retain people where the data has celebrities; the paper has none."""
EXTRA = ("retain_bleu", "forget_memorisation")  # in the CSV only, for figure 5 and for suspicion

PRINTED: dict[Method, str] = {"po_dpo": "PO", "po_idk": "PO", "vgid": "Vgid"}
"""The paper's names of rows that it does not call by our label."""

STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)
SIGMAS = (0.2, 0.4, 0.6, 0.8)
COMPARISONS: dict[ForgetRatio, int] = {5: 3, 10: 8, 15: 9}  # all methods, by forget ratio

_SCORES = {"text": TEXT_SCORES, "forget and test": FORGET_AND_TEST, "all nine": ALL_NINE}
_TABLES: dict[int, dict[str, Any]] = yaml.safe_load(
    files("vgid.paper").joinpath("tables.yaml").read_text(encoding="utf-8")
)


class Row(NamedTuple):
    """One row of a table: its names in code, in print and in the paper, what it runs, its block.

    Within a seed, every row of a table has the same people and questions.
    """

    key: str
    label: str
    paper: str
    arm: Arm
    setting: str = ""

    def printed(self, table: int, backbone: str, metric: str) -> float | None:
        """What the paper prints there for one of its backbones, if it does."""
        found = paper_row(table, backbone, self.paper, self.setting)
        return None if found is None else found.scores.get(metric)


@dataclass(frozen=True)
class Table:
    """One of the paper's tables, for any backbone; ``metrics`` are its columns."""

    number: int
    title: str
    forget_ratio: ForgetRatio
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]

    def experiment(self, row: Row, backbone: str, seed: int) -> Experiment:
        """The experiment behind a row, for one seed."""
        return Experiment(backbone=backbone, forget_ratio=self.forget_ratio, seed=seed, arm=row.arm)


def tables(trials: Mapping[Method, TrialConfig]) -> dict[int, Table]:
    """Tables 1 to 6, 8 and 9 with each method's setting; methods without one have no row.

    They are told in ``tables.yaml``; Table 7 has no runs (``table_7``).
    """
    methods = [
        Row(method, label, PRINTED.get(method, label), Arm(trial=trials[method]))
        for method, label in METHOD_LABELS.items()
        if method in trials
    ]
    found = {}
    for number, told in _TABLES.items():
        rows = []
        for key, label, paper, run, *block in told["rows"]:
            if "vgid" not in run:
                rows.append(Row(key, label, paper, Arm(**run), *block))
            elif "vgid" in trials:
                values = trials["vgid"].model_dump() | run["vgid"]
                trial = parse(TrialConfig, values, "table")
                arm = Arm(trial=trial, reverse=run.get("reverse", False))
                rows.append(Row(key, label, paper, arm, *block))
        rows += methods if told.get("methods") else []
        scores = _SCORES[told["scores"]]
        found[number] = Table(number, told["title"], told["forget_ratio"], scores, tuple(rows))
    return found


@dataclass(frozen=True)
class FilledTable:
    """A table of one backbone with the outcomes of each row by key, one a seed."""

    table: Table
    backbone: str
    seeds: tuple[int, ...]
    outcomes: Mapping[str, tuple[Outcome, ...]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Its columns: the paper's, and the celebrities' where it has the retain people."""
        utility = CELEBRITIES if "retain_rougeL" in self.table.metrics else ()
        return (*self.table.metrics, *(metric for metric in utility if self.questions(metric)))

    def values(self, key: str, metric: str) -> list[float | None]:
        """A score of a row, one value a seed; None where training failed or nothing was asked."""
        if key not in self.outcomes:
            return [None] * len(self.seeds)
        found = [outcome.scores.get(metric) for outcome in self.outcomes[key]]
        return [None if score is None else score.value for score in found]

    def interval(self, key: str, metric: str) -> Interval:
        """Mean over the seeds with its t interval."""
        return t_interval(self.values(key, metric))

    def questions(self, metric: str) -> int:
        """Questions behind a score of the first row and seed."""
        (first, *_) = self.outcomes[self.table.rows[0].key]
        return first.scores[metric].n if metric in first.scores else 0

    @cached_property
    def paper_backbone(self) -> str:
        """The paper's backbone whose numbers stand beside."""
        return closest_backbone(self.backbone, self.table.number)


def fill(
    table: Table, backbone: str, seeds: Sequence[int], outcomes: Mapping[Experiment, Outcome]
) -> FilledTable:
    """Take a table's outcomes from those of a run."""
    of_rows = {
        row.key: tuple(outcomes[table.experiment(row, backbone, seed)] for seed in seeds)
        for row in table.rows
    }
    return FilledTable(table, backbone, tuple(seeds), of_rows)


def as_csv(filled: Sequence[FilledTable]) -> bytes:
    """One line a backbone, row and score: mean, interval, n, the paper's number, every seed's."""
    seeds = sorted({seed for table in filled for seed in table.seeds})
    header = [
        "table", "backbone", "forget_ratio", "setting", "row", "label", "score", "mean", "low",
        "high", "seeds", "questions", "paper", "paper_backbone", *(f"seed_{s}" for s in seeds),
    ]  # fmt: skip
    lines = []
    for one in filled:
        table = one.table
        cells = [(row, metric) for row in table.rows for metric in (*one.metrics, *EXTRA)]
        for row, metric in cells:
            by_seed = dict(zip(one.seeds, one.values(row.key, metric), strict=True))
            lines.append(
                [table.number, one.backbone, table.forget_ratio, row.setting, row.key, row.label,
                 metric, *four_cells(one.interval(row.key, metric)), one.questions(metric),
                 row.printed(table.number, one.paper_backbone, metric), one.paper_backbone,
                 *map(by_seed.get, seeds)]
            )  # fmt: skip
    return Grid(header, lines).csv()


def as_grid(filled: FilledTable) -> Grid:
    """A table for print: in each cell mean [interval], and the paper's number behind a stroke."""
    table = filled.table
    columns = [metric.split("_") for metric in filled.metrics]
    headings = [f"{split} {METRIC_LABELS[kind]} {ARROWS[split]}" for split, kind in columns]
    rows = []
    for row in table.rows:
        label = f"{row.label}, {row.setting}" if row.setting else row.label
        failed = sum(outcome.error is not None for outcome in filled.outcomes[row.key])
        some = f" ({failed} failed)" if failed else ""
        cells = []
        for metric in filled.metrics:
            printed = row.printed(table.number, filled.paper_backbone, metric)
            mean = filled.interval(row.key, metric)
            ours = f"{mean}{some}" if mean.n else "failed"
            cells.append(f"{ours} / –" if printed is None else f"{ours} / {printed:.3f}")
        rows.append((label, *cells))
    several = len(filled.seeds) > 1
    interval = "with its 95 % t interval" if several else "(one seed: no interval)"
    asked = zip(headings, map(filled.questions, filled.metrics), strict=True)
    notes = (
        f"Ours / the paper's {filled.paper_backbone}. Ours: mean over "
        f"{count_seeds(len(filled.seeds))} {interval}, which may reach beyond 0 and 1, on held-out "
        f"questions. Questions a seed: {', '.join(f'{name[:-2]} {n}' for name, n in asked)}.",
    )
    caption = f"Table {table.number}: {table.title} ({filled.backbone})"
    return Grid(("Row", *headings), rows, caption, notes)


def table_7(backbone: str, trials: Mapping[Method, TrialConfig]) -> str:
    """In Markdown, the settings that we run beside the paper's for its baselines."""
    told = {"method", "learning_rate", "batch_size", "epochs", "seed"}
    rows = []
    for method, label in METHOD_LABELS.items():
        if method in trials:
            trial = trials[method]
            always = trial.model_dump(include={"lora_rank", "alpha"})
            changed = trial.model_dump(exclude_defaults=True, exclude=told) | always
            named = [name for name in TrialConfig.model_fields if name in changed]
            rows.append((label, trial, [f"{name} {as_text(changed[name])}" for name in named]))
    given = {"backbone": backbone, "paper": TABLE_7, "rows": rows}
    return rendered("vgid.paper", "table_7.md.jinja", **given)
