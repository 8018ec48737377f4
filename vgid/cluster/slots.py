"""Ray Train in resident slots: one Train run serves the trials of a whole study.

Starting a Train run costs a dozen seconds (controller, placement group, worker, imports) and the
loading of the base model. So a slot, the resources of one trial, holds one run for the study; its
workers keep a session (base model, encoded data) and take one job after the other from the
mailbox. A worker that dies restarts inside the same run and goes on with the job that it held.

Only the workers import torch; with several a slot, Ray's side of them does too.
"""

import asyncio
import contextlib
import importlib
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from vgid.cluster.losses import BROKEN_ACCELERATOR, blame, is_a, where
from vgid.cluster.mailbox import Job, Mailbox, Outcome, Traffic
from vgid.cluster.resources import CPUS_PER_WORKER, SlotShape
from vgid.cluster.shared import Shared
from vgid.config import RequestConfig
from vgid.errors import InputError
from vgid.results import EpochReport

if TYPE_CHECKING:
    from vgid.trial import TrialSession

CALLS = 100_000
"""How many calls the mailbox serves at a time. Each slot and each trial in flight polls with one,
and when all were taken, nothing else got in, not even an interruption."""

MOST = 256
"""How many slots a study may grow to, if it does not start with more: a thread each."""

IDLE_S = 60.0
"""How long a slot has nothing to do until it is given back, and its node may be taken away."""

ORPHANS_S = 2.0
"""How long workers may outlive the controller that started them, until Ray has ended them."""

TRAIN_SETTINGS = {
    # How often a controller looks after its workers: what a killed worker waits at most.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # It looks out for nodes that are about to go, from a process a slot that stands on any of them:
    # one with such a guest never goes. Workers whose node is gone restart on another without it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Each controller would configure the logging of the process that all of them share; two at a
    # time wait for each other's locks for ever.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}


# With several workers each has a session, and all are called alike; the session itself sees to it
# that ``on_epoch`` is asked on rank 0 only and that all ranks follow the answer.
SessionFactory = Callable[[RequestConfig, int, int], "TrialSession"]


def trial_session(request: RequestConfig, rank: int, world_size: int) -> "TrialSession":
    """The real session; imported here, in the worker, because it brings torch along."""
    import torch

    from vgid.trial import TrialSession

    torch.set_num_threads(CPUS_PER_WORKER)
    return TrialSession(request, rank, world_size)


# On the driver's node, since a study cannot outlive that one anyway: on another node the mailbox
# would be one more thing to lose.
def start_mailbox() -> Any:
    """The handle of the study's mailbox, on this node and outside all resource counting.

    When its process dies Ray starts it again, and repeats the calls that were under way.
    """
    return ray.remote(max_concurrency=CALLS, **_immortal())(Mailbox).remote()


def _immortal() -> dict[str, Any]:
    """Options of an actor on this node that Ray starts again whenever it dies."""
    node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return {"num_cpus": 0, "label_selector": node, "max_restarts": -1, "max_task_retries": -1}


class Slots:
    """The slots of a study; their Ray Train runs are held by one actor outside the driver.

    So the driver imports no torch for them, and can end or be interrupted at any moment: what
    Ray Train has started dies with the actor. They start at once, and serve jobs as they come up;
    ``count``, how many jobs are to run at a time, then follows the cluster.

    Args:
        mailbox: handle of the mailbox actor.
        request: what every session is made from.
        storage: folder for Ray Train's own files, shared by all nodes.
        fresh: start a new Train run after every trial instead of keeping one.
        session: makes the workers' sessions; without it, ``trial_session`` does.

    Raises:
        InputError: a node does not see what it must (``vgid.cluster.shared``); nothing was started.
    """

    def __init__(
        self,
        mailbox: Any,
        request: RequestConfig,
        shape: SlotShape,
        count: int,
        storage: Path,
        fresh: bool = False,
        session: SessionFactory | None = None,
    ) -> None:
        self.mailbox = mailbox
        self._shape = shape
        self.count = count
        self._storage = storage
        shared = Shared.by(storage, request)
        shared.check(shape)
        self._loop = {"mailbox": mailbox, "request": request, "fresh": fresh, "shared": shared}
        self._loop["session"] = session or trial_session
        # A thread for each slot, which holds it for as long as it has something to do.
        threads = max(count, MOST)
        self._host = ray.remote(max_concurrency=threads, **_immortal())(_SlotHost).remote(shape)
        self._held: list[Any] = []
        self._open(count)

    def follow(self, traffic: Traffic, count: int) -> None:
        """From now on run ``count`` jobs at a time: with more slots if jobs wait for one.

        Slots that have nothing to do are given back, and with them their place in the cluster.
        """
        self.count = count
        ended, _ = ray.wait(self._held, num_returns=len(self._held), timeout=0)
        there = len(self._held) - len(ended) + len(traffic.given_up)
        self._open(min(count, len(traffic.held) + len(traffic.waiting)) - there)
        self.mailbox.release.remote(IDLE_S)

    def _open(self, more: int) -> None:
        # Under numbers of their own: of a slot that was given back the mailbox wants no more.
        for slot in range(len(self._held), len(self._held) + more):
            self._held.append(self._host.hold.remote(slot, self._storage, self._loop))

    def close(self, timeout_s: float = 10.0) -> None:
        """Send the workers home, wait for their Train runs to end, and end those that do not.

        The mailbox ends too, which would live as long as the Ray job; that may run many studies.
        """
        with contextlib.suppress(ray.exceptions.RayError):
            asked = [self.mailbox.traffic.remote(), self.mailbox.close.remote()]
            traffic, _ = ray.get(asked, timeout=timeout_s)
            # Not for one without workers: its node may be gone.
            held = [end for slot, end in enumerate(self._held) if slot not in traffic.down]
            if held and timeout_s > 0:
                ray.wait(held, num_returns=len(held), timeout=timeout_s)
        ray.kill(self._host)
        with contextlib.suppress(ray.exceptions.RayError):
            _give_back(self._shape)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.mailbox)


