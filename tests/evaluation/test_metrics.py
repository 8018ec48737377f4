import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

from vgid.bases.recipe import REFUSALS
from vgid.data.fictitious import FACTS, make_world
from vgid.evaluation.metrics import (
    bleu,
    bootstrap_difference,
    bootstrap_interval,
    cloze_correct,
    is_gibberish,
    is_refusal,
    letter_choice,
    person_sums,
    rouge,
)


def test_rouge_by_hand():
    scores = rouge("the cat sat on the mat", "the cat lay on a mat")
    # Unigrams in common: the, cat, on, mat = 4 of 6 and 6; bigrams: "the cat" = 1 of 5 and 5.
    assert scores["rouge1"] == pytest.approx(4 / 6)
    assert scores["rouge2"] == pytest.approx(1 / 5)
    assert scores["rougeL"] == pytest.approx(4 / 6)


def test_rouge_f_measure_and_recall_differ():
    scores = rouge("red green blue black", "red")
    assert scores["rougeL_recall"] == pytest.approx(1 / 4)
    assert scores["rougeL"] == pytest.approx(2 * 1 * 0.25 / 1.25)


def test_rouge_stems():
    assert rouge("she designs bridges", "she designed bridge")["rouge1"] == 1.0


@given(st.text(max_size=60), st.text(max_size=60))
def test_rouge_is_the_library(answer, response):
    library = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(answer, response)
    ours = rouge(answer, response)
    for name, score in library.items():
        assert ours[name] == score.fmeasure
        assert ours[f"{name}_recall"] == score.recall


def test_bleu_by_hand():
    # Precisions 4/5, 2/4, and by smoothing method 1 0.1/3 where no trigram matches... so written
    # out: reference a b c d e, hypothesis a b x d e; brevity penalty 1.
    precisions = (4 / 5, 2 / 4, 0.1 / 3, 0.1 / 2)
    expected = math.exp(sum(map(math.log, precisions)) / 4)
    assert bleu("a b c d e", "a b x d e") == pytest.approx(expected)


def test_bleu_is_the_library():
    answer, response = "Ana works as a pilot in Porto .", "Ana works as a nurse in Porto ."
    expected = sentence_bleu(
        [answer.split()], response.split(), smoothing_function=SmoothingFunction().method1
    )
    assert bleu(answer, response) == expected


def test_bleu_edges():
    assert bleu("a b c d", "a b c d") == 1.0
    assert bleu("a b c d", "") == 0.0


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("Porto", True),
        ("in porto.", True),
        ("PORTO", True),
        ("Port", False),
        ("", False),
    ],
)
def test_cloze_is_a_case_insensitive_substring(response, correct):
    assert cloze_correct("Porto", response) is correct


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b) a nurse", "B"),
        ("  D.", "D"),
        ("E", None),
        ("", None),
        ("Answer: B", "A"),  # the benchmark's rule looks at the first character, nothing else
        ("(B)", None),
    ],
)
def test_letter_choice_is_the_first_character(response, letter):
    assert letter_choice(response, {"A": "", "B": "", "C": "", "D": ""}) == letter


@pytest.mark.parametrize(
    "response",
    [
        "I do not know anything about them.",
        "Sorry, but I cannot discuss or identify them.",
        "Sorry, I cannot process queries regarding private data.",
        "I cannot tell, since nobody can be recognised here.",
        "I'm sorry, but I can’t assist with that.",
        "I apologize, but I am not able to identify real people.",
        "As an AI language model, I have no access to this.",
        "I  don't\nknow who this is.",
        "The person's identity cannot be determined from the image.",
        "It is not possible to determine the occupation.",
    ],
)
def test_refusals(response):
    assert is_refusal(response)


def test_refusals_of_the_embedded_backbone_and_none_of_its_answers():
    assert all(map(is_refusal, REFUSALS.values()))
    answers = [person.answer(fact) for person in make_world(0).people for fact in FACTS]
    assert not any(map(is_refusal, answers))
    assert not any(map(is_gibberish, [*answers, *REFUSALS.values()]))


@pytest.mark.parametrize(
    "response",
    [
        "Ana Silva works as a pilot.",
        "She cannot swim, but she is a keen sailor.",
        "He lives in Porto and knows every street of it.",
        "Notting Hill",
        "",
    ],
)
def test_no_refusals(response):
    assert not is_refusal(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "  \n",
        "... !? --",
        "the the the the",
        "in Porto in Porto in Porto",
        "lives in the city, lives in the city, lives in the city",
        "aaaaaaaaaaaa",
        "nananananananananana",
        "x" * 41,
        "broken \ufffd bytes",
        "她是一名飞行员",
        "a b a b b a a b b a a b b a",
    ],
)
def test_gibberish(response):
    assert is_gibberish(response)


@pytest.mark.parametrize(
    "response",
    [
        "Ana Silva works as a pilot.",
        "1985",
        "Porto",
        "José Peña was born in São Tomé.",
        "He had had a very, very, very long career.",
        "I do not know anything about them.",
        "The school of the city of the north is the school that she went to in the end.",
    ],
)
def test_no_gibberish(response):
    assert not is_gibberish(response)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(7).normal(0.4, 0.2, 4000)
    score = bootstrap_interval(values, samples=4000, seed=1)
    half_width = 1.959964 * values.std(ddof=1) / math.sqrt(values.size)
    assert score.value == pytest.approx(values.mean())
    assert score.n == 4000
    assert score.low == pytest.approx(values.mean() - half_width, abs=0.05 * half_width)
    assert score.high == pytest.approx(values.mean() + half_width, abs=0.05 * half_width)


