"""The mailbox of a study: how trials reach resident workers, and how their reports come back.

One asyncio actor for all slots. Both sides long-poll it, so nothing sleeps in a loop: a worker
waits in ``take`` until there is a job, a trial waits in ``next_message`` until there is a report.
When a slot's workers die, the next free slot is handed the job that it held. Every wait ends with
whoever it is for: a new worker of a slot ends the poll of the one before, and so does a listener.
"""

import asyncio
import sys
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vgid.config import Config, TrialConfig
from vgid.results import EpochReport, QuestionPart, Score, TrialResult

MAX_ATTEMPTS = 3  # times a job may lose its worker until it is given up: it may be what kills it
# A slot that is started again more often than that within so many seconds is given up.
MAX_RESTARTS = 5
RESTART_WINDOW_S = 600.0


class Job(Config):
    """One piece of work for a slot.

    ``trial`` runs and scores one, ``base`` scores the base model on ``part``, ``rescore`` the
    adapter in ``adapter``.
    """

    id: str  # unique within the study; for a trial, its trial id
    kind: Literal["trial", "base", "rescore"]
    trial: TrialConfig | None = None
    adapter: Path | None = None  # folder that it is written to (trial) or read from (rescore)
    checkpoints: Path | None = None  # folder of the trial's resumable state
    part: QuestionPart = "search"
    seed: int = 0  # of few-shot people, test poses and bootstrap, for base and rescore
    attempt: int = 1  # which one of this run of the study it is


class Outcome(Config):
    """How a job ended; a lost trial has no result."""

    job_id: str
    result: TrialResult | None = None
    scores: dict[str, Score] = Field(default_factory=dict)  # of a base scoring or a re-scoring
    content: dict[str, str] = Field(default_factory=dict)  # of the base: ``study.ledger.CONTENT``
    error: str | None = None  # one sentence
    fatal: bool = False  # it is in what all jobs share (model, data): no job can succeed
    # It is the environment's (``vgid.cluster.losses``): the job may succeed when tried again.
    lost: bool = False
    trace: str | None = None  # where its exception came from, without the message
    load_s: float = 0.0  # seconds that the worker spent on loading model and data for this job
    slot: int = -1
    cycle_s: float | None = None  # since the end of the slot's job before; None for its first

    def log_trace(self) -> None:
        """Write where its error came from to stderr, which is ``study.log`` in a study's driver."""
        if self.trace is not None:
            print(f"{self.job_id} (most recent call last):\n{self.trace}", file=sys.stderr)


class Traffic(Config):
    """Where a study's jobs are."""

    moves: int = 0  # how often a job was taken, reported or ended; what stands still does not count
    waiting: tuple[str, ...] = ()  # ids of jobs that wait for a slot, the next one first
    held: dict[int, str] = Field(default_factory=dict)  # the job of each busy slot
    idle: tuple[int, ...] = ()
    down: tuple[int, ...] = ()  # slots that are starting, or starting again
    given_up: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()  # why slots cannot serve, a sentence each


@dataclass(eq=False)
class _Ticket:
    """A job on its way: what was reported, and what was decided about the last report."""

    job: Job
    caller: str  # who wants to hear of it
    messages: "deque[EpochReport | Outcome]" = field(default_factory=deque)
    asking: "asyncio.Future[EpochReport | Outcome | None] | None" = None  # for the next message
    heard: EpochReport | Outcome | None = None  # the last one given, until it asks for another
    decision: "asyncio.Future[bool] | None" = None
    last_epoch: int = 0
    attempts: int = 0
    cancelled: bool = False
    ended: bool = False

    def decide(self, go_on: bool) -> None:
        if self.decision is not None and not self.decision.done():
            self.decision.set_result(go_on)
        self.decision = None

    def tell(self, message: EpochReport | Outcome) -> None:
        if self.asking is not None and not self.asking.done():
            self.asking.set_result(message)
        else:
            self.messages.append(message)


