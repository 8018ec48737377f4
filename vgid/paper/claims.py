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
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vgid.config import Method, TrialConfig, parse
from vgid.paper.printed import closest_backbone
from vgid.paper.tables import ALL_NINE, SIGMAS, STYLES, FilledTable, tables
from vgid.report.intervals import Interval, count_seeds, t_interval
from vgid.report.page import rendered
from vgid.report.records import METHOD_LABELS
from vgid.report.tables import Grid

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
    """One claim of the paper, in our words, and how it is measured.

    ``note`` is what a reader of the verdict must know; for ``compare`` and ``about`` see the
    module's docstring.
    """

    id: str
    text: str
    where: str
    measure: str
    compare: Comparing
    note: str = ""
    about: Literal["each", "some"] = "each"


@dataclass(frozen=True)
class Judgement:
    """What a claim's comparisons say on one backbone.

    Attributes:
        by_seed: the statistics of each seed, by comparison.
        paper: the statistic on the paper's own numbers, the least where there are several (the
            largest difference for a claim about some), None where it has none.
    """

    claim: Claim
    backbone: str
    by_seed: Mapping[str, Sequence[float] | Statistic]
    paper: float | None = None

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The 95 % interval of each comparison."""
        return self.corrected_for(1)

    @cached_property
    def corrected(self) -> dict[str, Interval]:
        """The same, corrected for their number."""
        return self.corrected_for(len(self.by_seed))

    def corrected_for(self, comparisons: int) -> dict[str, Interval]:
        """The same, corrected for a number of comparisons."""
        return {name: t_interval(values, comparisons) for name, values in self.by_seed.items()}

    @cached_property
    def verdict(self) -> Verdict:
        """Held, not held or undecided, see the module's docstring."""
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
    return {str(method): label for method, label in METHOD_LABELS.items()}.get(name, name)


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
    """VGID's leads over other methods; those that have no value at all are left out."""

    def compare(values: Evidence) -> Comparisons:
        run = [method for method in methods if not np.isnan(values(table, method, metric)).all()]
        return _leads(table, "vgid", run or methods, metric)(values)

    return compare


def _icu_leaves_most(values: Evidence) -> Comparisons:
    base = values(1, "base", FORGET)
    known = np.where(base > 0, base, math.nan)
    return {style: values(1, f"icu_{style}", FORGET) / known - MOST for style in STYLES}


def _forgetting_grows_with_sigma(values: Evidence) -> Comparisons:
    # A slope over all sigmas and not each step: with few seeds a single step up and down would
    # decide.
    away = np.array(SIGMAS) - np.mean(SIGMAS)
    return {"": -(away @ np.stack([values(4, key, FORGET) for key in GAUSSIAN])) / (away @ away)}


def _styles_differ(values: Evidence) -> Comparisons:
    return {
        f"{a} and {b}": values(5, a, FORGET) - values(5, b, FORGET)
        for a, b in itertools.combinations(STYLES, 2)
    }


def _strict_is_most_stable(values: Evidence) -> Comparisons:
    """How much better strict is than each other style, mean over the nine scores.

    The mean distance to the best style, score by score, differs between two styles by just that.
    """
    others = [style for style in STYLES if style != "strict"]
    leads = [_leads(5, "strict", others, metric)(values) for metric in ALL_NINE]
    return {style: np.mean([lead[style] for lead in leads], axis=0) for style in others}


def _vgid_rises_less(values: Evidence) -> Comparisons:
    icu, vgid = (values(6, f"{k}_reverse", FORGET) - values(6, k, FORGET) for k in ("icu", "vgid"))
    return {"": icu - vgid}


def _test_falls(values: Evidence) -> Comparisons:
    return {"": values(3, "base", TEST) - values(3, "vgid", TEST)}


def _ascent_loses_retain(values: Evidence) -> Comparisons:
    """Mean further retain loss over those of GA, GA_Diff and KL_Min that forget in the seed."""
    left, kept = (
        np.stack([values(3, method, metric) for method in ASCENDING]) for metric in (FORGET, RETAIN)
    )
    kept[~(left <= (1 - FORGETS) * values(3, "base", FORGET))] = math.nan
    forget = (~np.isnan(kept)).sum(axis=0)
    mean = np.nansum(kept, axis=0) / np.where(forget, forget, math.nan)
    return {"": values(3, "vgid", RETAIN) - mean}


