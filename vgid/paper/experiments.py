"""What the paper's tables are made of: one experiment a row and seed, each run once.

Experiments of one backbone, ratio and seed share a ``TrialSession``, and with it base, teacher
store and image features; different groups run in parallel processes, plain ones and not Ray's,
since they need no messages, no placement and no scheduler beyond a queue. Each outcome is a file
named by the hash of all that it depends on, so a killed run goes on where it was and a second run
computes nothing.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from vgid.cluster.resources import worker_threads
from vgid.config import Config, ForgetRatio, NoiseType, RequestConfig, TrialConfig, derived
from vgid.errors import InputError
from vgid.files import write_atomically
from vgid.prompts import PromptStyle
from vgid.results import Score

if TYPE_CHECKING:
    from vgid.trial import TrialSession

FORMAT = 2  # part of every cache key; raised when the same experiment would give other numbers
POLL_S = 0.5


class Arm(Config):
    """What one row of a table does, whatever the backbone, ratio and seed.

    It trains ``trial``, or takes the base as it is, and asks the held-out questions under an
    instruction, a perturbation of the image or the reverse-engineering prompt; ``probe`` tells what
    of the answers counts (``vgid.paper.first_tokens``).
    """

    trial: TrialConfig | None = None
    style: PromptStyle | None = None
    noise_type: NoiseType | None = None
    sigma: float | None = None
    reverse: bool = False
    probe: Literal["scores", "first_tokens"] = "scores"


class Experiment(Config):
    """One arm, with the seed of the splits, the few-shot people, the noise and the training."""

    backbone: str
    forget_ratio: ForgetRatio
    seed: int = Field(ge=0)
    arm: Arm

    @property
    def group(self) -> tuple[str, ForgetRatio, int]:
        """What experiments of one session have in common."""
        return self.backbone, self.forget_ratio, self.seed

    @property
    def trial(self) -> TrialConfig | None:
        """The arm's trial with the experiment's seed."""
        trial = self.arm.trial
        return None if trial is None else trial.model_copy(update={"seed": self.seed})


class Bench(Config):
    """What experiments share."""

    folder: Path
    data: Path
    model_path: str | None = None
    retain_people: int = Field(50, ge=2)
    bootstrap_samples: int = Field(1000, ge=100)

    def request(self, backbone: str, forget_ratio: ForgetRatio, seed: int) -> RequestConfig:
        """The forget request of a group."""
        own = {"backbone": backbone, "forget_ratio": forget_ratio, "seed": seed}
        return derived(RequestConfig, self, "experiment", store=self.folder / "store", **own)


class Outcome(Config):
    """What came of an experiment: its scores, or in one sentence why there are none."""

    scores: dict[str, Score] = Field(default_factory=dict)
    error: str | None = None
    seconds: float
    provenance: dict[str, str]


class Cache:
    """Outcomes on disk, by content; the weights of ``backbones`` are hashed once, here."""

    def __init__(self, bench: Bench, backbones: Sequence[str]) -> None:
        from vgid.data.benchmark import Benchmark
        from vgid.models.backbones import identity

        self.bench = bench
        self.data_sha256 = Benchmark.open(bench.data).sha256
        self.backbones = {name: identity(name, bench.model_path) for name in sorted(set(backbones))}

    def path(self, experiment: Experiment) -> Path:
        """Where the outcome is, or will be."""
        return self.bench.folder / "outcomes" / f"{self._key(experiment, experiment.arm)}.json"

    def adapter(self, experiment: Experiment) -> Path:
        """Where the trained adapter is kept; rows that differ after training share it."""
        trained = Arm(trial=experiment.arm.trial)
        return self.bench.folder / "adapters" / self._key(experiment, trained)

    def get(self, experiment: Experiment) -> Outcome | None:
        """The outcome, None if there is none yet, or its file was torn."""
        try:
            return Outcome.model_validate_json(self.path(experiment).read_bytes())
        except (OSError, ValueError):
            return None

    def _key(self, experiment: Experiment, arm: Arm) -> str:
        whole = [
            FORMAT,
            self.data_sha256,
            self.backbones[experiment.backbone],
            self.bench.request(*experiment.group).identity,
            experiment.model_copy(update={"arm": arm}).model_dump(mode="json"),
        ]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def measure(session: "TrialSession", experiment: Experiment, adapter: Path) -> Outcome:
    """Run one experiment in a session of its group; an adapter that is whole is kept as it is."""
    from vgid.method.teacher import Intervention
    from vgid.models.adapter_files import read_adapter
    from vgid.paper.first_tokens import first_token_scores

    started = time.perf_counter()
    arm, trial = experiment.arm, experiment.trial
    scores, error = {}, None
    if trial is not None:
        try:
            read_adapter(adapter)
        except InputError:  # not there, or torn
            adapter.parent.mkdir(parents=True, exist_ok=True)
            result = session.run(trial, adapter.name[:12], adapter, evaluate=False)
            if result.status != "completed":
                error = result.error or f"training ended as {result.status}"
    if error is None:
        intervention = Intervention(arm.noise_type, arm.sigma, arm.style, experiment.seed)
        if arm.probe == "first_tokens":
            scores = first_token_scores(session, intervention)
        else:
            trained = None if trial is None else adapter
            scores = session.scores_under("held_out", None, intervention, arm.reverse, trained)
    seconds = time.perf_counter() - started
    return Outcome(scores=scores, error=error, seconds=seconds, provenance=session.provenance)


def run_experiments(
    experiments: Sequence[Experiment],
    bench: Bench,
    processes: int = 2,
    console: Console | None = None,
) -> dict[Experiment, Outcome]:
    """The outcome of each experiment, run or taken from the cache.

    Of ``processes``, each has one thread and a group at a time, and the i-th takes the i-th GPU;
    1 is this one.

    Raises:
        InputError: bad input of any experiment; outcomes so far are kept.
    """
    wanted = list(dict.fromkeys(experiments))
    cache = Cache(bench, [experiment.backbone for experiment in wanted])
    groups = in_groups([experiment for experiment in wanted if cache.get(experiment) is None])
    with _progress(cache, wanted, console or Console(stderr=True)) as update:
        if processes == 1:
            with worker_threads():
                for group in groups:
                    _run_group(cache, group, update)
        elif groups:
            _run_in_processes(cache, groups, processes, update)
    found = {experiment: cache.get(experiment) for experiment in wanted}
    return {experiment: outcome for experiment, outcome in found.items() if outcome is not None}


def in_groups(experiments: Sequence[Experiment]) -> list[list[Experiment]]:
    """Experiments that share a session, the group with most work first."""
    groups: dict[tuple[str, ForgetRatio, int], list[Experiment]] = {}
    work: Counter[tuple[str, ForgetRatio, int]] = Counter()  # in evaluations
    # Within a group what is trained comes first, so that a row of the same adapter finds it there.
    for e in sorted(experiments, key=lambda e: (e.group, e.arm.reverse)):
        groups.setdefault(e.group, []).append(e)
        work[e.group] += 1 if e.trial is None or e.arm.reverse else 3 * e.forget_ratio // 5
    return [groups[group] for group in sorted(groups, key=lambda group: -work[group])]


def _run_group(
    cache: Cache, group: Sequence[Experiment], update: Callable[[], object] = lambda: None
) -> None:
    from vgid.trial import TrialSession

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    session: TrialSession | None = None
    for experiment in group:
        if cache.get(experiment) is not None:  # others have run it meanwhile
            continue
        session = session or TrialSession(cache.bench.request(*experiment.group))
        outcome = measure(session, experiment, cache.adapter(experiment))
        content = outcome.model_dump_json(indent=1).encode()
        write_atomically(cache.path(experiment), content)
        update()
    del session
    gc.collect()  # the model before the next group's is loaded


def _run_in_processes(
    cache: Cache, groups: Sequence[Sequence[Experiment]], processes: int, update: Callable[[], None]
) -> None:
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    started = context.Value("i", 0)
    pool = ProcessPoolExecutor(min(processes, len(groups)), context, _start_worker, (started,))
    try:
        pending = {pool.submit(_run_group, cache, group) for group in groups}
        while pending:
            done, pending = wait(pending, POLL_S, FIRST_COMPLETED)
            update()
            for future in done:
                future.result()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                "a process of the experiments died, perhaps for lack of memory; lower --processes "
                "and repeat the command, which goes on from here."
            ) from None
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(started: Any) -> None:
    """One thread a process, its own GPU where there are several, and no life after the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # killed: the pool would wait for more work forever

    threading.Thread(target=follow, daemon=True).start()
    with started.get_lock():
        number = started.value
        started.value += 1
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    import torch

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


@contextmanager
def _progress(
    cache: Cache, experiments: Sequence[Experiment], console: Console
) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, elsewhere a line now and then; yields what brings it up to date."""
    total, shown = len(experiments), console.is_terminal
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("Experiments", total=total)
        last: int | None = None

        def update() -> None:
            nonlocal last
            # Finished experiments show in the cache, so processes need not report.
            now = sum(cache.get(experiment) is not None for experiment in experiments)
            bar.update(task, completed=now)
            if last is None or now - last >= max(1, total // 20) or last < now == total:
                if not shown:
                    where = " from the cache" if last is None else ""
                    console.print(f"{now} of {total} experiments{where}", highlight=False)
                last = now

        update()
        yield update
