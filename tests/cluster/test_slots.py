"""The mailbox and the worker's loop, run as plain asyncio and plain functions, without a cluster.

What needs real processes (kills, restarts, several workers) is in ``end_to_end``.
"""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from vgid.cluster import mailbox as mailbox_module
from vgid.cluster.mailbox import (
    MAX_ATTEMPTS,
    MAX_RESTARTS,
    RESTART_WINDOW_S,
    Job,
    Mailbox,
    Outcome,
    failure,
)
from vgid.cluster.resources import RAY_BYTES, WORKER_BYTES, SlotShape
from vgid.cluster.slots import _do
from vgid.config import TrialConfig
from vgid.results import EpochReport, Score, TrialResult


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
        reporting = asyncio.ensure_future(mailbox.report(0, "0000", report(1)))
        assert (await mailbox.next_message("0000")).epoch == 1
        assert not reporting.done()  # the decision is the question for the next report
        asking = asyncio.ensure_future(mailbox.next_message("0000"))
        assert await reporting is True
        await mailbox.finish(0, done())
        outcome = await asking
        assert outcome.result.status == "completed"
        assert outcome.slot == 0
        assert outcome.cycle_s >= 0

    run(scenario)


def test_the_last_epoch_does_not_wait_for_anyone():
    async def scenario(mailbox):
        await mailbox.submit(job())
        await mailbox.take(0, "w")
        assert await mailbox.report(0, "0000", report(3)) is True

    run(scenario)


def test_a_stopped_trial_frees_its_slot_at_once():
    async def scenario(mailbox):
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        await mailbox.take(0, "w")
        reporting = asyncio.ensure_future(mailbox.report(0, "0000", report(1)))
        await mailbox.next_message("0000")
        await mailbox.cancel("0000")
        assert await reporting is False
        await mailbox.finish(0, done("0000"))
        assert (await mailbox.take(0, "w")).id == "0001"
        # Stopped between two epochs: at the end of the one that runs.
        await mailbox.cancel("0001")
        assert await mailbox.report(0, "0001", report(1)) is False

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
        reporting = asyncio.ensure_future(mailbox.report(0, "0000", report(1)))
        assert (await mailbox.next_message("0000")).epoch == 1
        assert (await mailbox.take(0, "second")).id == "0000"
        assert await reporting is True  # nobody hears it; it must not wait for ever
        # The epoch that was reported before the kill is not reported twice.
        assert await mailbox.report(0, "0000", report(1)) is True
        reporting = asyncio.ensure_future(mailbox.report(0, "0000", report(2)))
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


def test_a_job_that_kills_every_worker_is_given_up_and_the_slot_goes_on():
    async def scenario(mailbox):
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        for attempt in range(MAX_ATTEMPTS):
            assert (await mailbox.take(0, f"w{attempt}")).id == "0000"
        assert (await mailbox.take(0, "last")).id == "0001"
        outcome = await mailbox.next_message("0000")
        assert (outcome.lost, outcome.result) == (True, None)
        assert f"{MAX_ATTEMPTS} times" in outcome.error
        # However often it comes back, it counts once against the slot.
        for again in range(3):
            await mailbox.submit(job("0000"))
            for attempt in range(MAX_ATTEMPTS):
                await mailbox.free(0)
                await mailbox.take(0, f"w{again}-{attempt}")
        assert await mailbox.wants(0)

    run(scenario)


def test_the_question_of_a_dead_listener_swallows_nothing():
    async def scenario(mailbox):
        await mailbox.submit(job(), "first")
        await mailbox.take(0, "w")
        dead, waiting = await waits(mailbox.next_message("0000", "first"))
        assert waiting
        await mailbox.submit(job(), "second")  # on its way: it goes on
        asking, waiting = await waits(mailbox.next_message("0000", "second"))
        assert waiting
        assert (await dead).lost
        reporting = asyncio.ensure_future(mailbox.report(0, "0000", report(1)))
        assert (await asking).epoch == 1
        await mailbox.cancel("0000", "first")  # a late word of the first is not heeded
        asking = asyncio.ensure_future(mailbox.next_message("0000", "second"))
        assert await reporting is True
        await mailbox.finish(0, done())
        assert (await asking).result.status == "completed"

    run(scenario)


