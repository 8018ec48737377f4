"""The paper's qualitative claims as statements over the tables, each with its verdict.

A claim is a function from per-seed values to its comparisons (with a baseline, a style, a noise),
each one statistic a seed, positive where the claim holds there. A comparison's t interval over its
own seeds decides; a run that diverged takes its seed from its own comparison only. A single seed
decides nothing. Where differences are normal over seeds, a verdict is wrong in at most 5 % of
studies, exact ties included:

- A claim about *each* comparison is held if every 95 % interval lies above zero. That is an
  intersection-union test (Berger 1982): to call it held wrongly, the one comparison that fails
  must come out above zero, so the number of comparisons needs no correction. It is not held if any
  upper bound lies below zero. With k comparisons there are k chances of that, so these bounds are
  corrected by Bonferroni (of Holm's steps only the first bears on "any", and that is Bonferroni).
- A claim that *some* comparison differs from zero is held if any interval, corrected for their
  number, leaves zero out; no number of seeds shows that nothing differs, so it is never not held.

The smallest of k statistics within each seed would be no evidence either way: with exact ties it
is below zero on average. The same functions read the paper's own numbers, which are one "seed"
without an interval.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Literal, get_args

import numpy as np
import yaml
from numpy.typing import NDArray

from vgid.config import Method, TrialConfig, parse
from vgid.paper.printed import closest_backbone
from vgid.paper.tables import ALL_NINE, SIGMAS, STYLES, FilledTable, tables
from vgid.report.intervals import Interval, count_seeds, t_interval
from vgid.report.page import rendered
from vgid.report.records import METHOD_LABELS

Verdict = Literal["held", "not held", "undecided"]
Statistic = NDArray[np.float64]
"""One number a seed, positive where the claim holds; NaN where the seed cannot tell."""
Comparisons = Mapping[str, Statistic]
"""A claim's statistics by what is compared with (a row's key); "" for a claim that has one."""
Evidence = Callable[[int, str, str], Statistic]
"""A cell's values, one a seed, by number of the table, key of the row, and score; NaN if none."""
Comparing = Callable[[Evidence], Comparisons]

BASELINES = ("ga", "ga_diff", "kl_min", "po_dpo", "po_idk", "npo", "rmu")
ASCENDING = ("ga", "ga_diff", "kl_min")
SINGLE_TEACHERS = ("icu_t", "noise_t")
OTHER_METHODS = (*BASELINES, *SINGLE_TEACHERS)
GAUSSIAN = tuple(f"gaussian_{sigma}" for sigma in SIGMAS)
OTHER_NOISES = ("white", *GAUSSIAN)
FORGET, RETAIN, TEST = "forget_rougeL", "retain_rougeL", "test_rougeL"
MOST = 0.5
"""A model "leaves most knowledge" if more than this share of the base's ROUGE-L is left."""
FORGETS = 0.1
"""A method "forgets" if it takes at least this share of the base's forget ROUGE-L away."""


def our_evidence(filled: Mapping[int, FilledTable]) -> Evidence:
    """The filled tables of one backbone, by number."""
    seeds = max((len(table.seeds) for table in filled.values()), default=0)

    def values(table: int, key: str, metric: str) -> Statistic:
        found = filled[table].values(key, metric) if table in filled else [None] * seeds
        return np.array(found, dtype=np.float64)

    return values


def paper_evidence(backbone: str) -> Evidence:
    """The paper's own numbers for one of its backbones, as one seed; rows go by our keys."""
    every = tables({m: parse(TrialConfig, {"method": m}, "default") for m in get_args(Method)})
    rows = {(number, row.key): row for number, table in every.items() for row in table.rows}

    def values(table: int, key: str, metric: str) -> Statistic:
        row = rows.get((table, key))
        printed = None if row is None else row.printed(table, backbone, metric)
        return np.array([printed], dtype=np.float64)

    return values


@dataclass(frozen=True)
class Claim:
    """A claim of ``claims.yaml``; for ``compare`` and ``about`` see the module's docstring."""

    id: str
    text: str
    where: str
    measure: str
    compare: Comparing
    note: str = ""
    about: Literal["each", "some"] = "each"


