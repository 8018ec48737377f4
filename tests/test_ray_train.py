"""The mailbox and the worker's loop, run as plain asyncio and plain functions, without a cluster.

What needs real processes (kills, restarts, several workers) is in ``end_to_end``.
"""

import asyncio
from pathlib import Path

import pytest

from vgid.config import TrialConfig
from vgid.mailbox import MAX_ATTEMPTS, Job, Mailbox, Outcome
from vgid.plan import SlotShape
from vgid.ray_train import _do
from vgid.results import EpochReport, Score, TrialResult
from vgid.slot_memory import RAY_BYTES, WORKER_BYTES


def job(name="0000"):
    return Job(id=name, kind="trial", trial=TrialConfig(), adapter=Path("a"), checkpoints=Path("c"))


def report(epoch, epochs=3):
    return EpochReport(epoch=epoch, epochs=epochs, step=epoch, metrics={"loss": 1.0})


def done(name="0000"):
    return Outcome(job_id=name, result=TrialResult(trial_id=name, status="completed"))


def run(scenario):
    """Run a scenario against a new mailbox; what waits longer than it may is a failure."""

    async def bounded():
        return await asyncio.wait_for(scenario(Mailbox()), timeout=10)

    return asyncio.run(bounded())


async def waits(awaitable):
    """Whether something is still waiting after everybody else had a turn."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(20):
        await asyncio.sleep(0)
    return task, not task.done()


def test_jobs_are_served_in_order_and_a_slot_waits_for_the_next():
    async def scenario(mailbox):
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        assert (await mailbox.take(0, "w0")).id == "0000"
        assert (await mailbox.take(1, "w1")).id == "0001"
        await mailbox.finish(0, done("0000"))
        task, waiting = await waits(mailbox.take(0, "w0"))
        assert waiting
        await mailbox.submit(job("0002"))
        assert (await task).id == "0002"

    run(scenario)


def test_a_trial_gets_its_epochs_and_then_its_outcome_with_the_slots_timing():
    async def scenario(mailbox):
        await mailbox.submit(job("base"))
        await mailbox.take(0, "w")
        await mailbox.finish(0, done("base"))
        await mailbox.submit(job())
        await mailbox.take(0, "w")
        reporting = asyncio.ensure_future(mailbox.report("0000", report(1)))
        assert (await mailbox.next_message("0000")).epoch == 1
        assert not reporting.done()  # the decision is the question for the next report
        asking = asyncio.ensure_future(mailbox.next_message("0000"))
        assert await reporting is True
        await mailbox.finish(0, done())
        outcome = await asking
        assert outcome.result.status == "completed"
        assert (outcome.slot, outcome.served) == (0, 1)
        assert outcome.cycle_s >= 0

    run(scenario)


def test_the_last_epoch_does_not_wait_for_anyone():
    async def scenario(mailbox):
        await mailbox.submit(job())
        await mailbox.take(0, "w")
        assert await mailbox.report("0000", report(3)) is True

    run(scenario)


def test_a_stopped_trial_frees_its_slot_at_once():
    async def scenario(mailbox):
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        await mailbox.take(0, "w")
        reporting = asyncio.ensure_future(mailbox.report("0000", report(1)))
        await mailbox.next_message("0000")
        await mailbox.cancel("0000")
        assert await reporting is False
        await mailbox.finish(0, done("0000"))
        assert (await mailbox.take(0, "w")).id == "0001"
        # Stopped between two epochs: at the end of the one that runs.
        await mailbox.cancel("0001")
        assert await mailbox.report("0001", report(1)) is False

    run(scenario)


def test_a_trial_that_is_stopped_while_it_waits_never_reaches_a_slot():
    async def scenario(mailbox):
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        await mailbox.cancel("0000")
        assert (await mailbox.take(0, "w")).id == "0001"

    run(scenario)


def test_a_new_worker_is_handed_the_job_that_the_dead_one_held():
    async def scenario(mailbox):
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        await mailbox.take(0, "first")
        reporting = asyncio.ensure_future(mailbox.report("0000", report(1)))
        assert (await mailbox.next_message("0000")).epoch == 1
        assert (await mailbox.take(0, "second")).id == "0000"
        assert await reporting is True  # nobody hears it; it must not wait for ever
        # The epoch that was reported before the kill is not reported twice.
        assert await mailbox.report("0000", report(1)) is True
        reporting = asyncio.ensure_future(mailbox.report("0000", report(2)))
        assert (await mailbox.next_message("0000")).epoch == 2
        await mailbox.cancel("0000")
        assert await reporting is False

    run(scenario)


def test_the_poll_of_a_dead_worker_swallows_no_job():
    async def scenario(mailbox):
        stale, waiting = await waits(mailbox.take(0, "first"))
        assert waiting
        fresh, waiting = await waits(mailbox.take(0, "second"))
        assert waiting
        assert await stale is None
        await mailbox.submit(job())
        assert (await fresh).id == "0000"

    run(scenario)


def test_a_job_that_kills_every_worker_fails_and_the_slot_goes_on():
    async def scenario(mailbox):
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        for attempt in range(MAX_ATTEMPTS):
            assert (await mailbox.take(0, f"w{attempt}")).id == "0000"
        assert (await mailbox.take(0, "last")).id == "0001"
        outcome = await mailbox.next_message("0000")
        assert outcome.result.status == "failed"
        assert f"{MAX_ATTEMPTS} times" in outcome.result.error

    run(scenario)


def test_a_fatal_error_ends_all_jobs_and_those_to_come():
    async def scenario(mailbox):
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        await mailbox.take(0, "w")
        await mailbox.finish(0, Outcome(job_id="0000", error="no weights", fatal=True))
        await mailbox.submit(job("0002"))
        for name in ("0000", "0001", "0002"):
            outcome = await mailbox.next_message(name)
            assert (outcome.error, outcome.fatal) == ("no weights", True)
        assert await mailbox.error() == "no weights"

    run(scenario)


def test_closing_sends_waiting_workers_home():
    async def scenario(mailbox):
        task, waiting = await waits(mailbox.take(0, "w"))
        assert waiting
        await mailbox.close()
        assert await task is None
        assert await mailbox.take(1, "w") is None

    run(scenario)


def test_an_interruption_wakes_everyone_who_waits_for_a_trial():
    async def scenario(mailbox):
        await mailbox.submit(job())
        await mailbox.take(0, "w")
        asking = asyncio.ensure_future(mailbox.next_message("0000"))
        await asyncio.sleep(0)
        await mailbox.cancel_all()
        outcome = await asking
        assert outcome.result is None
        assert await mailbox.report("0000", report(1)) is False

    run(scenario)


class Line:
    """Records what a job reports."""

    def __init__(self):
        self.heard = []

    def report(self, job_id, epoch_report):
        self.heard.append((job_id, epoch_report.epoch))
        return True


class Session:
    """Answers each kind of job, as a real session does."""

    def run(self, trial, trial_id, adapter_dir, on_epoch=None, checkpoint_dir=None):
        assert (trial, adapter_dir, checkpoint_dir) == (TrialConfig(), Path("a"), Path("c"))
        on_epoch(report(1))
        return TrialResult(trial_id=trial_id, status="failed", error="the loss is NaN")

    def base_scores(self, part, seed):
        return {f"{part}-{seed}": Score(value=1.0, n=1, low=1.0, high=1.0)}

    def rescore(self, adapter_dir, part, seed):
        return {f"{adapter_dir}-{part}-{seed}": Score(value=1.0, n=1, low=1.0, high=1.0)}


def test_each_kind_of_job_is_done_by_its_own_call():
    line = Line()
    outcome = _do(job(), Session(), line)
    assert line.heard == [("0000", 1)]
    assert outcome.result.status == "failed"
    assert outcome.error == "the loss is NaN"
    assert list(_do(Job(id="b", kind="base", seed=5), Session(), line).scores) == ["search-5"]
    again = Job(id="r", kind="rescore", adapter=Path("a"), part="held_out", seed=5)
    assert list(_do(again, Session(), line).scores) == ["a-held_out-5"]


@pytest.mark.parametrize(
    ("shape", "resources"),
    [
        (SlotShape(), {"CPU": 1.0, "memory": float(RAY_BYTES + WORKER_BYTES)}),
        (
            SlotShape(workers=2, gpus_per_worker=0.5, worker_bytes=10**9),
            {"CPU": 1.0, "GPU": 0.5, "memory": 1e9 + RAY_BYTES // 2},
        ),
    ],
)
def test_resources_of_a_worker(shape, resources):
    assert shape.per_worker == resources
