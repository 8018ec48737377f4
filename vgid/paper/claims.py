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
from typing import Literal, Protocol

from vgid.paper.printed import paper_row
from vgid.paper.tables import (
    ALL_NINE,
    SIGMAS,
    STYLES,
    FilledTable,
    Table,
)
from vgid.report.intervals import Interval, count_seeds, t_interval
from vgid.report.records import METHOD_LABELS
from vgid.report.tables import Grid

Verdict = Literal["held", "not held", "undecided"]
Statistic = list[float | None]
"""One number a seed, positive where the claim holds; None where the seed cannot tell."""
Comparisons = dict[str, Statistic]
"""A claim's statistics by what is compared with (a row's key); "" for a claim that has one."""

BASELINES = ("ga", "ga_diff", "kl_min", "po_dpo", "po_idk", "npo", "rmu")
ASCENDING = ("ga", "ga_diff", "kl_min")
SINGLE_TEACHERS = ("icu_t", "noise_t")
OTHER_METHODS = (*BASELINES, *SINGLE_TEACHERS)
GAUSSIAN = tuple(f"gaussian_{sigma}" for sigma in SIGMAS)
OTHER_NOISES = ("white", *GAUSSIAN)
MOST = 0.5
"""A model "leaves most knowledge" if more than this share of the base's ROUGE-L is left."""
FORGETS = 0.1
"""A method "forgets" if it takes at least this share of the base's forget ROUGE-L away."""


class Evidence(Protocol):
    """Where values come from: our tables, or the paper's."""

    def values(self, table: int, key: str, metric: str) -> list[float | None]:
        """One value a seed of a cell; Nones if there is no such table or row."""


@dataclass(frozen=True)
class OurEvidence:
    """The filled tables of one backbone, by number."""

    tables: Mapping[int, FilledTable]

    def values(self, table: int, key: str, metric: str) -> list[float | None]:
        """One value a seed of a cell."""
        if table not in self.tables:
            return [None] * max((len(t.seeds) for t in self.tables.values()), default=0)
        return self.tables[table].values(key, metric)


@dataclass(frozen=True)
class PaperEvidence:
    """The paper's own tables for one of its backbones; rows are found by our keys."""

    tables: Mapping[int, Table]
    backbone: str

    def values(self, table: int, key: str, metric: str) -> list[float | None]:
        """The one number of a cell."""
        for row in self.tables[table].rows if table in self.tables else ():
            if row.key == key:
                found = paper_row(table, self.backbone, row.paper, row.setting)
                return [None if found is None else found.scores.get(metric)]
        return [None]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        id: its letter here, with a number where a claim has parts.
        text: in our words.
        where: in the paper.
        measure: what the statistic is.
        compare: gives the comparisons, see the module's docstring.
        note: what a reader of the verdict must know.
        about: what the claim says of its comparisons, see the module's docstring.
    """

    id: str
    text: str
    where: str
    measure: str
    compare: Callable[[Evidence], Comparisons]
    note: str = ""
    about: Literal["each", "some"] = "each"


@dataclass(frozen=True)
class Judgement:
    """What a claim's comparisons say on one backbone.

    Attributes:
        claim: which.
        backbone: whose tables.
        by_seed: the statistics of each seed, by comparison.
        paper: the statistic on the paper's own numbers, the least where there are several (the
            largest difference for a claim about some), None where it has none.
    """

    claim: Claim
    backbone: str
    by_seed: Mapping[str, Sequence[float | None]]
    paper: float | None = None

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The 95 % interval of each comparison."""
        return {name: t_interval(values) for name, values in self.by_seed.items()}

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
        if self.claim.about == "some":
            return max(self.corrected, key=lambda name: _distance(self.corrected[name]))
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
        if len(self.by_seed) == 1 and not name:
            return str(interval)
        return f"{interval} ({_label(name)}, of {len(self.by_seed)})"


def _bound(value: float) -> float:
    """A bound to sort by: none at all comes before every other."""
    return -math.inf if math.isnan(value) else value


def _distance(interval: Interval) -> float:
    """How far an interval is from zero, negative where it holds zero."""
    return max(_bound(interval.low), _bound(-interval.high))


def _label(name: str) -> str:
    """What a comparison is called: methods as in the tables, other rows by their key."""
    return next((label for method, label in METHOD_LABELS.items() if method == name), name)


def judge(claim: Claim, backbone: str, evidence: Evidence, paper: Evidence) -> Judgement:
    """Evaluate one claim on one backbone's tables, and on the paper's."""
    printed = [value for (value,) in claim.compare(paper).values() if value is not None]
    if claim.about == "some":
        least = max(map(abs, printed), default=None)
    else:
        least = min(printed, default=None)
    return Judgement(claim, backbone, claim.compare(evidence), least)


def _each(function: Callable[..., float | None], *columns: Sequence[float | None]) -> Statistic:
    """Apply a function seed by seed; a seed in which any value is missing cannot tell."""
    found: Statistic = []
    for values in zip(*columns, strict=True):
        known = [value for value in values if value is not None]
        found.append(function(*known) if len(known) == len(values) else None)
    return found


