"""The tables of a study: ``trials.csv``, ``front.csv`` and ``study.json``.

Each file is written beside its place and moved there, so that a reader never sees half of one; to
``trials.csv`` each ended trial adds its row while the study runs. Numbers are written with
``repr``: ``float`` (or ``pandas.read_csv(..., float_precision="round_trip")``) reads the same bits
back. Nothing here is a name, a question or an answer.
"""

import errno
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vgid.config import Method, TrialConfig
from vgid.files import unwritable, write_atomically
from vgid.report.tables import FOUR_PARTS, Grid, four_cells
from vgid.requirement import OBJECTIVES, turned
from vgid.results import Score, TrialResult, candidate_id, trial_order

HYPERPARAMETERS = ("alpha", "beta", "noise_type", "sigma", "prompt_style", "learning_rate")
MAIN_METRICS = ("forget_rougeL", "retain_rougeL", "test_rougeL", "forget_rougeL_reduction")
FURTHER_METRICS = (
    "retain_rougeL_drop", "forget_cloze", "forget_memorisation", "forget_refusal", "retain_refusal",
    "forget_rougeL_raw", "test_rougeL_raw", "retain_rougeL_raw", "forget_refusal_raw",
    "retain_refusal_raw", "test_cloze", "retain_cloze",
    "retain_seen_rougeL", "retain_unseen_rougeL", "retain_seen_shown",
    "celebrity_rougeL", "celebrity_cloze",
)  # fmt: skip
"""Metrics that stand before the many others, where a trial has them."""

TRIAL_FIELDS = tuple(dict.fromkeys((*HYPERPARAMETERS, *TrialConfig.model_fields)))

NOISE_LABELS = {"random": "random noise", "gaussian": "Gaussian noise", "white": "white image"}
METHOD_LABELS: dict[Method, str] = {
    "ga": "GA", "ga_diff": "GA_Diff", "kl_min": "KL_Min", "po_dpo": "PO (DPO)",
    "po_idk": "PO (refusal tuning)", "npo": "NPO", "rmu": "RMU", "icu_t": "ICU-T",
    "noise_t": "Noise-T", "vgid": "VGID",
}  # fmt: skip
"""What the methods are called, in the order of the paper's Table 3."""


def describe(config: TrialConfig) -> str:
    """One readable line for a trial, the same in tables, figures and on the tracking server."""
    used = config.used
    parts = [] if config.method == "vgid" else [METHOD_LABELS[config.method]]
    if config.released:
        parts.append("public script")
    if "noise_type" in used:
        noise = NOISE_LABELS[config.noise_type].replace(" ", "-")
        parts.append(noise if config.sigma is None else f"{noise} σ{config.sigma:.2g}")
    if "prompt_style" in used:
        parts.append(config.prompt_style)
    if "preference_beta" in used:
        parts.append(f"preference β{config.preference_beta:.2g}")
    if "rmu_layer" in used:
        layer = "a third" if config.rmu_layer is None else config.rmu_layer
        parts.append(f"layer {layer} · steering {config.rmu_steering:.2g}")
    if "beta" in used:
        parts.append(f"α{config.alpha:.2g} β{config.beta:.2g}")
    mantissa, exponent = f"{config.learning_rate:.1e}".split("e")
    parts.append(f"lr {mantissa.removesuffix('.0')}e{int(exponent)}")
    if config.adapter_scale != 1:
        parts.append(f"scale {config.adapter_scale:g}")
    return " · ".join(parts)


def misses_of(result: TrialResult) -> str:
    """The study's bounds that a trial misses, in words; empty if none."""
    return ", ".join(f"{bound} by {by:.3f}" for bound, by in result.missed.items() if by > 0)


def run_name(config: TrialConfig, trial_id: str) -> str:
    """What the tracking server calls a trial's run: which trial, and what it is."""
    return f"{trial_id} · {describe(config)}"


@dataclass(frozen=True)
class TrialRecord:
    """One ended trial as the tables, the figures and the tracking server show it.

    ``on_front``: no other trial of the study dominates it; ``held_out`` are its scores on the
    held-out questions, for trials that were scored again.
    """

    config: TrialConfig
    result: TrialResult
    on_front: bool = False
    held_out: Mapping[str, Score] | None = None
    objectives: tuple[str, ...] = OBJECTIVES

    @property
    def feasible(self) -> bool:
        """Whether it keeps the study's bounds, without which it has no place on the front."""
        return all(by <= 0 for by in self.result.missed.values())

    @property
    def values(self) -> tuple[float, ...] | None:
        """The study's objectives as they were scored, None where the trial lacks one."""
        metrics = self.result.metrics
        if self.result.status != "completed" or not all(n in metrics for n in self.objectives):
            return None
        return tuple(metrics[name] for name in self.objectives)

    @property
    def point(self) -> tuple[float, ...] | None:
        """The same, each turned so that more is better."""
        if (values := self.values) is None:
            return None
        return tuple(map(turned, self.objectives, values))

    @property
    def place(self) -> tuple[float, float] | None:
        """Where the trial stands in pictures, whose axes are always those of ``OBJECTIVES``."""
        plane = replace(self, objectives=OBJECTIVES).values
        return None if plane is None else (plane[0], plane[1])

    @property
    def harvested(self) -> list["TrialRecord"]:
        """Its candidates for the front beside itself, as the trials that they would be."""
        found = []
        for each in self.result.harvest:
            name = candidate_id(self.result.trial_id, each.scale)
            own = {"adapter_scale": self.config.adapter_scale * each.scale}
            result = TrialResult(
                trial_id=name,
                status=self.result.status,
                scores=each.scores,
                metrics=each.metrics,
                missed=each.missed,
                # Made for those on the front, when they are scored again.
                adapter=self.result.adapter and self.result.adapter.with_name(name),
            )
            config = self.config.model_copy(update=own)
            found.append(TrialRecord(config, result, objectives=self.objectives))
        return found

    @property
    def is_harvested(self) -> bool:
        """Whether it is a trial at another scale than its own."""
        return "x" in self.result.trial_id