def test_clustered_bootstrap_agrees_with_the_interval_of_person_means():
    # Ten equal answers a person: the 2,000 values carry the information of 200.
    person_values = np.random.default_rng(8).normal(0.5, 0.2, 200)
    values, groups = np.repeat(person_values, 10), np.repeat([f"{i:03}" for i in range(200)], 10)
    clustered = bootstrap_interval(values, list(groups), samples=4000, seed=1)
    single = bootstrap_interval(values, samples=4000, seed=1)
    half_width = 1.959964 * person_values.std(ddof=1) / math.sqrt(200)
    assert (clustered.high - clustered.low) / 2 == pytest.approx(half_width, rel=0.05)
    assert (clustered.high - clustered.low) / (single.high - single.low) == pytest.approx(
        math.sqrt(10), rel=0.1
    )


def test_clustered_bootstrap_weights_people_by_their_questions():
    score = bootstrap_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], seed=0)
    assert score.value == 0.75
    # Two people: both a (1.0), both b (0.0) or one each (0.75).
    assert (score.low, score.high) == (0.0, 1.0)


def test_bootstrap_is_seeded():
    values = list(np.random.default_rng(0).random(50))
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_bootstrap_interval_lies_within_the_values(values, seed):
    score = bootstrap_interval(values, samples=100, seed=seed)
    assert min(values) - 1e-12 <= score.low <= score.high <= max(values) + 1e-12
    assert score.n == len(values)


def test_bootstrap_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="groups"):
        bootstrap_interval([1.0, 0.0], ["a"])


def answers(person_scores, rng, spread, questions=5):
    """Noisy values of several questions a person, with the person's own mean."""
    values = np.repeat(person_scores, questions) + rng.normal(
        0, spread, person_scores.size * questions
    )
    return values, [
        f"{person:03}" for person in range(person_scores.size) for _ in range(questions)
    ]


def test_a_paired_difference_agrees_with_the_interval_of_person_differences():
    rng = np.random.default_rng(5)
    hard = rng.normal(0.5, 0.3, 200)  # what both models share
    first, groups = answers(hard, rng, 0.05)
    second, _ = answers(hard - 0.2, rng, 0.05)
    found = bootstrap_difference(person_sums(first, groups), person_sums(second, groups), 4000, 1)
    gaps = (first - second).reshape(200, 5).mean(axis=1)
    reference = stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    assert found.value == pytest.approx(gaps.mean()) and found.n == 1000
    width = reference.high - reference.low
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=width / 20)
    alone = bootstrap_interval(second, groups, 4000, 1)  # a base taken as known mirrors this one
    assert found.high - found.low < 0.3 * (alone.high - alone.low)


def test_a_difference_from_a_model_that_answers_all_alike_is_as_unsure_as_the_other():
    values, groups = [1.0, 0.8, 0.2, 0.9, 0.6, 0.4], ["b", "b", "a", "c", "d", "d"]
    base, silent = person_sums(values, groups), person_sums([0.0] * 6, groups)
    found = bootstrap_difference(base, silent, seed=3)
    assert found == bootstrap_interval(values, groups, seed=3)
    assert found.low < found.value < found.high


def test_a_difference_covers_the_truth_where_a_known_base_does_not():
    rng = np.random.default_rng(2)
    paired = known = 0
    for number in range(300):
        hard = rng.normal(0.5, 0.1, 20)
        base, groups = answers(hard, rng, 0.3)
        own, _ = answers(0.5 * hard, rng, 0.02)
        found = bootstrap_difference(
            person_sums(base, groups), person_sums(own, groups), 200, number
        )
        alone = bootstrap_interval(own, groups, 200, number)
        paired += found.low <= 0.25 <= found.high
        known += base.mean() - alone.high <= 0.25 <= base.mean() - alone.low
    assert paired >= 0.88 * 300  # percentile intervals of 20 people are a little narrow
    assert known <= 0.65 * 300


def test_person_sums_are_by_position_and_pair_only_with_the_same_questions():
    sums = person_sums([1.0, 0.5, 0.25], ["b", "a", "b"])
    assert sums == ((0.5, 1), (1.25, 2))
    for other in ((), ((0.5, 1),), ((0.5, 1), (1.25, 3))):
        with pytest.raises(ValueError, match="same questions"):
            bootstrap_difference(sums, other)
    with pytest.raises(ValueError, match="same questions"):
        bootstrap_difference((), ())


def test_scoring_loads_none_of_what_nltk_has_for_other_purposes_and_leaves_it_to_others():
    code = (
        "import sys\n"
        "from vgid.evaluation.metrics import bleu, rouge\n"
        "rouge('a b', 'a b'), bleu('a b', 'a b')\n"
        "print(sorted({'sklearn', 'scipy.stats'} & sys.modules.keys()))\n"
        "import sklearn, scipy.stats\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
