"""The paper's qualitative claims as statements over the tables, each with its verdict.

A claim is a function from per-seed values to one statistic a seed, positive where the claim holds
in that seed. Its 95 % t interval over the seeds decides: held if it lies above zero, not held if
below, undecided otherwise (and always for a single seed). The same functions read the paper's own
numbers, which are one "seed" without an interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vgid.config import ForgetRatio
from vgid.evidence import Evidence, OurEvidence, PaperEvidence
from vgid.intervals import Interval, count_seeds, t_interval
from vgid.tables import ALL_NINE, COMPARISONS, SIGMAS, STYLES, FilledTable, Table

Verdict = Literal["held", "not held", "undecided"]
Statistic = list[float | None]
"""One number a seed, positive where the claim holds; None where the seed cannot tell."""

BASELINES = ("ga", "ga_diff", "kl_min", "po_dpo", "po_idk", "npo", "rmu")
ASCENDING = ("ga", "ga_diff", "kl_min")
MOST = 0.5
"""A model "leaves most knowledge" if more than this share of the base's ROUGE-L is left."""
FORGETS = 0.1
"""A method "forgets" if it takes at least this share of the base's forget ROUGE-L away."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        id: its letter here, with a number where a claim has parts.
        text: in our words.
        where: in the paper.
        measure: what the statistic is.
        statistic: see the module's docstring.
        note: what a reader of the verdict must know.
    """

    id: str
    text: str
    where: str
    measure: str
    statistic: Callable[[Evidence], Statistic]
    note: str = ""


@dataclass(frozen=True)
class Judgement:
    """What a claim's statistic says on one backbone.

    Attributes:
        claim: which.
        backbone: whose tables.
        by_seed: the statistic of each seed.
        interval: over the seeds.
        paper: the statistic on the paper's own numbers, None where it has none.
    """

    claim: Claim
    backbone: str
    by_seed: tuple[float | None, ...]
    interval: Interval
    paper: float | None = None

    @property
    def verdict(self) -> Verdict:
        """By the sign of the interval."""
        return verdict(self.interval)

    @property
    def measured(self) -> str:
        """The interval for people to read; a claim whose tables were not run says so."""
        return str(self.interval) if self.interval.n else "not measured"


def verdict(interval: Interval) -> Verdict:
    """Held, not held or undecided, by the sign of an interval."""
    if interval.n > 1 and interval.low > 0:
        return "held"
    if interval.n > 1 and interval.high < 0:
        return "not held"
    return "undecided"


def judge(claim: Claim, backbone: str, evidence: Evidence, paper: Evidence) -> Judgement:
    """Evaluate one claim on one backbone's tables, and on the paper's."""
    by_seed = claim.statistic(evidence)
    (printed,) = claim.statistic(paper)
    return Judgement(claim, backbone, tuple(by_seed), t_interval(by_seed), printed)


def _each(function: Callable[..., float | None], *columns: Sequence[float | None]) -> Statistic:
    """Apply a function seed by seed; a seed in which any value is missing cannot tell."""
    found: Statistic = []
    for values in zip(*columns, strict=True):
        known = [value for value in values if value is not None]
        found.append(function(*known) if len(known) == len(values) else None)
    return found


def _icu_leaves_most(evidence: Evidence) -> Statistic:
    columns = [
        evidence.values(1, key, "forget_rougeL")
        for key in ("base", *(f"icu_{style}" for style in STYLES))
    ]
    return _each(lambda base, *icu: min(icu) / base - MOST if base > 0 else None, *columns)


def _dual_beats_each(evidence: Evidence) -> Statistic:
    keys = ("dual", "icu_strict", "visual")
    columns = [evidence.values(2, key, "forget_rougeL") for key in keys]
    return _each(lambda dual, text, visual: min(text, visual) - dual, *columns)


def _least_lead(
    evidence: Evidence, table: int, others: Sequence[str], metric: str, sign: float
) -> Statistic:
    """The smallest lead of VGID over others in a metric, in which ``sign`` is the good direction.

    Methods without a row are left out; a row whose training failed in a seed has no lead there.
    """
    vgid = evidence.values(table, "vgid", metric)
    columns = [evidence.values(table, key, metric) for key in others]
    columns = [column for column in columns if any(value is not None for value in column)]
    if not columns:
        return [None] * len(vgid)
    return _each(lambda own, *rest: min(sign * (own - other) for other in rest), vgid, *columns)


def _forgets_more_than_baselines(evidence: Evidence) -> Statistic:
    return _least_lead(evidence, 3, BASELINES, "forget_rougeL", -1.0)