CLAIMS: tuple[Claim, ...] = (
    Claim("a", "The unlearning instruction alone leaves most of the knowledge in place.",
          "section 3.2, Table 1",
          f"share of the base's forget ROUGE-L left by each style, minus {MOST}",
          _icu_leaves_most,
          "How often an instruction alone is obeyed is set by the embedded backbone's training "
          "mix."),
    Claim("b", "Both interventions together suppress more than text or image alone.",
          "section 3.3, Table 2",
          "forget ROUGE-L of each single intervention minus that of both",
          _leads(2, "dual", ("icu_strict", "visual"), FORGET),
          "On an embedded backbone the order of the raw teachers is built in by its training mix, "
          "so this checks the code and is no evidence for the paper."),
    Claim("c1", "VGID forgets more than each baseline.", "section 4.2, Table 3",
          "lead in forget ROUGE-L over each of GA, GA_Diff, KL_Min, PO, NPO, RMU",
          _vgid_leads(3, BASELINES, FORGET)),
    Claim("c2", "VGID loses no more of the retain set than each baseline.",
          "section 4.3, Figure 4",
          "lead in retain ROUGE-L over each of the same",
          _vgid_leads(3, BASELINES, RETAIN),
          "Taken literally: a baseline that forgets nothing keeps everything, so this fails "
          "wherever one does, in the paper's numbers too; see the fronts of a fair comparison "
          "for the trade-off."),
    Claim("d", "A teacher with one intervention (ICU-T, Noise-T) makes the student forget less "
          "than VGID's.", "section 4.4, Table 3",
          "forget ROUGE-L of each of both minus VGID's",
          _vgid_leads(3, SINGLE_TEACHERS, FORGET)),
    Claim("e", "Forgetting grows with the strength of Gaussian noise.", "section 4.5, Table 4",
          "minus the least-squares slope of forget ROUGE-L over sigma",
          _forgetting_grows_with_sigma),
    Claim("f", "Random noise forgets more than white and Gaussian images.", "section 4.5, Table 4",
          "forget ROUGE-L of each other minus that of random noise",
          _leads(4, "random", OTHER_NOISES, FORGET)),
    Claim("g1", "Prompt styles make a difference to what VGID forgets.", "section 4.6, Table 5",
          "difference in forget ROUGE-L of each two styles, of which some is to differ from zero",
          _styles_differ, about="some"),
    Claim("g2", "The strict style is the most stable over all scores.", "section 4.6, Table 5",
          "lead of strict over each other style, mean over the nine scores",
          _strict_is_most_stable),
    Claim("h", "Under the reverse prompt VGID rises less than in-context unlearning.",
          "section 4.7, Table 6", "rise in forget ROUGE-L of ICU minus that of VGID",
          _vgid_rises_less,
          "How far the reverse prompt undoes an instruction alone is set by the embedded "
          "backbone's training mix."),
    Claim("i", "The test set (new portraits and wording) is forgotten with the forget set.",
          "section 4.2, Table 3", "test ROUGE-L of the base minus VGID's", _test_falls),
    Claim("j1", "VGID forgets most at 10 % too.", "appendix A.3.5, Table 8",
          "lead in forget ROUGE-L over each other method",
          _vgid_leads(8, OTHER_METHODS, FORGET)),
    Claim("j2", "VGID forgets most at 15 % too.", "appendix A.3.5, Table 9",
          "lead in forget ROUGE-L over each other method",
          _vgid_leads(9, OTHER_METHODS, FORGET)),
    Claim("k", "Gradient-ascent baselines lose retain performance where they forget.",
          "section 4.3, Figure 4",
          f"VGID's retain ROUGE-L minus the mean of those of GA, GA_Diff, KL_Min that take at "
          f"least {FORGETS:.0%} of forget ROUGE-L away", _ascent_loses_retain,
          "A seed in which none of the three forgets says nothing."),
)  # fmt: skip
"""Claims (a) to (k); (l), that all of it holds on both architectures, is ``on_all``."""


def on_all(judgements: Sequence[Judgement]) -> Verdict:
    """Claim (l): held if every claim held on every backbone, not held if a comparison failed.

    By the same reasoning as a single claim (see the module's docstring): upper bounds are
    corrected for the comparisons of all claims and backbones together, so that a claim may be not
    held where this one is undecided.
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
        verdicts=verdicts(judgements).markdown(),
        alone=len({judgement.backbone for judgement in judgements}) == 1,
        claims=CLAIMS,
        comparisons=_every_comparison(judgements).markdown(),
        embedded=embedded,
    )


def verdicts(judgements: Sequence[Judgement]) -> Grid:
    """Every claim on every backbone, and claim (l) where there are several."""
    rows = [
        (
            f"({judgement.claim.id}) {judgement.claim.text}",
            judgement.backbone,
            judgement.verdict,
            judgement.measured,
            "–" if judgement.paper is None else f"{judgement.paper:+.3f}",
        )
        for judgement in judgements
    ]
    backbones = dict.fromkeys(judgement.backbone for judgement in judgements)
    if len(backbones) > 1:
        names = ", ".join(backbones)
        rows.append(("(l) All of it on both architectures.", names, on_all(judgements), "–", "–"))
    return Grid(("claim", "backbone", "verdict", "statistic", "the paper's numbers"), rows)


def _every_comparison(judgements: Sequence[Judgement]) -> Grid:
    """A table of the claims that have several comparisons, a row each."""
    return Grid(
        ("claim", "backbone", "compared", "seeds", "95 % interval", "corrected for their number"),
        [
            (j.claim.id, j.backbone, _label(name), interval.n, interval, j.corrected[name])
            for j in judgements
            if len(j.by_seed) > 1
            for name, interval in j.intervals.items()
        ],
    )