@dataclass
class _Slot:
    worker: str = ""  # the process that serves it, if there is one
    holds: _Ticket | None = None
    last_end: float | None = None
    useful: bool = False  # whether a job has ended in it since its last restart
    # When it was restarted, by the job that was lost: one that kills every worker is not its fault.
    restarts: dict[str, float] = field(default_factory=dict)
    given_up: bool = False
    released: bool = False
    free_since: float = 0.0


# One trial, whose worker dies in its second epoch. Left Tune's process, right the slot's:
#
#     submit(7)                 waiting: 7            take        -> 7
#     next_message  ->  1 ...                         report(1)      waits for a decision
#     next_message (= go on)    report(1) is True     trains epoch 2, dies
#                               free: 7 goes first    take        -> 7, from its checkpoint
#                               1 was told before     report(1) is True at once
#     next_message  ->  2                             report(2)      waits for a decision
#
# Tune's side never notices. Were reports simply sent and forgotten, a trial that Tune stops would
# train on for an epoch or more, and one that starts again would count its epochs twice.
class Mailbox:
    """Hands jobs to slots and messages back. An asyncio actor; its methods run interleaved.

    Nothing in it must outlive it: when its process has died and Ray has started it again, it
    knows no job, answers questions for one with a lost outcome, and sends workers on to the next.
    """

    def __init__(self) -> None:
        self._tickets: dict[str, _Ticket] = {}
        self._waiting: deque[_Ticket] = deque()
        self._slots: defaultdict[int, _Slot] = defaultdict(_Slot)
        self._changed = asyncio.Condition()
        self._closed = False
        self._last_word: Outcome | None = None  # once nothing can run any more
        self._moves = 0
        self._faults: list[str] = []

    # The side of the driver and of Tune's trials

    async def submit(self, job: Job, caller: str = "") -> None:
        """Queue a job; jobs are served in the order of submission.

        A job that is on its way already goes on, and ``caller`` hears of it in place of the one
        before, which must be dead. What that one heard last is told again; so is an outcome, unless
        the job was lost and is to run anew.
        """
        ticket = self._tickets.get(job.id)
        if ticket is not None and ticket.caller != caller and not ticket.cancelled:
            # A trial whose Tune process died is handed out again under its id.
            ticket.caller, heard = caller, ticket.heard
            if heard is not None and not (isinstance(heard, Outcome) and heard.lost):
                ticket.messages.appendleft(heard)
            if not ticket.ended or ticket.messages:
                return
        ticket = self._tickets[job.id] = _Ticket(job, caller)
        if self._last_word is not None:
            self._end(ticket, self._last_word)
        else:
            self._waiting.append(ticket)
            await self._wake()

    async def next_message(self, job_id: str, caller: str = "") -> EpochReport | Outcome:
        """The job's next report, or its outcome as the last one; waits for it.

        Asking for the next report is the decision to go on after the one before. Of several
        questions for one job the newest gets the answer.
        """
        forgotten = Outcome(job_id=job_id, error="the study's mailbox lost it", lost=True)
        if self._last_word is not None:
            forgotten = self._last_word.model_copy(update={"job_id": job_id})
        ticket = self._tickets.get(job_id)
        if ticket is None or ticket.caller != caller:
            return forgotten
        ticket.decide(True)
        if ticket.asking is not None and not ticket.asking.done():
            ticket.asking.set_result(None)
        ticket.heard = None
        ticket.asking = asyncio.get_running_loop().create_future()
        if ticket.messages:
            ticket.asking.set_result(ticket.messages.popleft())
        message = await ticket.asking
        if message is None:
            return forgotten
        ticket.heard = message
        return message

    async def cancel(self, job_id: str, caller: str | None = None) -> None:
        """Stop a job: at once if it waits or stands at the end of an epoch, else at the next.

        One that has ended is forgotten. A ``caller`` that no longer hears of the job stops nothing.
        """
        ticket = self._tickets.get(job_id)
        if ticket is None or caller not in (None, ticket.caller):
            return
        if ticket.ended:
            del self._tickets[job_id]
            return
        ticket.cancelled = True
        ticket.decide(False)
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._end(ticket, Outcome(job_id=job_id, error="stopped before it started"))

    async def cancel_all(self) -> None:
        """Stop every job and wake everyone who waits for one: the study is interrupted."""
        self._end_all(Outcome(job_id="", error="interrupted"))

    async def drop_waiting(self, error: str) -> None:
        """Lose what no slot has taken: trials, and where no slot holds anything all jobs."""
        busy = any(slot.holds is not None for slot in self._slots.values())
        for ticket in [t for t in self._waiting if not busy or t.job.kind == "trial"]:
            self._waiting.remove(ticket)
            self._end(ticket, failure(ticket.job, error, lost=True))

    async def traffic(self) -> Traffic:
        """Where the jobs are."""
        slots = [(n, slot) for n, slot in self._slots.items() if not slot.released]
        free = [(n, slot) for n, slot in slots if slot.holds is None and not slot.given_up]
        return Traffic(
            moves=self._moves,
            waiting=tuple(ticket.job.id for ticket in self._waiting),
            held={n: slot.holds.job.id for n, slot in slots if slot.holds},
            idle=tuple(n for n, slot in free if slot.worker),
            down=tuple(n for n, slot in free if not slot.worker),
            given_up=tuple(n for n, slot in slots if slot.given_up),
            faults=tuple(self._faults),
        )

    async def release(self, idle_s: float) -> None:
        """Let go of slots that had nothing to do for so long; one stays, and one a waiting job.

        Those without a worker go first: what they wait for may be a node that is to come for them.
        """
        there = [slot for slot in self._slots.values() if not (slot.given_up or slot.released)]
        free = [slot for slot in there if slot.holds is None]
        spare = min(len(free) - len(self._waiting), len(there) - 1)
        for slot in sorted(free, key=lambda slot: (bool(slot.worker), slot.free_since)):
            if spare > 0 and time.monotonic() - slot.free_since >= idle_s:
                slot.released = True
                spare -= 1
        await self._wake()

    async def fail(self, error: str, lost: bool = False) -> None:
        """End every job with ``error``, and those still to come: nothing can run any more."""
        self._end_all(Outcome(job_id="", error=error, fatal=True, lost=lost))

    async def close(self) -> None:
        """Send the workers home."""
        self._closed = True
        await self._wake()

    # The side of the slots

    async def take(self, slot: int, worker: str) -> Job | None:
        """The next job for a slot, in which a new ``worker`` means that the one before is gone.

        Waits for one; None when the slot is to end.
        """
        state = self._slots[slot]
        if state.holds is not None or state.worker not in ("", worker):
            await self.free(slot)
        state.worker, state.free_since = worker, time.monotonic()
        async with self._changed:
            await self._changed.wait_for(
                lambda: bool(self._waiting) or not self._wants(state) or state.worker != worker
            )
            if not self._wants(state) or state.worker != worker:
                return None
            # Before the worker has it: one that dies on the way loses nothing.
            ticket = state.holds = self._waiting.popleft()
        ticket.attempts += 1
        self._moves += 1
        return ticket.job

    async def free(self, slot: int, cause: str = "killed") -> None:
        """The workers of a slot are gone; what it held goes to whichever slot is next.

        Called once before a slot first starts, and whenever it is about to start again. More than
        ``MAX_RESTARTS`` in ``RESTART_WINDOW_S`` end the slot, and without any slot the study.
        ``cause`` tells nothing private.
        """
        if slot not in self._slots:
            self._slots[slot] = _Slot(free_since=time.monotonic())
            return
        state = self._slots[slot]
        if state.given_up:
            return
        ticket, state.holds = state.holds, None
        # Not counted is a restart after a job that has ended: its failure may have asked for it.
        if ticket is not None or not state.useful:
            _count_restart(state, None if ticket is None else ticket.job.id)
        state.worker, state.useful, state.free_since = "", False, time.monotonic()
        if ticket is not None and not ticket.ended:
            ticket.decide(True)
            if ticket.cancelled:
                self._end(ticket, failure(ticket.job, "stopped"), slot)
            elif ticket.attempts < MAX_ATTEMPTS:
                # In front: it has waited longest, and its checkpoint is there.
                self._waiting.appendleft(ticket)
            else:
                error = f"lost its worker {MAX_ATTEMPTS} times"
                self._end(ticket, failure(ticket.job, error, lost=True), slot)
        if all(each.given_up for each in self._slots.values() if not each.released):
            await self.fail(
                f"ray: every slot lost its workers more than {MAX_RESTARTS} times within "
                f"{RESTART_WINDOW_S / 60:g} minutes (the last: {cause}); see study.log.",
                lost=True,
            )
        await self._wake()

    async def give_up(self, slot: int, fault: str) -> None:
        """A slot that has taken no job cannot serve; the study ends if it is the last one."""
        self._slots[slot].given_up = True
        self._faults.append(fault)
        if all(each.given_up for each in self._slots.values()):
            await self.fail(fault, lost=True)

    async def wants(self, slot: int) -> bool:
        """Whether a slot is to serve jobs, now or later."""
        return self._wants(self._slots[slot])

    async def report(self, slot: int, job_id: str, report: EpochReport) -> bool:
        """An epoch is over; waits for the decision and returns whether to go on.

        A slot that does not hold the job, which then runs elsewhere, is to stop.
        """
        ticket = self._slots[slot].holds
        if ticket is None or ticket.job.id != job_id or ticket.ended or ticket.cancelled:
            return False
        self._moves += 1
        if report.epoch <= ticket.last_epoch:  # reported before its worker died
            return True
        ticket.last_epoch = report.epoch
        decision = ticket.decision = asyncio.get_running_loop().create_future()
        ticket.tell(report)
        if report.epoch >= report.epochs:  # nothing is left to decide, the evaluation may start
            return True
        return await decision

    async def finish(self, slot: int, outcome: Outcome) -> None:
        """A job is done; only the slot that holds it can say so, and only once."""
        state = self._slots[slot]
        if outcome.fatal and outcome.error is not None:
            await self.fail(outcome.error)
        ticket = state.holds
        if ticket is None or ticket.job.id != outcome.job_id:
            return
        state.holds, state.useful = None, True
        if not ticket.ended:
            self._end(ticket, outcome, slot)

    def _wants(self, state: _Slot) -> bool:
        over = self._closed or self._last_word is not None
        return not (over or state.given_up or state.released)

    def _end_all(self, last_word: Outcome) -> None:
        self._last_word = last_word
        self._waiting.clear()
        for ticket in list(self._tickets.values()):
            if not ticket.ended:
                self._end(ticket, last_word)

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _end(self, ticket: _Ticket, outcome: Outcome, slot: int | None = None) -> None:
        ticket.ended = True
        self._moves += 1
        ticket.decide(False)
        if ticket.cancelled and self._tickets.get(ticket.job.id) is ticket:
            del self._tickets[ticket.job.id]
        known: dict[str, Any] = {"job_id": ticket.job.id}
        if slot is not None:
            state, now = self._slots[slot], time.monotonic()
            cycle_s = None if state.last_end is None else now - state.last_end
            known |= {"slot": slot, "cycle_s": cycle_s}
            state.last_end = now
        ticket.tell(outcome.model_copy(update=known))


def _count_restart(state: _Slot, lost: str | None) -> None:
    now = time.monotonic()
    # By job, so that a job that kills three workers in a row is one restart, not three of five.
    state.restarts[lost or f"none at {now}"] = now
    recent = {key: at for key, at in state.restarts.items() if at > now - RESTART_WINDOW_S}
    state.restarts, state.given_up = recent, len(recent) > MAX_RESTARTS


def failure(job: Job, error: str, lost: bool = False) -> Outcome:
    """A failed or lost outcome in the form that the job's kind calls for."""
    result = None
    if job.kind == "trial" and not lost:
        result = TrialResult(trial_id=job.id, status="failed", error=error)
    return Outcome(job_id=job.id, result=result, error=error, lost=lost)