def _retains_as_baselines(evidence: Evidence) -> Statistic:
    return _least_lead(evidence, 3, BASELINES, "retain_rougeL", 1.0)


def _single_teachers_forget_less(evidence: Evidence) -> Statistic:
    return _least_lead(evidence, 3, ("icu_t", "noise_t"), "forget_rougeL", -1.0)


def _forgetting_grows_with_sigma(evidence: Evidence) -> Statistic:
    columns = [evidence.values(4, f"gaussian_{sigma}", "forget_rougeL") for sigma in SIGMAS]
    centre = sum(SIGMAS) / len(SIGMAS)
    spread = sum((sigma - centre) ** 2 for sigma in SIGMAS)

    def minus_slope(*left: float) -> float:
        products = ((s - centre) * value for s, value in zip(SIGMAS, left, strict=True))
        return -math.fsum(products) / spread

    return _each(minus_slope, *columns)


def _random_forgets_most(evidence: Evidence) -> Statistic:
    keys = ("random", "white", *(f"gaussian_{sigma}" for sigma in SIGMAS))
    columns = [evidence.values(4, key, "forget_rougeL") for key in keys]
    return _each(lambda random, *others: min(others) - random, *columns)


def _styles_differ(evidence: Evidence) -> Statistic:
    """Range between the styles that the OTHER seeds find worst and best.

    The plain range is never negative, and so no evidence; this one is 0 on average where styles
    do not differ.
    """
    columns = {style: evidence.values(5, style, "forget_rougeL") for style in STYLES}
    seeds = len(columns["strict"])
    found: Statistic = []
    for seed in range(seeds):
        means = {
            style: t_interval([v for i, v in enumerate(values) if i != seed]).mean
            for style, values in columns.items()
        }
        if any(math.isnan(mean) for mean in means.values()):
            found.append(None)
            continue
        worst = max(STYLES, key=lambda style: means[style])
        best = min(STYLES, key=lambda style: means[style])
        found += _each(lambda high, low: high - low, [columns[worst][seed]], [columns[best][seed]])
    return found


def _strict_is_most_stable(evidence: Evidence) -> Statistic:
    """How much less strict falls behind the best style, mean over the nine scores, than others."""
    count = len(evidence.values(5, "strict", ALL_NINE[0]))
    regrets: dict[str, Statistic] = {style: [0.0] * count for style in STYLES}
    for metric in ALL_NINE:
        sign = 1.0 if metric.startswith("retain") else -1.0
        columns = {style: evidence.values(5, style, metric) for style in STYLES}
        best = _each(lambda *values: max(sign * v for v in values), *columns.values())  # noqa: B023
        for style, values in columns.items():
            regrets[style] = _each(
                lambda so_far, top, own: so_far + (top - sign * own) / len(ALL_NINE),  # noqa: B023
                regrets[style],
                best,
                values,
            )
    return _each(
        lambda declarative, polite, strict: min(declarative, polite) - strict, *regrets.values()
    )


def _vgid_rises_less(evidence: Evidence) -> Statistic:
    keys = ("icu", "icu_reverse", "vgid", "vgid_reverse")
    columns = [evidence.values(6, key, "forget_rougeL") for key in keys]
    return _each(lambda icu, icu_r, vgid, vgid_r: (icu_r - icu) - (vgid_r - vgid), *columns)


def _test_falls(evidence: Evidence) -> Statistic:
    columns = [evidence.values(3, key, "test_rougeL") for key in ("base", "vgid")]
    return _each(lambda base, vgid: base - vgid, *columns)


def _order_at(ratio: ForgetRatio) -> Callable[[Evidence], Statistic]:
    def statistic(evidence: Evidence) -> Statistic:
        others = (*BASELINES, "icu_t", "noise_t")
        return _least_lead(evidence, COMPARISONS[ratio], others, "forget_rougeL", -1.0)

    return statistic


def _ascent_loses_retain(evidence: Evidence) -> Statistic:
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
    return found


