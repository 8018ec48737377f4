"""Claims on tables made up for the purpose: what holds, what does not, what cannot be told."""

import numpy as np
import pytest

from vgid.claims import (
    BASELINES,
    CLAIMS,
    claims_markdown,
    judge,
    judge_all,
    on_all,
    verdict,
)
from vgid.config import TrialConfig
from vgid.evidence import OurEvidence, PaperEvidence
from vgid.experiments import Outcome
from vgid.intervals import Interval, t_interval
from vgid.results import Score
from vgid.tables import ALL_NINE, METHOD_LABELS, SIGMAS, FilledTable, tables

TABLES = tables({method: TrialConfig(method=method) for method in METHOD_LABELS})
BY_ID = {claim.id: claim for claim in CLAIMS}
PAPER = PaperEvidence(TABLES, "LLaVA-1.5-7B")

IDEAL = {
    1: {"base": 0.9, "icu_declarative": 0.8, "icu_polite": 0.75, "icu_strict": 0.7},
    2: {"base": 0.9, "icu_strict": 0.7, "visual": 0.5, "dual": 0.1},
    3: {"base": 0.9, "vgid": 0.1, "icu_t": 0.5, "noise_t": 0.3, **dict.fromkeys(BASELINES, 0.6)},
    4: {
        "base": 0.9,
        "random": 0.1,
        "white": 0.3,
        **{f"gaussian_{sigma}": 0.9 - sigma for sigma in SIGMAS[:3]},
        "gaussian_0.8": 0.15,
    },
    5: {"base": 0.9, "declarative": 0.2, "polite": 0.4, "strict": 0.1},
    6: {"base": 0.9, "icu": 0.5, "vgid": 0.1, "base_reverse": 0.9, "icu_reverse": 0.8}
    | {"vgid_reverse": 0.12},
}
IDEAL |= {8: IDEAL[3], 9: IDEAL[3]}


def evidence(forget, retain=None, seeds=4, noise=0.005, names=None):
    """Tables whose forget and test scores are ``forget[table][row]`` with a little noise."""
    rng = np.random.default_rng(0)
    retain = retain or {}
    made = {}
    for number, table in TABLES.items():
        outcomes = {}
        for row in table.rows:
            if names is not None and row.key not in names:
                continue
            by_seed = []
            for _ in range(seeds):
                scores = {}
                for metric in ALL_NINE:
                    value = forget[number][row.key]
                    if metric.startswith("retain"):
                        value = retain.get(row.key, 0.9 - 0.2 * (row.key in BASELINES))
                        value -= 0.1 * (row.key in ("polite", "declarative"))
                    value += noise * rng.standard_normal()
                    scores[metric] = Score(value=value, n=9, low=0, high=1)
                by_seed.append(Outcome(scores=scores, seconds=0, provenance={}))
            outcomes[row.key] = tuple(by_seed)
        made[number] = FilledTable(table, "tiny-llava", tuple(range(seeds)), outcomes)
    return OurEvidence(made)


def judged(claim, found):
    return judge(BY_ID[claim], "tiny-llava", found, PAPER)


def test_every_claim_of_the_list_is_there_with_its_place():
    letters = sorted({claim.id[0] for claim in CLAIMS})
    assert letters == list("abcdefghijk")
    assert len(BY_ID) == len(CLAIMS)
    assert all(claim.where and claim.measure and claim.text.endswith(".") for claim in CLAIMS)


@pytest.mark.parametrize("claim", BY_ID)
def test_ideal_tables_hold_every_claim(claim):
    assert judged(claim, evidence(IDEAL)).verdict == "held"


REVERSED = {
    "a": {1: {"icu_strict": 0.2}},
    "b": {2: {"visual": 0.05}},
    "c1": {3: {"npo": 0.02}},
    "d": {3: {"noise_t": 0.02}},
    "e": {4: {"gaussian_0.2": 0.1, "gaussian_0.8": 0.7}},
    "f": {4: {"white": 0.02}},
    "g2": {5: {"strict": 0.8}},
    "h": {6: {"vgid_reverse": 0.6}},
    "i": {3: {"vgid": 0.95}},
    "j1": {8: {"ga": 0.02}},
    "j2": {9: {"icu_t": 0.02}},
}


@pytest.mark.parametrize("claim", REVERSED)
def test_a_claim_falls_with_what_it_is_about(claim):
    changed = {n: {**rows, **REVERSED[claim].get(n, {})} for n, rows in IDEAL.items()}
    assert judged(claim, evidence(changed)).verdict == "not held"


def test_claims_on_retain_fall_with_the_retain_set():
    assert judged("c2", evidence(IDEAL, {"vgid": 0.5})).verdict == "not held"
    kept = dict.fromkeys(("ga", "ga_diff", "kl_min"), 0.95)
    assert judged("k", evidence(IDEAL, kept)).verdict == "not held"