def _icu_leaves_most(evidence: Evidence) -> Comparisons:
    base = evidence.values(1, "base", "forget_rougeL")
    return {
        style: _each(
            lambda known, left: left / known - MOST if known > 0 else None,
            base,
            evidence.values(1, f"icu_{style}", "forget_rougeL"),
        )
        for style in STYLES
    }


def _leads(
    evidence: Evidence, table: int, own: str, others: Sequence[str], metric: str
) -> Comparisons:
    """By how much a row is better than each other: more is better on the retain set, else less."""
    sign = 1.0 if metric.startswith("retain") else -1.0
    mine = evidence.values(table, own, metric)
    return {
        other: _each(lambda a, b: sign * (a - b), mine, evidence.values(table, other, metric))
        for other in others
    }


def _vgid_leads(evidence: Evidence, table: int, methods: Sequence[str], metric: str) -> Comparisons:
    """VGID's leads over other methods; those that have no value at all are left out."""
    values = {method: evidence.values(table, method, metric) for method in methods}
    run = [method for method in methods if any(value is not None for value in values[method])]
    return _leads(evidence, table, "vgid", run or methods, metric)


def _forgetting_grows_with_sigma(evidence: Evidence) -> Comparisons:
    columns = [evidence.values(4, key, "forget_rougeL") for key in GAUSSIAN]
    # A slope over all sigmas and not each step: with few seeds a single step up and down would
    # decide.
    centre = sum(SIGMAS) / len(SIGMAS)
    spread = sum((sigma - centre) ** 2 for sigma in SIGMAS)

    def minus_slope(*left: float) -> float:
        products = ((s - centre) * value for s, value in zip(SIGMAS, left, strict=True))
        return -math.fsum(products) / spread

    return {"": _each(minus_slope, *columns)}


def _styles_differ(evidence: Evidence) -> Comparisons:
    columns = {style: evidence.values(5, style, "forget_rougeL") for style in STYLES}
    return {
        f"{a} and {b}": _each(lambda x, y: x - y, columns[a], columns[b])
        for a, b in itertools.combinations(STYLES, 2)
    }


def _strict_is_most_stable(evidence: Evidence) -> Comparisons:
    """How much better strict is than each other style, mean over the nine scores.

    The mean distance to the best style, score by score, differs between two styles by just that.
    """
    others = [style for style in STYLES if style != "strict"]
    leads = [_leads(evidence, 5, "strict", others, metric) for metric in ALL_NINE]
    return {
        style: _each(
            lambda *of_score: math.fsum(of_score) / len(ALL_NINE), *(lead[style] for lead in leads)
        )
        for style in others
    }


def _vgid_rises_less(evidence: Evidence) -> Comparisons:
    keys = ("icu", "icu_reverse", "vgid", "vgid_reverse")
    columns = [evidence.values(6, key, "forget_rougeL") for key in keys]
    return {"": _each(lambda icu, icu_r, vgid, vgid_r: (icu_r - icu) - (vgid_r - vgid), *columns)}


def _test_falls(evidence: Evidence) -> Comparisons:
    columns = [evidence.values(3, key, "test_rougeL") for key in ("base", "vgid")]
    return {"": _each(lambda base, vgid: base - vgid, *columns)}