# Starting a run costs a dozen seconds and a trial on tiny-llava seven, so a run a trial would spend
# most of a study on starting.
#
#   driver (no torch) -- host actor -- thread of slot 0: Train's controller -- workers (torch)
#                                  \-- thread of slot 1: Train's controller -- workers
#
# Who dies takes along what is to the right; what it hangs on (for the host: Ray) starts it again.
class _SlotHost:
    """Holds the Train runs, a thread each. When it dies they die too, and it starts them again."""

    def __init__(self, shape: SlotShape) -> None:
        # Here and not as Ray's `runtime_env`, for which it would start a Python of its own.
        os.environ.update(TRAIN_SETTINGS)
        # Once and not in each thread: Ray's packages import each other in circles.
        self._trainer = _trainer(shape.workers)
        self._shape = shape
        self._placed: dict[int, str] = {}
        _give_back(self._shape, self._placed.values())

    def hold(self, slot: int, storage: Path, loop: dict[str, Any]) -> None:
        """Keep a slot running for as long as the mailbox wants it."""
        mailbox = loop["mailbox"]
        ray.get(mailbox.free.remote(slot))
        run = 0
        while ray.get(mailbox.wants.remote(slot)):
            try:
                self._fit(slot, run, storage, loop)
            except Exception as error:
                traceback.print_tb(error.__traceback__)
                # Before anything is given back: until Ray has noticed, the dead controller's
                # workers still use it.
                time.sleep(ORPHANS_S)
                self._placed.pop(slot, None)
                _give_back(self._shape, self._placed.values())
                ray.get(mailbox.free.remote(slot, where(error)))
            run += 1

    def _fit(self, slot: int, run: int, storage: Path, loop: dict[str, Any]) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        self._trainer(
            serve,
            train_loop_config={**loop, "slot": slot},
            scaling_config=ScalingConfig(
                num_workers=self._shape.workers,
                use_gpu=self._shape.gpus_per_worker > 0,
                resources_per_worker=self._shape.per_worker,
            ),
            run_config=RunConfig(
                # A host that was started again counts its runs from 0, and Train would go on with a
                # name that it knows.
                name=f"slot-{slot}-{run}-{secrets.token_hex(3)}",
                storage_path=str(storage),
                # The mailbox counts, and sends home the workers of a slot that is given up.
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[_tells(self._placed, loop["mailbox"], slot)],
            ),
        ).fit()