@pytest.mark.parametrize("claim", BY_ID)
def test_one_seed_decides_nothing(claim):
    found = judged(claim, evidence(IDEAL, seeds=1))
    assert found.verdict == "undecided"
    assert len(found.by_seed) == 1


def test_noise_larger_than_the_difference_is_undecided():
    flat = {n: dict.fromkeys(rows, 0.5) for n, rows in IDEAL.items()}
    flat[5] = dict.fromkeys(IDEAL[5], 0.5)
    found = evidence(flat, dict.fromkeys(IDEAL[3], 0.8), seeds=5, noise=0.1)
    assert judged("h", found).verdict == "undecided"
    assert judged("e", found).verdict == "undecided"


def test_equal_styles_are_not_found_to_differ():
    flat = {**IDEAL, 5: dict.fromkeys(IDEAL[5], 0.5)}
    found = judged("g1", evidence(flat, seeds=60, noise=0.05))
    plain = evidence(flat, seeds=60, noise=0.05)
    columns = [plain.values(5, style, "forget_rougeL") for style in ("declarative", "polite")]
    columns.append(plain.values(5, "strict", "forget_rougeL"))
    ranges = [max(c[i] for c in columns) - min(c[i] for c in columns) for i in range(60)]
    assert t_interval(ranges).low > 0  # the plain range always "differs"
    assert found.verdict == "undecided" or found.interval.high < 0


def test_missing_rows_leave_a_claim_open_and_do_not_break_the_others():
    only = {"base", "vgid", "ga", "icu_strict", "icu", "visual", "dual", "random"}
    found = evidence(IDEAL, names=only)
    for claim in ("a", "d", "e", "f", "g1", "g2", "h"):
        assert judged(claim, found).verdict == "undecided"
        assert judged(claim, found).interval.n == 0
    assert judged("b", found).verdict == "held"
    assert judged("c1", found).verdict == "held"  # over the baselines that there are
    assert judged("b", OurEvidence({})).verdict == "undecided"


def test_ascent_that_forgets_nothing_says_nothing():
    idle = {**IDEAL, 3: {**IDEAL[3], "ga": 0.89, "ga_diff": 0.88, "kl_min": 0.9}}
    found = judged("k", evidence(idle))
    assert found.interval.n == 0 and found.verdict == "undecided"


def test_the_paper_s_own_numbers():
    assert judged("a", evidence(IDEAL)).paper == pytest.approx(0.458 / 0.571 - 0.5)
    assert judged("b", evidence(IDEAL)).paper == pytest.approx(0.382 - 0.109)
    assert judged("c2", evidence(IDEAL)).paper == pytest.approx(0.441 - 0.525)
    assert judged("h", evidence(IDEAL)).paper == pytest.approx((0.518 - 0.462) - 0.02)
    slope = np.polyfit(SIGMAS, [0.561, 0.553, 0.486, 0.409], 1)[0]
    assert judged("e", evidence(IDEAL)).paper == pytest.approx(-slope)
    assert judged("g1", evidence(IDEAL)).paper is None


def test_the_sign_of_the_interval_decides():
    assert verdict(Interval(0.2, 0.1, 0.3, 3)) == "held"
    assert verdict(Interval(-0.2, -0.3, -0.1, 3)) == "not held"
    assert verdict(Interval(0.2, -0.1, 0.5, 3)) == "undecided"
    assert verdict(Interval(0.0, 0.0, 0.0, 3)) == "undecided"


def test_all_on_both_architectures():
    held, fails = evidence(IDEAL), evidence({**IDEAL, 2: {**IDEAL[2], "visual": 0.05}})
    both = [judge(claim, name, held, PAPER) for claim in CLAIMS for name in ("one", "two")]
    assert on_all(both) == "held"
    assert on_all([*both, judge(BY_ID["b"], "two", fails, PAPER)]) == "not held"
    short = judge(BY_ID["b"], "two", evidence(IDEAL, seeds=1), PAPER)
    assert on_all([*both, short]) == "undecided"


def test_the_report_names_every_claim_and_what_is_built_in():
    filled = list(evidence(IDEAL).tables.values())
    found = judge_all(filled, TABLES, {"tiny-llava": "LLaVA-1.5-7B"})
    assert [judgement.claim.id for judgement in found] == list(BY_ID)
    text = claims_markdown(found, ["tiny-llava"])
    for claim in CLAIMS:
        assert f"| ({claim.id}) " in text and f"- ({claim.id}) " in text
    assert "**held**" in text and "training mix" in text and "(l)" in text
    assert "Of tiny-llava" not in claims_markdown(found, [])
