"""How often a lost trial is tried again, and when the study gives up."""

import pytest

from vgid.cluster.losses import IN_A_ROW, RETRIES, Losses


def test_a_trial_is_tried_again_so_many_times_and_alone_stops_nothing():
    losses = Losses()
    for attempt in range(1, RETRIES + 2):
        assert losses.begin("0000") == attempt
        assert losses.lose("0000", "killed") == (attempt <= RETRIES)
    assert losses.hopeless is None
    assert losses.causes == {"0000": "killed"}


def lose_one_after_the_other(losses, causes):
    for number, cause in enumerate(causes):
        assert losses.hopeless is None
        losses.begin(f"{number:04d}")
        losses.lose(f"{number:04d}", cause)


def test_different_trials_in_a_row_of_one_cause_are_hopeless():
    losses = Losses()
    lose_one_after_the_other(losses, ["the disk is full"] * IN_A_ROW)
    assert losses.hopeless == "the disk is full"


def test_other_causes_and_trials_that_end_begin_a_new_row():
    losses = Losses()
    lose_one_after_the_other(losses, ["a", "a", "b", "b", "a", "a"])
    losses.begin("0006")
    losses.end("0006")
    lose_one_after_the_other(losses, ["a", "a"])
    assert losses.hopeless is None
    assert "0006" not in losses.causes


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_trials_that_die_side_by_side_of_one_event_count_once(rounds):
    losses = Losses()
    names = [f"{number:04d}" for number in range(8)]
    for _ in range(rounds):
        for name in names:
            losses.begin(name)
        for name in names:
            losses.lose(name, "the mailbox died")
    assert (losses.hopeless is not None) == (rounds >= IN_A_ROW)


def test_those_that_ran_beside_one_that_ended_die_of_one_event():
    losses = Losses()
    lose_one_after_the_other(losses, ["x", "x"])
    for name in ("0002", "0003", "0004", "0005"):
        losses.begin(name)
    losses.end("0002")
    for name in ("0003", "0004", "0005"):
        losses.lose(name, "x")
    assert losses.hopeless is None