def _give_back(shape: SlotShape, but: Collection[str] = ()) -> None:
    """Give back what controllers had reserved for slots of a shape, and that are dead.

    Ray does so when the whole job ends, which may run further studies; its Train does so for
    groups whose workers came up. A group that is starting meanwhile may be hit; Ray Train starts
    it again. Those of the ids ``but`` are in use.
    """
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    bundles = [shape.per_worker] * shape.workers
    for name, row in ray.util.placement_group_table().items():
        mine = name.endswith(job) and list(row["bundles"].values()) == bundles
        if mine and row["state"] != "REMOVED" and name not in but:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _trainer(workers: int) -> Any:
    """Ray Train's trainer, with its controller in this process.

    One worker has no use for a process group, nor Ray for torch then.
    """
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

    if workers > 1:
        plain = importlib.import_module("ray.train.torch").TorchTrainer
    else:
        plain = importlib.import_module(
            "ray.train.v2.api.data_parallel_trainer"
        ).DataParallelTrainer
        _without_synchronisation()

    class Waiting(FixedScalingPolicy):
        # Ray's own tells an autoscaler what it needs, through a process of its own. A placement
        # group that waits for its place tells it too.
        def after_controller_start(self, train_run_context: Any) -> None: ...
        def _maybe_send_resource_request(self) -> None: ...

    class Trainer(plain):  # type: ignore[valid-type,misc]
        # Ray's own starts a process for it: 130 MB a slot, all of them on the driver's node, and a
        # second of a core before the first trial. A controller waits for its workers, and no more.
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            parts["scaling_policy"] = Waiting(self.scaling_config)
            controller = TrainController(**parts)
            asyncio.run(controller.run())
            return controller.get_result()

        def _create_default_callbacks(self) -> list[Any]:
            # Each holds a process of 120 MB a slot, and a second of a core before the first trial.
            # There are no Ray datasets here, and what dead controllers leave `_give_back` gives
            # back; Ray's own cleaner takes a controller that a second cluster of the machine does
            # not know for dead.
            idle = DatasetsCallback, PlacementGroupCleanerCallback
            return [each for each in super()._create_default_callbacks() if type(each) not in idle]

    return Trainer


def _without_synchronisation() -> None:
    """In this process Ray Train starts no actor at which the workers of a group meet.

    A lone worker meets nobody, and each such actor takes 120 MB of the driver's node.
    """
    from ray.train.v2._internal.execution.worker_group import state, worker_group

    class Nobody:
        @classmethod
        def options(cls, **_: Any) -> type["Nobody"]:
            return cls

        @classmethod
        def remote(cls, **_: Any) -> "Nobody":
            return cls()

    worker_group.SynchronizationActor = Nobody
    state._shutdown_sync_actor = lambda nobody: None


