"""What many slots cost beside their trials; part of ``python -m tests.benchmarks.driver``.

A cluster, a mailbox and a driver are real. The slots are coroutines of one actor that take jobs,
report three epochs and end them as workers do, without a session; one in fifty dies on the way and
starts again. Ray Tune's side of each trial (``vgid.cluster.tune.SlotTrial``) is a thread of the
driver, for 200 of Tune's processes would take 26 GB; with ``--tune`` it is Tune with its processes.
Reported are the CPU seconds of a trial by process, with proposals, and each one's peak memory.
"""

import asyncio
import os
import random
import secrets
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from tests.benchmarks.driver import Driver, made_up
from vgid.config import StudyConfig
from vgid.results import EpochReport

EPOCHS = 3
EPOCH_S = 0.5
DEATHS = 0.02


class FakeSlots:
    """Slots without workers; an actor."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.deaths = 0

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def counts(self) -> tuple[dict[str, int], int]:
        """How often each job was ended, and how often a worker died."""
        return dict(self.ended), self.deaths

    async def serve(self, mailbox: Any, slots: int) -> None:
        """Serve jobs in so many slots until sent home."""
        await asyncio.gather(*(self._serve(mailbox, slot) for slot in range(slots)))

    async def _serve(self, mailbox: Any, slot: int) -> None:
        await mailbox.free.remote(slot)
        worker, rng = secrets.token_hex(8), random.Random(slot)
        while (job := await mailbox.take.remote(slot, worker)) is not None:
            for epoch in range(1, EPOCHS + 1):
                await asyncio.sleep(EPOCH_S * rng.uniform(0.5, 1.5))
                report = EpochReport(epoch=epoch, epochs=EPOCHS, step=epoch, metrics={"loss": 1.0})
                await mailbox.report.remote(slot, job.id, report)
            if rng.random() < DEATHS:
                worker = secrets.token_hex(8)
                self.deaths += 1
                continue
            self.ended[job.id] += 1
            await mailbox.finish.remote(slot, made_up(job, random.Random(int(job.id))))


def in_threads(driver: Driver, mailbox: Any, slots: int) -> None:
    """Let the search run its trials as Ray Tune would, with a thread in place of each process."""
    from vgid.cluster.tune import SlotTrial
    from vgid.study.search import ParetoSearch

    free: list[Any] = []
    steps: dict[Future[Any], tuple[Any, Any]] = {}
    over = False
    with ThreadPoolExecutor(slots) as pool:
        while not over or steps:
            while not over and (config := driver.search.suggest(name := secrets.token_hex(4))):
                if config == ParetoSearch.FINISHED:
                    over = True
                    break
                trainable = free.pop() if free else SlotTrial.__new__(SlotTrial)
                if hasattr(trainable, "_job"):
                    trainable.reset_config(config)
                else:
                    trainable.setup(config, mailbox)
                trial = SimpleNamespace(config=config, last_result={}, name=name)
                steps[pool.submit(trainable.step)] = trial, trainable
            done, _ = wait(steps, timeout=0.1, return_when=FIRST_COMPLETED)
            for future in done:
                trial, trainable = steps.pop(future)
                trial.last_result = future.result()
                driver.recorder.on_trial_result(0, [], trial, trial.last_result)
                if trial.last_result.get("done"):
                    driver.search.on_trial_complete(trial.name)
                    driver.recorder.on_trial_complete(0, [], trial)
                    free.append(trainable)
                else:
                    steps[pool.submit(trainable.step)] = trial, trainable


def with_tune(driver: Driver, mailbox: Any, folder: Path) -> None:
    """Let Ray Tune run the search's trials."""
    from vgid.cluster.tune import run_trials

    run_trials(driver.search, mailbox, driver.verdicts, driver.recorder, lambda: False, folder)


def measure_slots(trials: int, slots: int, tune: bool, folder: Path) -> dict[str, Any]:
    """Run so many trials in so many slots; ``AssertionError`` if one is lost or counted twice."""
    import ray

    from vgid.cluster.connection import connected
    from vgid.cluster.slots import start_mailbox

    config = StudyConfig(output=folder / "study", trials=trials, sampler="random")
    with connected():
        driver = Driver(config, 0, slots=slots)
        mailbox = start_mailbox()
        fake = ray.remote(num_cpus=0, max_concurrency=slots + 2)(FakeSlots).remote()
        serving = fake.serve.remote(mailbox, slots)
        before = _processes()
        began = time.monotonic()
        if tune:
            with_tune(driver, mailbox, folder / "ray")
        else:
            in_threads(driver, mailbox, slots)
        took = time.monotonic() - began
        driver.end()
        spent = _processes()
        ray.get(mailbox.close.remote())
        ray.get(serving)
        ended, deaths = ray.get(fake.counts.remote())
        records = driver.ledger.records
        driver.close()
        _assert_each_once(records, ended, trials)
    found: dict[str, Any] = {"trials": trials, "slots": slots, "deaths": deaths, "s": round(took)}
    for name, (seconds, mib, count) in spent.items():
        cost = (seconds - before.get(name, (0.0, 0, 0))[0]) / trials
        found[name] = {"CPU s a trial": round(cost, 4), "peak MiB": mib, "processes": count}
    return found


def _assert_each_once(records: Any, ended: dict[str, int], trials: int) -> None:
    names = {f"{number:04d}" for number in range(trials)}
    assert set(records) == set(ended) == names
    assert set(ended.values()) == {1}
    assert all(record.result is not None for record in records.values())


def _processes() -> dict[str, tuple[float, int, int]]:
    """CPU seconds, sum of the peaks in MiB, and number of this driver's processes, by kind."""
    found: dict[str, list[tuple[float, int]]] = {}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            first = (process.cmdline() or [""])[0]
            title = first.split(".")[0] if first.startswith("ray::") else Path(first).name
            times = process.cpu_times()
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except (psutil.Error, OSError):
            continue
        peak = int(status.split("VmHWM:")[1].split()[0]) // 1024 if "VmHWM" in status else 0
        kind = "driver" if process == me else title
        found.setdefault(kind, []).append((times.user + times.system, peak))
    return {
        kind: (sum(s for s, _ in each), sum(mib for _, mib in each), len(each))
        for kind, each in found.items()
    }
