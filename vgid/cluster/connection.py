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

from vgid.cluster.resources import SlotShape
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
    "TUNE_WARN_THRESHOLD_S": "10",
    "OMP_WAIT_POLICY": "passive",
}
ALONE = {
    # Nobody takes this node away and leaves the others.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Every process listens on loopback only. What Ray does by itself on Windows and macOS, where it
    # makes no clusters; elsewhere it would be on all interfaces, if only for those with the token.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Further settings of a cluster of one node."""

TOKEN = Path("~/.ray/auth_token")
"""The token that Ray makes where there is none, and writes for everyone on the machine to read."""

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
        with sigterm_kept():  # Ray takes it for itself when it starts
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
    import ray

    need = {name: shape.per_worker[name] for name in names or shape.per_worker}
    workers = 0
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            workers += int(min(have.get(name, 0) / each for name, each in need.items()))
    return workers // shape.workers


def slot_count(shape: SlotShape, wanted: int | None, trials: int, joined: bool) -> tuple[int, str]:
    """How many slots a study gets, and what decided it, in words.

    It gets what is ``wanted`` (``--max-concurrent``) and the cluster holds, one a trial that is
    still to run at most. On a cluster that was ``joined``, today's capacity does not limit what is
    wanted: nodes may come up on demand, and until then trials wait for the slots that there are.

    Raises:
        InputError: not a single slot fits.
    """
    held = capacity(shape)
    words = {"CPU": "cores", "GPU": "GPUs", "memory": "memory"}
    short = words[min(shape.per_worker, key=lambda name: capacity(shape, [name]))]
    if held == 0 and not (joined and wanted):
        remedy = "free some memory, or " if short == "memory" else ""
        raise InputError(
            f"ray: the cluster has too little {short} for a trial of {shape.workers} worker(s) "
            f"with {shape.need} each; {remedy}lower --workers-per-trial or --gpus-per-worker, or "
            "where nodes join on demand say how many trials are to run at a time with "
            "--max-concurrent."
        )
    limits = {"the number of trials": max(1, trials)}
    if wanted is not None:
        limits["--max-concurrent"] = wanted
    if wanted is None or not joined:
        limits[short] = held
    decider = min(limits, key=lambda name: limits[name])
    return limits[decider], decider