def test_what_only_the_dead_have_heard_is_told_again():
    async def scenario(mailbox):
        await mailbox.submit(job(), "zeroth")
        asking = asyncio.ensure_future(mailbox.next_message("0000", "zeroth"))
        await mailbox.take(0, "w")
        reporting = asyncio.ensure_future(mailbox.report(0, "0000", report(1)))
        assert (await asking).epoch == 1
        await mailbox.submit(job(), "first")
        assert (await mailbox.next_message("0000", "first")).epoch == 1
        asking = asyncio.ensure_future(mailbox.next_message("0000", "first"))
        assert await reporting is True
        await mailbox.finish(0, done())
        assert (await asking).result.status == "completed"
        await mailbox.submit(job(), "second")
        assert (await mailbox.next_message("0000", "second")).result.status == "completed"
        # Once it is done with, the same job would run anew.
        await mailbox.cancel("0000", "second")
        await mailbox.submit(job(), "third")
        assert (await mailbox.take(0, "w")).id == "0000"

    run(scenario)


def test_a_lost_job_runs_anew_when_it_is_submitted_again():
    async def scenario(mailbox):
        await mailbox.submit(job(), "first")
        await mailbox.take(0, "w")
        await mailbox.finish(0, Outcome(job_id="0000", error="no space", lost=True))
        assert (await mailbox.next_message("0000", "first")).lost
        await mailbox.submit(job(), "second")
        assert (await mailbox.take(0, "w")).id == "0000"

    run(scenario)


def test_what_a_slot_held_goes_to_another_when_its_workers_are_gone():
    async def scenario(mailbox):
        for slot in (0, 1):
            await mailbox.free(slot)
        await mailbox.submit(job("0000"))
        await mailbox.take(0, "w0")
        poll, waiting = await waits(mailbox.take(1, "w1"))
        assert waiting
        reporting = asyncio.ensure_future(mailbox.report(0, "0000", report(1)))
        assert (await mailbox.next_message("0000")).epoch == 1
        await mailbox.free(0)
        assert await reporting is True
        assert (await poll).id == "0000"
        # What is left of the first slot's worker neither goes on nor ends the job.
        assert await mailbox.report(0, "0000", report(2)) is False
        await mailbox.finish(0, failure(job("0000"), "killed"))
        assert (await mailbox.traffic()).held == {1: "0000"}
        await mailbox.finish(1, done("0000"))
        assert (await mailbox.next_message("0000")).slot == 1

    run(scenario)


def test_a_slot_that_cannot_serve_takes_no_job_and_without_any_other_ends_the_study():
    async def scenario(mailbox):
        for slot in (0, 1):
            await mailbox.free(slot)
        await mailbox.submit(job("0000"))
        await mailbox.submit(job("0001"))
        await mailbox.give_up(0, "node 2 does not see it")
        assert await mailbox.take(0, "w0") is None
        assert not await mailbox.wants(0)
        await mailbox.free(0)  # its workers went home
        traffic = await mailbox.traffic()
        assert (traffic.given_up, traffic.faults) == ((0,), ("node 2 does not see it",))
        assert traffic.waiting == ("0000", "0001")
        assert (await mailbox.take(1, "w1")).id == "0000"
        await mailbox.finish(1, done("0000"))
        await mailbox.give_up(1, "node 3 does not see it")
        outcome = await mailbox.next_message("0001")
        assert (outcome.fatal, outcome.lost) == (True, True)
        assert outcome.error == "node 3 does not see it"

    run(scenario)