def _ascent_loses_retain(evidence: Evidence) -> Comparisons:
    """Mean further retain loss over those of GA, GA_Diff and KL_Min that forget in the seed."""
    base, kept = (evidence.values(3, "base", f"{s}_rougeL") for s in ("forget", "retain"))
    own = evidence.values(3, "vgid", "retain_rougeL")
    found: Statistic = []
    for seed, (forget, retain, vgid) in enumerate(zip(base, kept, own, strict=True)):
        losses = []
        for method in ASCENDING:
            left = evidence.values(3, method, "forget_rougeL")[seed]
            after = evidence.values(3, method, "retain_rougeL")[seed]
            if forget is None or left is None or after is None:
                continue
            if left <= (1 - FORGETS) * forget:
                losses.append(after)
        known = retain is not None and vgid is not None and losses
        found.append((vgid or 0.0) - sum(losses) / len(losses) if known else None)
    return {"": found}


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
          lambda tables: _leads(tables, 2, "dual", ("icu_strict", "visual"), "forget_rougeL"),
          "On an embedded backbone the order of the raw teachers is built in by its training mix, "
          "so this checks the code and is no evidence for the paper."),
    Claim("c1", "VGID forgets more than each baseline.", "section 4.2, Table 3",
          "lead in forget ROUGE-L over each of GA, GA_Diff, KL_Min, PO, NPO, RMU",
          lambda tables: _vgid_leads(tables, 3, BASELINES, "forget_rougeL")),
    Claim("c2", "VGID loses no more of the retain set than each baseline.",
          "section 4.3, Figure 4",
          "lead in retain ROUGE-L over each of the same",
          lambda tables: _vgid_leads(tables, 3, BASELINES, "retain_rougeL"),
          "Taken literally: a baseline that forgets nothing keeps everything, so this fails "
          "wherever one does, in the paper's numbers too; see the fronts of a fair comparison "
          "for the trade-off."),
    Claim("d", "A teacher with one intervention (ICU-T, Noise-T) makes the student forget less "
          "than VGID's.", "section 4.4, Table 3",
          "forget ROUGE-L of each of both minus VGID's",
          lambda tables: _vgid_leads(tables, 3, SINGLE_TEACHERS, "forget_rougeL")),
    Claim("e", "Forgetting grows with the strength of Gaussian noise.", "section 4.5, Table 4",
          "minus the least-squares slope of forget ROUGE-L over sigma",
          _forgetting_grows_with_sigma),
    Claim("f", "Random noise forgets more than white and Gaussian images.", "section 4.5, Table 4",
          "forget ROUGE-L of each other minus that of random noise",
          lambda tables: _leads(tables, 4, "random", OTHER_NOISES, "forget_rougeL")),
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
          lambda tables: _vgid_leads(tables, 8, OTHER_METHODS, "forget_rougeL")),
    Claim("j2", "VGID forgets most at 15 % too.", "appendix A.3.5, Table 9",
          "lead in forget ROUGE-L over each other method",
          lambda tables: _vgid_leads(tables, 9, OTHER_METHODS, "forget_rougeL")),
    Claim("k", "Gradient-ascent baselines lose retain performance where they forget.",
          "section 4.3, Figure 4",
          f"VGID's retain ROUGE-L minus the mean of those of GA, GA_Diff, KL_Min that take at "
          f"least {FORGETS:.0%} of forget ROUGE-L away", _ascent_loses_retain,
          "A seed in which none of the three forgets says nothing."),
)  # fmt: skip
"""Claims (a) to (k); (l), that all of it holds on both architectures, is ``on_all``."""


ON_ALL = "All of it on both architectures."
"""Claim (l), judged by ``on_all``."""


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


def judge_all(
    filled: Sequence[FilledTable], tables: Mapping[int, Table], paper_backbones: Mapping[str, str]
) -> list[Judgement]:
    """Evaluate every claim on every backbone.

    Args:
        filled: tables of one or several backbones.
        tables: the tables by number, for finding the paper's rows.
        paper_backbones: which of the paper's backbones each of ours is held against.
    """
    backbones = list(dict.fromkeys(table.backbone for table in filled))
    found = []
    for claim in CLAIMS:
        for backbone in backbones:
            ours = {t.table.number: t for t in filled if t.backbone == backbone}
            printed = PaperEvidence(tables, paper_backbones[backbone])
            found.append(judge(claim, backbone, OurEvidence(ours), printed))
    return found


def claims_markdown(judgements: Sequence[Judgement], embedded: Sequence[str]) -> str:
    """The content of ``claims.md``.

    Args:
        judgements: of all claims and backbones.
        embedded: those of the backbones that are embedded ones.
    """
    columns = (column for j in judgements for column in j.by_seed.values())
    seeds = max(map(len, columns), default=0)
    lines = [
        "# The paper's claims",
        "",
        f"A claim's statistic is positive where it holds. Mean over {count_seeds(seeds)} with its "
        "95 % t interval, paired within seeds. A claim with several comparisons (in brackets the "
        "one that decides, and how many there are) is held if the interval of each lies above "
        "zero, which needs no correction for their number; not held if the upper bound of any, "
        "corrected for their number (Bonferroni), lies below; undecided otherwise and for a single "
        "seed. Where differences are normal over seeds, at most 5 % of a claim's verdicts are "
        "wrong by chance, exact ties included; claims stand each for itself, except in (l). The "
        "last column is the same statistic on the paper's own numbers, the least of several, one "
        "run without an interval. Seeds vary the questions, the retain and few-shot people and "
        "the training, not who is forgotten.",
        "",
        verdicts(judgements).markdown(),
    ]
    if len({judgement.backbone for judgement in judgements}) == 1:
        lines += ["", "(l), all of it on both architectures, needs tables of two backbones."]
    lines += ["", "## What is measured", ""]
    for claim in CLAIMS:
        note = f" {claim.note}" if claim.note else ""
        lines.append(f"- ({claim.id}) {claim.where}. Statistic: {claim.measure}.{note}")
    lines += ["", "## Every comparison", "", _every_comparison(judgements).markdown()]
    if embedded:
        lines += [
            "",
            f"Of {', '.join(embedded)}: the order of the raw teachers (claim b, and how much an "
            "instruction alone does, claim a) is built into the embedded backbone by its training "
            "mix. What distillation makes of these teachers (c to k) is not.",
        ]
    return "\n".join(lines) + "\n"


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
        rows.append((f"(l) {ON_ALL}", ", ".join(backbones), on_all(judgements), "–", "–"))
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
