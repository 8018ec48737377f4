"""What a study says while nothing moves."""

import pytest

from vgid.cluster import watchdog
from vgid.cluster.mailbox import Traffic
from vgid.cluster.watchdog import PATIENCE_S, Watchdog, sentence


@pytest.fixture
def dog(monkeypatch):
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: 0.0)
    made = Watchdog(None, print, lambda: 1, lambda: False, lambda traffic: None)
    yield made
    made.close()


def test_it_speaks_after_a_minute_without_a_move_and_then_less_and_less(dog):
    held = Traffic(moves=3, held={0: "0001"})
    assert dog.look(held, 10) is None
    spoke = [now for now in range(10, 2000) if dog.look(held, now) is not None]
    assert spoke == [10 + PATIENCE_S * 2**n for n in range(6) if 10 + PATIENCE_S * 2**n < 2000]
    moved = held.model_copy(update={"moves": 4})
    assert dog.look(moved, 2000) is None
    assert dog.look(moved, 2000 + PATIENCE_S) == PATIENCE_S


def test_without_jobs_nothing_has_to_move_and_a_silent_mailbox_is_no_move(dog):
    assert [now for now in range(500) if dog.look(Traffic(moves=2, idle=(0,)), now)] == []
    assert [now for now in range(500, 600) if dog.look(None, now)] == [499 + PATIENCE_S]


@pytest.mark.parametrize(
    ("traffic", "room", "parts"),
    [
        (None, 0, ["the study's mailbox does not answer"]),
        (
            Traffic(waiting=("base-search", "base-held_out")),
            2,
            ["base-search, base-held_out wait for a slot", "no slot has come up yet"],
        ),
        (
            Traffic(held={0: "0003"}, waiting=("0004",), down=(1,)),
            1,
            [
                "slot 0 works on 0003",
                "0004 waits for a slot",
                "slot 1 is starting, the cluster's nodes have room for 1 of 2",
            ],
        ),
        (
            Traffic(
                held={n: f"{n:04d}" for n in range(40)},
                waiting=tuple(f"{n:04d}" for n in range(40, 60)),
                given_up=(40, 41),
            ),
            40,
            [
                *(f"slot {n} works on {n:04d}" for n in range(5)),
                "35 more slots work",
                "0040, 0041, 0042, 0043, 0044 and 15 more wait for a slot",
                "slots 40, 41 are given up",
            ],
        ),
    ],
)
def test_one_sentence_names_what_is_waited_for(traffic, room, parts):
    assert sentence(traffic, 61.4, room) == f"Nothing has moved for 1 min 01 s: {'; '.join(parts)}."