CLAIMS: tuple[Claim, ...] = (
    Claim("a", "The unlearning instruction alone leaves most of the knowledge in place.",
          "section 3.2, Table 1",
          f"least share of the base's forget ROUGE-L left by any style, minus {MOST}",
          _icu_leaves_most,
          "How often an instruction alone is obeyed is set by the embedded backbone's training "
          "mix."),
    Claim("b", "Both interventions together suppress more than text or image alone.",
          "section 3.3, Table 2",
          "forget ROUGE-L of the better single intervention minus that of both",
          _dual_beats_each,
          "On an embedded backbone the order of the raw teachers is built in by its training mix, "
          "so this checks the code and is no evidence for the paper."),
    Claim("c1", "VGID forgets more than each baseline.", "section 4.2, Table 3",
          "least lead in forget ROUGE-L over GA, GA_Diff, KL_Min, PO, NPO, RMU",
          _forgets_more_than_baselines),
    Claim("c2", "VGID loses no more of the retain set than each baseline.",
          "section 4.3, Figure 4",
          "least lead in retain ROUGE-L over the same",
          _retains_as_baselines,
          "Taken literally: a baseline that forgets nothing keeps everything, so this fails "
          "wherever one does, in the paper's numbers too; see the fronts of a fair comparison "
          "for the trade-off."),
    Claim("d", "A teacher with one intervention (ICU-T, Noise-T) makes the student forget less "
          "than VGID's.", "section 4.4, Table 3",
          "forget ROUGE-L of the better of both minus VGID's",
          _single_teachers_forget_less),
    Claim("e", "Forgetting grows with the strength of Gaussian noise.", "section 4.5, Table 4",
          "minus the least-squares slope of forget ROUGE-L over sigma",
          _forgetting_grows_with_sigma),
    Claim("f", "Random noise forgets more than white and Gaussian images.", "section 4.5, Table 4",
          "least forget ROUGE-L of the others minus that of random noise",
          _random_forgets_most),
    Claim("g1", "Prompt styles make a difference to what VGID forgets.", "section 4.6, Table 5",
          "forget ROUGE-L between the styles that the other seeds find worst and best",
          _styles_differ),
    Claim("g2", "The strict style is the most stable over all scores.", "section 4.6, Table 5",
          "mean distance to the best style over the nine scores: least of the others minus strict",
          _strict_is_most_stable),
    Claim("h", "Under the reverse prompt VGID rises less than in-context unlearning.",
          "section 4.7, Table 6", "rise in forget ROUGE-L of ICU minus that of VGID",
          _vgid_rises_less,
          "How far the reverse prompt undoes an instruction alone is set by the embedded "
          "backbone's training mix."),
    Claim("i", "The test set (new portraits and wording) is forgotten with the forget set.",
          "section 4.2, Table 3", "test ROUGE-L of the base minus VGID's", _test_falls),
    Claim("j1", "VGID forgets most at 10 % too.", "appendix A.3.5, Table 8",
          "least lead in forget ROUGE-L over every other method", _order_at(10)),
    Claim("j2", "VGID forgets most at 15 % too.", "appendix A.3.5, Table 9",
          "least lead in forget ROUGE-L over every other method", _order_at(15)),
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
    """Claim (l): held if every claim held on every backbone, not held if one failed anywhere."""
    verdicts = {judgement.verdict for judgement in judgements}
    if "not held" in verdicts:
        return "not held"
    return "held" if verdicts == {"held"} else "undecided"


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
    backbones = list(dict.fromkeys(judgement.backbone for judgement in judgements))
    seeds = max((len(judgement.by_seed) for judgement in judgements), default=0)
    lines = [
        "# The paper's claims",
        "",
        f"A claim's statistic is positive where it holds. Mean over {count_seeds(seeds)} with its "
        "95 % t interval, paired within seeds; held if the interval lies above zero, not held if "
        "below, undecided otherwise and for a single seed. The last column is the same statistic "
        "on the paper's own numbers, one run without an interval. Intervals stand each for itself; "
        "they are not corrected for their number. Seeds vary the questions, the retain and "
        "few-shot people and the training, not who is forgotten.",
        "",
        "| claim | backbone | verdict | statistic | the paper's numbers |",
        "| --- | --- | --- | --- | --- |",
    ]
    for judgement in judgements:
        printed = "–" if judgement.paper is None else f"{judgement.paper:+.3f}"
        lines.append(
            f"| ({judgement.claim.id}) {judgement.claim.text} | {judgement.backbone} | "
            f"**{judgement.verdict}** | {judgement.measured} | {printed} |"
        )
    if len(backbones) > 1:
        names = ", ".join(backbones)
        lines.append(f"| (l) {ON_ALL} | {names} | **{on_all(judgements)}** | – | – |")
    else:
        lines += ["", "(l), all of it on both architectures, needs tables of two backbones."]
    lines += ["", "## What is measured", ""]
    for claim in CLAIMS:
        note = f" {claim.note}" if claim.note else ""
        lines.append(f"- ({claim.id}) {claim.where}. Statistic: {claim.measure}.{note}")
    if embedded:
        lines += [
            "",
            f"Of {', '.join(embedded)}: the order of the raw teachers (claim b, and how much an "
            "instruction alone does, claim a) is built into the embedded backbone by its training "
            "mix. What distillation makes of these teachers (c to k) is not.",
        ]
    return "\n".join(lines) + "\n"
