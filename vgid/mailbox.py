"""The mailbox of a study: how trials reach resident workers, and how their reports come back.

One asyncio actor for all slots. Both sides long-poll it, so nothing sleeps in a loop: a worker
waits in ``take`` until there is a job, a trial waits in ``next_message`` until there is a report.
It remembers which job a slot holds, so that a worker that was killed in mid-trial is handed the
same job when it comes back.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from vgid.config import Config, TrialConfig
from vgid.results import EpochReport, QuestionPart, Score, TrialResult

MAX_ATTEMPTS = 3
"""How often a job may lose its worker before it counts as failed: it may be what kills it."""


class Job(Config):
    """One piece of work for a slot.

    Attributes:
        id: unique within the study; for a trial, its trial id.
        kind: ``trial`` runs and scores ``trial``; ``base`` scores the base model on ``part``;
            ``rescore`` scores the adapter in ``adapter`` on ``part``.
        trial: the configuration of a trial.
        adapter: folder that the adapter is written to (trial) or read from (rescore).
        checkpoints: folder of the trial's resumable state.
        part: which questions to score on, for base and rescore.
        seed: of few-shot people, test poses and bootstrap, for base and rescore.
        attempt: which one of this run of the study it is.
    """

    id: str
    kind: Literal["trial", "base", "rescore"]
    trial: TrialConfig | None = None
    adapter: Path | None = None
    checkpoints: Path | None = None
    part: QuestionPart = "search"
    seed: int = 0
    attempt: int = 1


class Outcome(Config):
    """How a job ended.

    Attributes:
        job_id: the job.
        result: of a trial.
        scores: of a base scoring or a re-scoring.
        content: of a base scoring: ``precision`` of the weights (``vgid.ledger.CONTENT``).
        error: one sentence, if it failed.
        fatal: the error is in what all jobs share (model, data), so no job can succeed.
        lost: the error is the environment's, not the job's own (``vgid.blame``), and the job may
            succeed when it is tried again. A lost trial has no result: it has not ended.
        load_s: seconds that the worker spent on loading model and data for this job.
        slot: the slot that did it.
        served: how many jobs the slot had finished before.
        cycle_s: seconds from the end of the slot's job before to the end of this one; None for
            the slot's first.
    """

    job_id: str
    result: TrialResult | None = None
    scores: dict[str, Score] = Field(default_factory=dict)
    content: dict[str, str] = Field(default_factory=dict)
    error: str | None = None
    fatal: bool = False
    lost: bool = False
    load_s: float = 0.0
    slot: int = -1
    served: int = 0
    cycle_s: float | None = None


@dataclass
class _Ticket:
    """A job on its way: what was reported, and what was decided about the last report."""

    job: Job
    messages: "asyncio.Queue[EpochReport | Outcome]" = field(default_factory=asyncio.Queue)
    decision: "asyncio.Future[bool] | None" = None
    last_epoch: int = 0
    attempts: int = 0
    cancelled: bool = False
    ended: bool = False

    def decide(self, go_on: bool) -> None:
        if self.decision is not None and not self.decision.done():
            self.decision.set_result(go_on)
        self.decision = None


@dataclass
class _Slot:
    """What the mailbox knows of one slot; ``worker`` names the process that serves it now."""

    worker: str = ""
    holds: str | None = None
    served: int = 0
    last_end: float | None = None


class Mailbox:
    """Hands jobs to slots and messages back. An asyncio actor; its methods run interleaved."""

    def __init__(self) -> None:
        self._tickets: dict[str, _Ticket] = {}
        self._waiting: deque[str] = deque()
        self._slots: dict[int, _Slot] = {}
        self._changed = asyncio.Condition()
        self._closed = False
        self._error: str | None = None

    async def submit(self, job: Job) -> None:
        """Queue a job; jobs are served in the order of submission."""
        ticket = self._tickets[job.id] = _Ticket(job)
        if self._error is not None:
            self._end(ticket, Outcome(job_id=job.id, error=self._error, fatal=True))
            return
        self._waiting.append(job.id)
        async with self._changed:
            self._changed.notify_all()

    async def next_message(self, job_id: str) -> EpochReport | Outcome:
        """The job's next report, or its outcome as the last one; waits for it.

        Asking for the next report is the decision to go on after the one before.
        """
        ticket = self._tickets[job_id]
        ticket.decide(True)
        message = await ticket.messages.get()
        if isinstance(message, Outcome):
            self._tickets.pop(job_id, None)
        return message

    async def cancel(self, job_id: str) -> None:
        """Stop a job: at once if it waits or stands at the end of an epoch, else at the next."""
        ticket = self._tickets.get(job_id)
        if ticket is None or ticket.ended:
            return
        ticket.cancelled = True
        ticket.decide(False)
        if job_id in self._waiting:
            self._waiting.remove(job_id)
            self._end(ticket, Outcome(job_id=job_id, error="stopped before it started"))

    async def cancel_all(self) -> None:
        """Stop every job and wake everyone who waits for one: the study is interrupted."""
        for job_id, ticket in list(self._tickets.items()):
            await self.cancel(job_id)
            if not ticket.ended:
                ticket.messages.put_nowait(Outcome(job_id=job_id, error="interrupted"))

    async def take(self, slot: int, worker: str) -> Job | None:
        """The next job for a slot; waits for one. None when the study is over.

        A new ``worker`` in the slot means that the one before is gone: it is handed the job that
        the slot still holds, unless that job has lost too many workers already.
        """
        state = self._slots.setdefault(slot, _Slot())
        state.worker = worker
        async with self._changed:
            self._changed.notify_all()  # a poll that the dead worker left behind ends now
            held = self._tickets.get(state.holds) if state.holds is not None else None
            if held is not None and not held.ended:
                if not held.cancelled and held.attempts < MAX_ATTEMPTS:
                    held.attempts += 1
                    held.decide(True)
                    return held.job
                error = "stopped" if held.cancelled else f"lost its worker {MAX_ATTEMPTS} times"
                self._end(held, failure(held.job, error), state, slot)
            state.holds = None
            await self._changed.wait_for(
                lambda: self._closed or bool(self._waiting) or state.worker != worker
            )
            if self._closed or state.worker != worker:
                return None
            state.holds = self._waiting.popleft()
        ticket = self._tickets[state.holds]
        ticket.attempts += 1
        return ticket.job

    async def report(self, job_id: str, report: EpochReport) -> bool:
        """An epoch is over; waits for the decision and returns whether to go on.

        After the last epoch nothing is left to decide, so the evaluation starts at once. An epoch
        that was reported before its worker died is not reported again.
        """
        ticket = self._tickets.get(job_id)
        if ticket is None or ticket.ended or ticket.cancelled:
            return False
        if report.epoch <= ticket.last_epoch:
            return True
        ticket.last_epoch = report.epoch
        decision = ticket.decision = asyncio.get_running_loop().create_future()
        ticket.messages.put_nowait(report)
        if report.epoch >= report.epochs:
            return True
        return await decision

    async def finish(self, slot: int, outcome: Outcome) -> None:
        """A job is done; only the first outcome of a job counts."""
        state = self._slots.setdefault(slot, _Slot())
        ticket = self._tickets.get(outcome.job_id)
        if outcome.fatal and outcome.error is not None:
            await self.fail(outcome.error)
        if ticket is not None and not ticket.ended:
            self._end(ticket, outcome, state, slot)
        if state.holds == outcome.job_id:
            state.holds = None

    async def fail(self, error: str) -> None:
        """Nothing can run any more: end every job with ``error``, and those still to come."""
        self._error = error
        self._waiting.clear()
        for ticket in list(self._tickets.values()):
            if not ticket.ended:
                self._end(ticket, Outcome(job_id=ticket.job.id, error=error, fatal=True))

    async def error(self) -> str | None:
        """The sentence that ended the study, if one did."""
        return self._error

    async def closed(self) -> bool:
        """Whether the study is over."""
        return self._closed or self._error is not None

    async def close(self) -> None:
        """Send the workers home."""
        self._closed = True
        async with self._changed:
            self._changed.notify_all()

    def _end(
        self, ticket: _Ticket, outcome: Outcome, state: _Slot | None = None, slot: int = -1
    ) -> None:
        ticket.ended = True
        ticket.decide(False)
        if ticket.cancelled:
            self._tickets.pop(ticket.job.id, None)
        if state is not None:
            now = time.monotonic()
            cycle_s = None if state.last_end is None else now - state.last_end
            outcome = outcome.model_copy(
                update={"slot": slot, "served": state.served, "cycle_s": cycle_s}
            )
            state.served += 1
            state.last_end = now
        ticket.messages.put_nowait(outcome)


def failure(job: Job, error: str, lost: bool = False) -> Outcome:
    """A failed or lost outcome in the form that the job's kind calls for."""
    result = None
    if job.kind == "trial" and not lost:
        result = TrialResult(trial_id=job.id, status="failed", error=error)
    return Outcome(job_id=job.id, result=result, error=error, lost=lost)
