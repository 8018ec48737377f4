"""Looks after the slots of a study while it runs.

It has them follow jobs and cluster, says what the study waits for when nothing has moved for a
while, and ends waits past its time.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vgid.cluster.mailbox import Traffic
from vgid.command_line import duration

PATIENCE_S = 60.0  # after which a study says what it waits for; doubled each time it does
LOOK_S = 5.0  # between two looks at the mailbox, and how long it may take to answer
NAMED = 5  # trials are named in a sentence; of more it gives the number


@dataclass
class Watchdog:
    """A thread that looks at where the jobs are, until it is closed."""

    mailbox: Any
    say: Callable[[str], None]
    room: Callable[[], int]  # how many of the study's slots the cluster's nodes hold now
    # What then waits for a minute with no slot that could take it is given up.
    out_of_time: Callable[[], bool]
    follow: Callable[[Traffic], None]  # told at each look where the jobs are

    def __post_init__(self) -> None:
        self._moves = -1
        self._since = time.monotonic()
        self._patience_s = PATIENCE_S
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def look(self, traffic: Traffic | None, now: float) -> float | None:
        """Seconds for which nothing has moved, if it is time to tell; no traffic is no answer."""
        if traffic is not None:
            busy = traffic.waiting or traffic.held
            if traffic.moves != self._moves or not busy:
                self._moves, self._since, self._patience_s = traffic.moves, now, PATIENCE_S
        still = now - self._since
        if still < self._patience_s:
            return None
        # After 1, 2, 4 ... minutes: a night of waiting is ten lines, not six hundred.
        self._patience_s = 2 * still
        return still

    def _watch(self) -> None:
        import ray

        told = 0
        while not self._over.wait(LOOK_S):
            traffic: Traffic | None = None
            with suppress(ray.exceptions.RayError):
                traffic = ray.get(self.mailbox.traffic.remote(), timeout=LOOK_S)
                for fault in traffic.faults[told:]:
                    self.say(f"A slot is not used: {fault}")
                told = len(traffic.faults)
            still = self.look(traffic, time.monotonic())
            with suppress(ray.exceptions.RayError):
                if traffic is not None:
                    self.follow(traffic)
                if still is not None:
                    self.say(sentence(traffic, still, 0 if traffic is None else self.room()))
                stuck = time.monotonic() - self._since >= PATIENCE_S
                if traffic is not None and stuck and self.out_of_time():
                    self.mailbox.drop_waiting.remote("the time budget ended before a slot was up")


def sentence(traffic: Traffic | None, still_s: float, room: int) -> str:
    """What a study waits for, in one sentence; its nodes have room for ``room`` of its slots."""
    parts = []
    if traffic is None:
        parts.append("the study's mailbox does not answer")
    else:
        parts += [f"slot {slot} works on {job}" for slot, job in list(traffic.held.items())[:NAMED]]
        if len(traffic.held) > NAMED:
            parts.append(f"{len(traffic.held) - NAMED} more slots work")
        if traffic.waiting:
            waits = "waits" if len(traffic.waiting) == 1 else "wait"
            parts.append(f"{_names(traffic.waiting)} {waits} for a slot")
        slots = len(traffic.held) + len(traffic.idle) + len(traffic.down)
        if not slots:
            parts.append("no slot has come up yet")
        elif traffic.down:
            parts.append(
                f"{_slots(traffic.down)} starting, the cluster's nodes have room for "
                f"{min(room, slots)} of {slots}"
            )
        if traffic.given_up:
            parts.append(f"{_slots(traffic.given_up)} given up")
    return f"Nothing has moved for {duration(still_s)}: {'; '.join(parts)}."


def _names(named: Sequence[object]) -> str:
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return ", ".join(map(str, named[:NAMED])) + more


def _slots(numbers: Collection[int]) -> str:
    listed = _names(sorted(numbers))
    return f"slot {listed} is" if len(numbers) == 1 else f"slots {listed} are"