@dataclass(frozen=True)
class Judgement:
    """What a claim's comparisons say on one backbone: the statistics of each, a number a seed.

    ``paper`` is the statistic on the paper's own numbers, of several the least (for a claim about
    some the largest difference), None where it has none.
    """

    claim: Claim
    backbone: str
    by_seed: Mapping[str, Sequence[float] | Statistic]
    paper: float | None = None

    def corrected_for(self, comparisons: int) -> dict[str, Interval]:
        """The 95 % interval of each comparison, corrected for a number of comparisons."""
        return {name: t_interval(values, comparisons) for name, values in self.by_seed.items()}

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The same, uncorrected."""
        return self.corrected_for(1)

    @cached_property
    def corrected(self) -> dict[str, Interval]:
        """The same, corrected for the claim's own comparisons."""
        return self.corrected_for(len(self.by_seed))

    @cached_property
    def verdict(self) -> Verdict:
        """See the module's docstring."""
        corrected = self.corrected.values()
        if self.claim.about == "some":
            return "held" if any(i.low > 0 or i.high < 0 for i in corrected) else "undecided"
        if any(interval.high < 0 for interval in corrected):
            return "not held"
        every = self.intervals.values()
        return "held" if every and all(interval.low > 0 for interval in every) else "undecided"

    @property
    def decisive(self) -> str:
        """The comparison that decides, or is farthest from letting the claim hold."""
        if self.claim.about == "some":  # the farthest from zero
            far = {k: max(_bound(i.low), _bound(-i.high)) for k, i in self.corrected.items()}
            return max(far, key=far.__getitem__)
        if self.verdict == "not held":
            return min(self.corrected, key=lambda name: _bound(self.corrected[name].high))
        return min(self.intervals, key=lambda name: _bound(self.intervals[name].low))

    @property
    def measured(self) -> str:
        """The decisive interval for people to read; a claim whose tables were not run says so."""
        name = self.decisive
        interval = self.intervals[name]
        if interval.n == 0:
            return "not measured"
        return f"{interval} ({_label(name)}, of {len(self.by_seed)})" if name else str(interval)


def _bound(value: float) -> float:
    """A bound to sort by: none at all comes before every other."""
    return -math.inf if math.isnan(value) else value


def _label(name: str) -> str:
    """What a comparison is called: methods as in the tables, other rows by their key."""
    return next((label for method, label in METHOD_LABELS.items() if method == name), name)


def judge(claim: Claim, backbone: str, evidence: Evidence, paper: Evidence) -> Judgement:
    """Evaluate one claim on one backbone's tables, and on the paper's."""
    # The paper is one seed, so each of its comparisons is one number.
    printed = [float(v) for (v,) in claim.compare(paper).values() if not math.isnan(v)]
    if claim.about == "some":
        printed = [max(map(abs, printed))] if printed else []
    return Judgement(claim, backbone, claim.compare(evidence), min(printed, default=None))


def _leads(table: int, own: str, others: Sequence[str], metric: str) -> Comparing:
    """By how much a row is better than each other: more is better on the retain set, else less."""
    sign = 1.0 if metric.startswith("retain") else -1.0
    return lambda values: {
        other: sign * (values(table, own, metric) - values(table, other, metric))
        for other in others
    }


def _vgid_leads(table: int, methods: Sequence[str], metric: str) -> Comparing:
    """As ``_leads``, but methods that have no value at all are left out."""

    def compare(values: Evidence) -> Comparisons:
        run = [method for method in methods if not np.isnan(values(table, method, metric)).all()]
        return _leads(table, "vgid", run or methods, metric)(values)

    return compare


def _icu_leaves_most(values: Evidence) -> Comparisons:
    base = values(1, "base", FORGET)
    known = np.where(base > 0, base, math.nan)
    return {style: values(1, f"icu_{style}", FORGET) / known - MOST for style in STYLES}


def _forgetting_grows_with_sigma(values: Evidence) -> Comparisons:
    # A slope over all sigmas: of the steps, with few seeds, a single one up or down would decide.
    away = np.array(SIGMAS) - np.mean(SIGMAS)
    return {"": -(away @ np.stack([values(4, key, FORGET) for key in GAUSSIAN])) / (away @ away)}


def _styles_differ(values: Evidence) -> Comparisons:
    return {
        f"{a} and {b}": values(5, a, FORGET) - values(5, b, FORGET)
        for a, b in itertools.combinations(STYLES, 2)
    }