def test_a_slot_that_restarts_too_often_is_given_up_and_without_any_the_study_ends(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(mailbox_module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def scenario(mailbox):
        for slot in (0, 1):
            await mailbox.free(slot)
        for number in range(50):
            await mailbox.submit(job(f"{number:04d}"))
        for _ in range(3):  # spread over time, or after jobs that have ended, it may go on for ever
            clock.now += RESTART_WINDOW_S
            for number in range(MAX_RESTARTS):
                await lose_another(mailbox, number)
        for _ in range(MAX_RESTARTS):
            taken = await mailbox.take(0, "w")
            await mailbox.finish(0, done(taken.id))
            await mailbox.free(0)
        assert await mailbox.wants(0)
        await lose_another(mailbox, MAX_RESTARTS)
        assert not await mailbox.wants(0)
        assert await mailbox.take(0, "w") is None
        assert (await mailbox.traffic()).given_up == (0,)
        assert await mailbox.wants(1)
        await mailbox.free(1)
        for _ in range(MAX_RESTARTS + 1):  # not even a worker comes up
            clock.now += 1
            await mailbox.free(1, "ImportError at y.py:2")
        outcome = await mailbox.next_message("0049")
        assert "every slot" in outcome.error
        assert "ImportError at y.py:2" in outcome.error
        assert (outcome.fatal, outcome.lost, outcome.result) == (True, True, None)

    async def lose_another(mailbox, number):
        """Slot 0 loses its worker in a job that slot 1 then does."""
        lost = await mailbox.take(0, f"killed-{number}")
        await mailbox.free(0)
        assert (await mailbox.take(1, "w1")).id == lost.id
        await mailbox.finish(1, done(lost.id))

    run(scenario)


def test_a_mailbox_that_was_started_again_knows_nothing_and_holds_nobody():
    async def scenario(mailbox):
        assert (await mailbox.next_message("0000", "trial")).lost
        assert await mailbox.report(0, "0000", report(1)) is False
        await mailbox.finish(0, done())
        poll, waiting = await waits(mailbox.take(0, "w"))
        assert waiting
        await mailbox.submit(job(), "trial")
        assert (await poll).id == "0000"

    run(scenario)


def test_what_waits_without_a_slot_can_be_sent_back():
    async def scenario(mailbox):
        base = Job(id="base-search", kind="base")
        await mailbox.submit(job("0000"))
        await mailbox.take(0, "w")
        for waiting in (job("0001"), base):
            await mailbox.submit(waiting)
        await mailbox.drop_waiting("out of time")
        outcome = await mailbox.next_message("0001")
        assert (outcome.error, outcome.lost, outcome.fatal) == ("out of time", True, False)
        assert (await mailbox.traffic()).waiting == ("base-search",)  # a slot works: its turn comes
        await mailbox.finish(0, done("0000"))
        await mailbox.free(0)
        await mailbox.drop_waiting("out of time")
        assert (await mailbox.next_message("base-search")).error == "out of time"

    run(scenario)


def test_slots_without_anything_to_do_are_let_go_of_but_for_one(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(mailbox_module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def scenario(mailbox):
        for slot in range(5):
            await mailbox.free(slot)
        await mailbox.submit(job("0000"))
        assert (await mailbox.take(0, "w0")).id == "0000"
        polls = [(await waits(mailbox.take(slot, f"w{slot}")))[0] for slot in (1, 2)]
        clock.now = 59.0
        await mailbox.release(60.0)
        assert (await mailbox.traffic()).down == (3, 4)
        await mailbox.submit(job("0001"))
        assert (await polls[0]).id == "0001"
        await mailbox.submit(job("0002"))
        assert (await polls[1]).id == "0002"
        await mailbox.submit(job("0003"))
        clock.now = 60.0
        await mailbox.release(60.0)  # one is to come up for the job that waits
        traffic = await mailbox.traffic()
        assert (len(traffic.held), len(traffic.down)) == (3, 1)
        (left,) = traffic.down
        (gone,) = {3, 4} - {left}
        assert await mailbox.take(gone, "late") is None
        assert not await mailbox.wants(gone)
        await mailbox.free(gone)  # its workers have gone home
        assert (await mailbox.traffic()).down == (left,)
        for slot, name in enumerate(("0000", "0001", "0002")):
            await mailbox.finish(slot, done(name))
        assert (await mailbox.take(1, "w1")).id == "0003"
        polls = [(await waits(mailbox.take(slot, f"w{slot}")))[0] for slot in (0, 2)]
        clock.now = 119.0
        await mailbox.release(60.0)  # 0 and 2 were busy 59 s ago; what never came up goes
        traffic = await mailbox.traffic()
        assert (traffic.held, traffic.idle, traffic.down) == ({1: "0003"}, (0, 2), ())
        clock.now = 120.0
        await mailbox.release(60.0)
        assert [await poll for poll in polls] == [None, None]
        await mailbox.finish(1, done("0003"))
        clock.now = 1000.0
        await mailbox.release(60.0)  # the last one stays, whatever comes
        assert await mailbox.wants(1)

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
        assert await mailbox.report(0, "0000", report(1)) is False

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
    real = Session()
    real.precision = "float32"
    assert _do(Job(id="b", kind="base"), real, line).content == {"precision": "float32"}
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