class TrialsTable:
    """``trials.csv`` while a study runs: each trial that ends adds a row, whatever came before.

    Rows stand in the order in which trials ended, each with ``on_front`` as it was then. The file
    is written whole before its first row is added (which mends a line that a killed process left
    half-written), when a trial has a metric without a column, and at the end of the study.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []

    def holds(self, record: TrialRecord) -> bool:
        """Whether the file is there with all columns that the trial needs."""
        return set(_columns([record])) <= set(self._columns)

    def write(self, records: Iterable[TrialRecord]) -> None:
        """Write the file whole, by trial id."""
        rows = _ordered(records)
        columns = _columns(rows)
        lines = [_cells(record, columns, self._path.parent) for record in rows]
        write_atomically(self._path, Grid(columns, lines).csv())
        self._columns = columns

    def add(self, record: TrialRecord) -> None:
        """Add a row for a trial that the table ``holds``; DiskError leaves the file as it was."""
        row = _cells(record, self._columns, self._path.parent)
        _, line = Grid(self._columns, [row]).csv().split(b"\n", 1)
        try:
            with self._path.open("ab", buffering=0) as stream:
                before = stream.tell()
                try:
                    if stream.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    stream.truncate(before)
                    raise
        except OSError as error:
            raise unwritable(self._path, error) from None


def write_front(path: Path, records: Iterable[TrialRecord]) -> None:
    """Write ``front.csv``: the front's rows of ``trials.csv`` and their held-out scores.

    Each held-out score takes four columns: ``heldout_<name>``, the bounds of its 95 % interval
    ``_low`` and ``_high``, and the number of questions ``_n``.
    """
    everything = _ordered(records)
    columns = _columns(everything)
    front = [(record, record.held_out or {}) for record in everything if record.on_front]
    names = _main_first(name for _, scores in front for name in scores)
    further = [f"heldout_{name}{part}" for name in names for part in FOUR_PARTS]
    lines = [
        _cells(record, columns, path.parent)
        + [cell for name in names for cell in four_cells(scores.get(name))]
        for record, scores in front
    ]
    write_atomically(path, Grid([*columns, *further], lines).csv())


def write_study(path: Path, summary: Mapping[str, Any]) -> None:
    """Write ``study.json``, or another summary of plain data, paths and configurations.

    ValueError where a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(summary, indent=2, allow_nan=False, default=_plain, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def _ordered(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    return sorted(records, key=lambda record: trial_order(record.result.trial_id))


def _main_first(names: Iterable[str]) -> list[str]:
    found = set(names)
    leading = [name for name in MAIN_METRICS + FURTHER_METRICS if name in found]
    return leading + sorted(found - set(leading))


def _columns(records: Collection[TrialRecord]) -> list[str]:
    found = {name for record in records for name in record.result.metrics}
    # The last epoch's learning rate is a metric too; its column is the configured one's.
    metrics = _main_first(found.union(MAIN_METRICS).difference(TRIAL_FIELDS))
    misses = ["misses"] if any(record.result.missed for record in records) else []
    return [
        "trial_id",
        "status",
        *TRIAL_FIELDS,
        *metrics,
        *misses,
        "on_front",
        "seconds",
        "adapter",
    ]


def _cells(record: TrialRecord, columns: Sequence[str], folder: Path) -> list[Any]:
    config, result = record.config, record.result
    adapter = result.adapter
    if adapter is not None and adapter.is_relative_to(folder):
        adapter = adapter.relative_to(folder)  # the output folder can be moved
    # What comes later counts: a metric of a field's name does not stand in the field's column.
    row = {
        **result.metrics,
        **dict.fromkeys(TRIAL_FIELDS),
        **config.used,
        "trial_id": result.trial_id,
        "status": result.status,
        "misses": misses_of(result),
        "on_front": record.on_front,
        "seconds": sum(result.seconds.values()),
        "adapter": adapter,
    }
    return [row.get(name) for name in columns]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no place in study.json")