def _tells(placed: dict[int, str], mailbox: Any, slot: int) -> Any:
    """A callback of a Train run: notes where a group of workers is placed, tells when it goes.

    So a slot whose node does not come back keeps no job from the others while it waits for one; nor
    does it wait when it is not wanted any more. Before its workers meet, it tells them by which
    network.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Tells(WorkerGroupCallback):
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            # Called each minute while it waits for its place: Train gives up and asks again.
            if not ray.get(mailbox.wants.remote(slot)):
                raise RuntimeError(f"slot {slot} is not wanted any more")

        def before_init_train_context(self, workers: list[Any]) -> dict[str, Any]:
            if len(workers) > 1:
                ray.get([worker.execute_async(_meet_by_rays_network) for worker in workers])
            return {}

        def after_worker_group_start(self, worker_group: Any) -> None:
            group = worker_group.get_worker_group_state().placement_group_handle.placement_group
            placed[slot] = group.id.hex()

        def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
            ray.get(mailbox.free.remote(slot))

    return Tells()


def _meet_by_rays_network() -> None:
    # By itself gloo takes the network of the machine's own name. Many machines give that name to
    # loopback, where the workers of other nodes cannot be met.
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if ray.util.get_node_ip_address() in (each.address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def serve(config: dict[str, Any]) -> None:
    """The loop of one worker: take a job, do it, hand back its outcome, until sent home.

    Rank 0 talks to the mailbox; with several workers it shares what it was told, so that all
    ranks do the same. An exception fails the job, not the slot: the next job gets a new session.
    With several workers the others may hang in a collective then, whatever it was, so the rank
    that has it ends the job and then itself, and the whole group restarts. Whose fault an
    exception is says ``vgid.cluster.losses``.
    """
    # Ray's public one imports all of its Tune, to tell whether it was called in there.
    from ray.train.v2._internal.execution.context import get_train_context

    os.environ["OMP_WAIT_POLICY"] = "passive"  # torch, which reads it, comes with the session
    context = get_train_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    line = _Line(config["mailbox"], config["slot"], rank, alone=world_size == 1)
    session: TrialSession | None = None
    line.check(config["shared"])
    while (job := line.take()) is not None:
        started = time.monotonic()
        load_s = 0.0
        try:
            if session is None:
                session = config["session"](config["request"], rank, world_size)
                load_s = time.monotonic() - started
            outcome = _do(job, session, line)
        except Exception as raised:
            error = ConnectionError() if world_size > 1 and _group_is_gone() else raised
            error = error.with_traceback(raised.__traceback__)
            folders = [config["request"].store]
            if job.adapter is not None:
                folders.append(job.adapter.parent.parent)
            outcome = blame(job, error, session is not None, folders)
            if outcome.lost or not isinstance(error, InputError):
                traceback.print_tb(error.__traceback__)
                session = None
                torch = sys.modules.get("torch")
                if torch is not None and torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if world_size > 1 or is_a(error, BROKEN_ACCELERATOR):
                line.finish(outcome, any_rank=True)
                raise RuntimeError(where(error)) from None  # its message may quote an answer
        line.finish(outcome.model_copy(update={"load_s": load_s}))
        if config["fresh"] and job.kind == "trial":
            return


def _group_is_gone() -> bool:
    # When a node dies Ray Train takes the group apart under the workers that are left. What they
    # raise then, of whatever kind, is not the trial's.
    from torch.distributed import is_initialized

    return not is_initialized()


# The token tells the mailbox a new process of a slot from the one before, whose last poll may still
# be open: a job that is handed to the dead is lost for as long as the study runs.
@dataclass
class _Line:
    """A worker's line to the mailbox, the same on every rank."""

    mailbox: Any
    slot: int
    rank: int
    alone: bool
    worker: str = field(default_factory=lambda: secrets.token_hex(8))

    def check(self, shared: Shared) -> None:
        """Give the slot up for a node that does not see what it must, before it takes a job."""
        fault = shared.fault()
        if fault is not None:
            ray.get(self.mailbox.give_up.remote(self.slot, fault))
        if not self.alone:  # nobody takes a job until all have looked
            from ray.train.collective import barrier

            barrier()

    def take(self) -> Job | None:
        job: Job | None = None
        if self.rank == 0:
            job = ray.get(self.mailbox.take.remote(self.slot, self.worker))
        if self.alone:
            return job
        # Ray's own broadcast has no timeout: an idle slot may wait for hours.
        from ray.train.collective import broadcast_from_rank_zero

        return broadcast_from_rank_zero(job)

    def report(self, job_id: str, report: EpochReport) -> bool:
        return bool(ray.get(self.mailbox.report.remote(self.slot, job_id, report)))

    def finish(self, outcome: Outcome, any_rank: bool = False) -> None:
        if self.rank == 0 or any_rank:
            ray.get(self.mailbox.finish.remote(self.slot, outcome))


def _do(job: Job, session: "TrialSession", line: _Line) -> Outcome:
    if job.kind == "base":
        scores = session.base_scores(job.part, job.seed)
        precision = getattr(session, "precision", None)  # of a session that has a model
        content = {} if precision is None else {"precision": precision}
        return Outcome(job_id=job.id, scores=scores, content=content)
    assert job.adapter is not None
    if job.kind == "rescore":
        return Outcome(job_id=job.id, scores=session.rescore(job.adapter, job.part, job.seed))
    assert job.trial is not None
    result = session.run(
        job.trial,
        job.id,
        job.adapter,
        on_epoch=lambda report: line.report(job.id, report),
        checkpoint_dir=job.checkpoints,
    )
    return Outcome(job_id=job.id, result=result, error=result.error)