def _strict_is_most_stable(values: Evidence) -> Comparisons:
    """How much better strict is than each other style, mean over the nine scores."""
    others = [style for style in STYLES if style != "strict"]
    leads = [_leads(5, "strict", others, metric)(values) for metric in ALL_NINE]
    return {style: np.mean([lead[style] for lead in leads], axis=0) for style in others}


def _vgid_rises_less(values: Evidence) -> Comparisons:
    icu, vgid = (values(6, f"{k}_reverse", FORGET) - values(6, k, FORGET) for k in ("icu", "vgid"))
    return {"": icu - vgid}


def _ascent_loses_retain(values: Evidence) -> Comparisons:
    """Mean further retain loss over those of GA, GA_Diff and KL_Min that forget in the seed."""
    left, kept = (
        np.stack([values(3, method, metric) for method in ASCENDING]) for metric in (FORGET, RETAIN)
    )
    kept[~(left <= (1 - FORGETS) * values(3, "base", FORGET))] = math.nan
    forget = (~np.isnan(kept)).sum(axis=0)
    mean = np.nansum(kept, axis=0) / np.where(forget, forget, math.nan)
    return {"": values(3, "vgid", RETAIN) - mean}


_COMPARE: dict[str, Comparing] = {
    "a": _icu_leaves_most,
    "b": _leads(2, "dual", ("icu_strict", "visual"), FORGET),
    "c1": _vgid_leads(3, BASELINES, FORGET),
    "c2": _vgid_leads(3, BASELINES, RETAIN),
    "d": _vgid_leads(3, SINGLE_TEACHERS, FORGET),
    "e": _forgetting_grows_with_sigma,
    "f": _leads(4, "random", OTHER_NOISES, FORGET),
    "g1": _styles_differ,
    "g2": _strict_is_most_stable,
    "h": _vgid_rises_less,
    "i": lambda values: {"": values(3, "base", TEST) - values(3, "vgid", TEST)},
    "j1": _vgid_leads(8, OTHER_METHODS, FORGET),
    "j2": _vgid_leads(9, OTHER_METHODS, FORGET),
    "k": _ascent_loses_retain,
}
_TEXTS = files("vgid.paper").joinpath("claims.yaml").read_text(encoding="utf-8")
CLAIMS = tuple(
    Claim(**told, compare=_COMPARE[told["id"]])
    for told in yaml.safe_load(_TEXTS.format(most=MOST, forgets=FORGETS))
)
"""Claims (a) to (k); (l), that all of it holds on both architectures, is ``on_all``."""


def on_all(judgements: Sequence[Judgement]) -> Verdict:
    """Claim (l): held if every claim held on every backbone, not held if a comparison failed.

    Upper bounds are corrected for the comparisons of all claims and backbones together, so that a
    claim may be not held where this one is undecided.
    """
    if all(judgement.verdict == "held" for judgement in judgements):
        return "held"
    each = [judgement for judgement in judgements if judgement.claim.about == "each"]
    total = sum(len(judgement.by_seed) for judgement in each)
    bounds = [i.high for judgement in each for i in judgement.corrected_for(total).values()]
    return "not held" if any(high < 0 for high in bounds) else "undecided"


def judge_all(filled: Sequence[FilledTable]) -> list[Judgement]:
    """Evaluate every claim on the tables of every backbone, and of the paper's closest one."""
    evidence = {}
    for backbone in dict.fromkeys(table.backbone for table in filled):
        ours = {t.table.number: t for t in filled if t.backbone == backbone}
        evidence[backbone] = our_evidence(ours), paper_evidence(closest_backbone(backbone, 3))
    return [judge(claim, name, *both) for claim in CLAIMS for name, both in evidence.items()]


def claims_markdown(judgements: Sequence[Judgement], embedded: Sequence[str]) -> str:
    """The content of ``claims.md``; ``embedded`` are those of the backbones that ship with us."""
    seeds = max((len(column) for j in judgements for column in j.by_seed.values()), default=0)
    return rendered(
        "vgid.paper",
        "claims.md.jinja",
        seeds=count_seeds(seeds),
        claims=CLAIMS,
        judgements=judgements,
        on_all=on_all,
        label=_label,
        embedded=embedded,
    )
