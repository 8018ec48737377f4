"""The Ray cluster of a study: joined if there is one, otherwise started on this machine.

Ray is imported late: where it listens is settled when it is imported.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vgid.cluster.resources import SlotShape, told
from vgid.errors import InputError
from vgid.interrupts import sigterm_kept

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has it all
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial lacks the metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the study has its own
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # what a trial that hears nothing any more may cost
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the ledger is the record, not Tune's snapshots
    # With a searcher of one's own, Tune lets one trial at a time wait for its process, and slots
    # would come to work one after the other. The search itself knows how many there are.
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    "TUNE_WARN_THRESHOLD_S": "10",
    "OMP_WAIT_POLICY": "passive",
}
ALONE = {
    # Every process listens on loopback only. What Ray does by itself on Windows and macOS, where it
    # makes no clusters; elsewhere it would be on all interfaces, if only for those with the token.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Further settings of a cluster of one node."""

TOKEN = Path("~/.ray/auth_token")
"""The token that Ray makes where there is none, and writes for everyone on the machine to read."""

WORDS = {"CPU": "cores", "GPU": "GPUs", "memory": "memory"}
STATUS_S = 5.0  # how long the cluster may take to say what its autoscaler cannot serve

LOCAL: dict[str, Any] = {
    "address": "local",
    "include_dashboard": False,
    "dashboard_host": "127.0.0.1",
    # Messages between actors are small; Ray would otherwise reserve a third of the memory.
    "object_store_memory": 256 * 2**20,
}


@contextmanager
def connected() -> Iterator[bool]:
    """Join the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), or start one.

    A cluster that is started here lives as long as the block, asks for Ray's token, and listens on
    loopback only, unless Ray was imported before in this process.

    Yields:
        Whether the cluster was joined.

    Raises:
        InputError: the cluster cannot be reached, or does not start.
    """
    before = os.environ.get("RAY_ADDRESS") or None  # set and empty, it names no cluster
    for name, value in (QUIET if before else QUIET | ALONE).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield True
        return
    if before:
        _check_token(before)
    try:
        # Ray takes SIGTERM for itself when it starts.
        with sigterm_kept(), contextlib.nullcontext() if before else _no_idle_processes():
            local = {} if before else LOCAL
            context = ray.init(logging_level=logging.ERROR, log_to_driver=False, **local)
    except Exception as error:  # a bare one where Ray's own patience is over
        ray.shutdown()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"ray: the cluster at RAY_ADDRESS {before} cannot be reached ({type(error).__name__}); "
            "check it with `ray status`."
            if before
            else f"ray: a local Ray cluster did not start ({reason}); the machine may be busy, or "
            "short of memory or of space in the temporary folder. Give the same command again."
        ) from None
    if not before:
        with contextlib.suppress(OSError):  # another is in use, or none
            TOKEN.expanduser().chmod(0o600)
    # Train controllers and Tune look the cluster up by this.
    os.environ["RAY_ADDRESS"] = before or context.address_info["gcs_address"]
    try:
        yield before is not None
    finally:
        ray.shutdown()
        if before is None:
            os.environ.pop("RAY_ADDRESS", None)


