"""When the word may be used, from scores written by hand."""

import pytest

from vgid.evaluation.suppression import doubt, is_suppressed, share_gone, verdict
from vgid.results import Score


def score(value, reach=0.0):
    return Score(value=value, n=30, low=value - reach, high=value + reach)


def knowing(rouge_l, cloze=None, split="forget"):
    found = {f"{split}_rougeL": score(rouge_l)}
    return found if cloze is None else found | {f"{split}_cloze": score(cloze)}


def test_the_share_is_of_the_base():
    assert share_gone(0.8, 0.2) == pytest.approx(0.75)
    assert share_gone(0.8, 0.9) < 0 and share_gone(0.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("base", "doubted"),
    [
        (knowing(0.20, 0.02), True),  # of the issue: a plain llava-1.5-7b
        (knowing(0.20, 0.30), True),
        (knowing(0.20), True),
        (knowing(0.44, 0.12), True),  # templates alone, measured
        (knowing(0.52, 0.10), True),
        (knowing(0.50), True),
        (knowing(0.571, 0.2391), False),  # the paper's LLaVA-1.5-7B
        (knowing(0.486, 0.2534), False),  # the same, at 15 %
        (knowing(0.567, 0.1042), False),  # its Qwen2.5-VL-3B
        (knowing(0.977, 1.0), False),  # tiny-llava
        (knowing(0.977), False),
        ({}, False),  # nothing was asked
    ],
)
def test_a_base_that_may_never_have_known_is_doubted(base, doubted):
    told = doubt(base)
    assert (told is not None) == doubted
    if told is not None:
        assert f"ROUGE-L of {base['forget_rougeL'].value:.3f}" in told
        assert "vgid finetune" in told


def test_what_scores_as_before_is_not_called_suppressed():
    base = knowing(0.95, 1.0) | {"test_rougeL": score(0.9)}
    left = {"forget_rougeL": score(0.95, 0.02), "test_rougeL": score(0.9)}
    assert not is_suppressed(base, left)
    told = verdict(base, left)
    assert told.startswith("Not suppressed under any test")
    assert "forget_rougeL (0.950 to 0.950 [0.930, 0.970])" in told


def test_each_test_is_judged_by_itself_and_by_the_intervals_unfavourable_ends():
    base = knowing(0.9, 1.0) | {
        "test_rougeL": score(0.8),
        "forget_rougeL_text": score(0.95),
        "forget_rougeL_recall": score(0.9),
        "retain_rougeL": score(0.9),
    }
    left = {
        "forget_rougeL": score(0.3, 0.14),  # 0.44 at most, of 0.9
        "test_rougeL": score(0.3, 0.11),  # 0.41 at most, of 0.8
        "forget_rougeL_text": score(0.95),
        "forget_rougeL_recall": score(0.9),
        "retain_rougeL": score(0.9),
        "forget_cloze": score(0.5),
        "forget_rougeL_new": score(0.0),  # the base was not asked
    }
    told = verdict(base, left, {"forget_rougeL": score(0.6), "retain_rougeL": score(0.9)})
    held, broken = told.split(" Not suppressed under ")
    assert held.endswith("unfavourable ends: forget_rougeL.")
    assert [part.split(" (")[0] for part in broken.split("), ")] == [
        "test_rougeL",
        "forget_rougeL_text",
        "forget_rougeL under the reverse prompt",
    ]
    assert is_suppressed(base, left)
    assert not is_suppressed(base, left | {"forget_rougeL": score(0.3, 0.16)})
    # 0.44 is not half of 0.85, which the base may have had too.
    assert not is_suppressed(base | {"forget_rougeL": score(0.9, 0.05)}, left)


def test_a_share_of_what_was_never_there_shows_nothing():
    base, left = knowing(0.20, 0.05), knowing(0.02, 0.0)
    assert share_gone(0.20, 0.02) == pytest.approx(0.9)
    assert not is_suppressed(base, left)
    assert verdict(base, left) == doubt(base)


def test_people_of_earlier_requests_are_judged_by_their_own_scores():
    base = knowing(0.9, 1.0) | knowing(0.9, 1.0, "earlier")
    left = knowing(0.0) | knowing(0.8, split="earlier")
    assert is_suppressed(base, left) and not is_suppressed(base, left, "earlier")
    assert "earlier_rougeL (0.900 to 0.800" in verdict(base, left, splits=("earlier",))
    assert verdict(base, {}, splits=("earlier",)).startswith("Nothing was asked")