# Ray's own options start them all. The log monitor hands on what workers print, which is not asked
# for here; the monitor finds nodes, which a cluster on loopback cannot have; and the dashboard
# without its pages reports usage, which is off. To see that the dashboard could start, the driver
# imports its libraries.
@contextmanager
def _no_idle_processes() -> Iterator[None]:
    """In the block Ray starts no process that does nothing for one driver on one machine."""
    from ray._private import node, utils

    left_out = [
        (node.Node, "start_log_monitor"),
        (node.Node, "start_monitor"),
        (node.Node, "start_api_server"),
        (utils, "get_dashboard_dependency_error"),
    ]
    own = [getattr(owner, name) for owner, name in left_out]
    for owner, name in left_out:
        setattr(owner, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for (owner, name), function in zip(left_out, own, strict=True):
            setattr(owner, name, function)


def _check_token(address: str) -> None:
    """Ask a cluster whether it takes this process's token: Ray says in 20 s that it cannot connect.

    Any other reason why nobody answers is left to Ray.
    """
    import grpc
    from ray._private.authentication import authentication_token_setup
    from ray._private.gcs_utils import create_gcs_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    if address == "auto":  # as Ray does, for this address alone
        authentication_token_setup.maybe_enable_token_auth_if_token_available(False)
    refused = False
    try:
        with create_gcs_channel(canonicalize_bootstrap_address(address)) as channel:
            node = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            node.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=5)
    except AuthenticationError:  # there is none to show
        refused = True
    except Exception as error:
        status = error.code() if isinstance(error, grpc.RpcError) else None
        refused = status is grpc.StatusCode.UNAUTHENTICATED
    if refused:
        raise InputError(
            f"ray: the cluster at RAY_ADDRESS {address} wants a token that this process does not "
            "show; set RAY_AUTH_MODE=token, and have the cluster's token in RAY_AUTH_TOKEN or "
            "~/.ray/auth_token."
        )


def capacity(shape: SlotShape, names: Iterable[str] | None = None) -> int:
    """How many slots of this shape the nodes hold now, by the resources of these names or by all.

    A slot may span nodes. Memory is what was free on a node when Ray started there, by the limit of
    its container if it has one.
    """
    return sum(shape.fits(node, names) for node in _nodes()) // shape.workers


def slot_count(shape: SlotShape, wanted: int | None, trials: int, joined: bool) -> tuple[int, str]:
    """How many slots a study may have now, and what decides it, in words.

    It gets as many as the cluster's nodes hold, of those that are ``wanted`` (``--max-concurrent``,
    or None for ``auto``), and one a trial at most. On a cluster that was ``joined``, what is wanted
    is asked for whatever the nodes hold: an autoscaler brings others, or they join by themselves.
    """
    limits = {"the number of trials": max(1, trials)}
    if wanted is not None:
        limits["--max-concurrent"] = wanted
    if wanted is None or not joined:
        limits[WORDS[_short(shape)]] = capacity(shape)
    decider = min(limits, key=lambda name: limits[name])
    return limits[decider], decider


def lacking(shape: SlotShape, wanted: int | None) -> str:
    """What the cluster lacks for a single slot, in one sentence that says what it has."""
    short, nodes = _short(shape), _nodes()
    largest = max(nodes, key=lambda node: (shape.fits(node), node.get(short, 0)))
    has = told({name: largest.get(name, 0) for name in shape.per_worker})
    few, free = ("little", "free some memory, or ") if short == "memory" else ("few", "")
    others = ", or where an autoscaler brings other nodes say how many trials are to run at a time "
    return (
        f"ray: the cluster has too {few} {WORDS[short]} for a trial of {shape.workers} worker(s) "
        f"with {shape.need} each: the largest of its {len(nodes)} node(s) has {has}"
        f"{', and no other is to come' if wanted else ''}; {free}lower --workers-per-trial or "
        f"--gpus-per-worker{'' if wanted else others + 'with --max-concurrent'}."
    )


def never_placed(shape: SlotShape, slots: int) -> bool:
    """Whether no node holds a slot and the autoscaler knows of none that could.

    It tells of what it cannot serve, also where it can add no nodes at all; Ray's first autoscaler
    does not, and then it is not known. ``slots`` is how many are waiting for their place.
    """
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    if capacity(shape):
        return False
    client = ray._private.worker.global_worker.gcs_client
    reply = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=STATUS_S))
    groups = reply.autoscaling_state.infeasible_gang_resource_requests
    asked = [shape.per_worker] * shape.workers
    refused = [[dict(each.resources_bundle) for each in group.requests] for group in groups]
    return refused.count(asked) >= slots


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is there."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _short(shape: SlotShape) -> str:
    """Of which of its resources the cluster holds the fewest slots."""
    return min(shape.per_worker, key=lambda name: (capacity(shape, [name]), name != "GPU"))
