"""What a study is going to do, checked in full before anything is started or written."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgid.cluster.resources import SlotShape, worker_bytes
from vgid.config import RequestConfig, StudyConfig, TrialConfig, derived, parse
from vgid.data.address import local
from vgid.errors import InputError
from vgid.files import address, as_given
from vgid.report.page import rendered
from vgid.results import LeftOut, describe_left_out
from vgid.study.finished import OWN_DATA
from vgid.study.ledger import recorded
from vgid.study.search_space import FOLDER, Choices, SearchSpace
from vgid.study.warm_start import Prior, read_prior

if TYPE_CHECKING:
    from vgid.data.benchmark import Benchmark

# A study of the embedded backbone writes some 100 MB; with nearly no space left it cannot end.
MIN_FREE_BYTES = 500 * 2**20


@dataclass(frozen=True)
class Plan:
    """A checked study."""

    config: StudyConfig
    space: SearchSpace
    request: RequestConfig  # what every trial of the study shares
    shape: SlotShape
    # Without what is left out; None where it is the embedded backbone's own, to be written.
    benchmark: "Benchmark | None"
    prior: Prior | None = None  # whose points are among the space's first, of a warm start

    @property
    def left_out(self) -> LeftOut:
        """What of the data is left out as defective."""
        return {} if self.benchmark is None else self.benchmark.left_out

    def lines(self) -> list[str]:
        """The plan for people, for ``--dry-run``."""
        told = vars(self) | {"left_out": describe_left_out(self.left_out)}
        told["data"] = as_given(self.config.data or self.request.data)
        return rendered("vgid.study", "plan.txt.jinja", **told).splitlines()


def make_plan(
    config: StudyConfig, ancestral: Mapping[str, Any] | None = None, resume: bool = False
) -> Plan:
    """Check all of a study before anything starts; ``InputError`` for what is wrong.

    ``ancestral`` is what the deployment that it starts from sets of every request
    (``vgid.deployment.record.Shipped.followed_by``). A study to ``resume`` has its prior recorded.
    """
    from vgid.models import backbones

    row = backbones.spec(config.backbone)
    folder = backbones.locate(row, config.model_path)
    path = config.search_space or FOLDER / f"{config.backbone}.yaml"
    space = SearchSpace.load(path, config.backbone, config.method)
    prior = None
    if config.warm_start is not None:
        prior = recorded(config.output).warm_start if resume else read_prior(config, space)
    if prior is not None:
        space = space.started_from(prior.points)
    if config.method == "rmu":
        _check_layer(space, folder)
    # Not every trial is one that runs in one worker only; what is refused later is one trial.
    if config.workers_per_trial > 1 and False not in space.domain("released"):
        raise InputError(
            f"{space.source}: released: the public script's variant runs in one worker only; leave "
            "out --workers-per-trial."
        )
    if config.workers_per_trial > 1 and 0 < config.gpus_per_worker < 1:
        raise InputError(
            "--gpus-per-worker: the workers of one trial cannot share a GPU, which NCCL refuses; "
            "leave out --workers-per-trial, or give each a whole GPU."
        )
    if config.data is None:
        refuse_without_data(config.backbone)
    data = own = config.output / OWN_DATA
    copied = config.data is not None and address(config.data) is not None
    if config.data is not None and not (copied and own.is_dir()):  # by the run that is resumed
        data = local(config.data)
    places = {"data": data, "store": config.output / "store"}
    request = derived(RequestConfig, config, "study", **places | dict(ancestral or {}))
    benchmark = None if config.data is None else _checked_data(request, space)
    if copied:
        request = request.model_copy(update={"data": own})
    _check_output(config.output)
    # By the first of the trials.
    trial = space.trial_config(next(iter(space.first_points), {}), config.seed)
    on_gpu = config.gpus_per_worker > 0
    memory = worker_bytes(config.backbone, config.model_path, folder, trial, on_gpu)
    shape = SlotShape(config.workers_per_trial, config.gpus_per_worker, memory)
    return Plan(config, space, request, shape, benchmark, prior)


def refuse_without_data(backbone: str) -> None:
    """Raise InputError for a backbone that has no benchmark of its own."""
    from vgid.models.backbones import spec

    if not spec(backbone).embedded:
        raise InputError(
            f"--data: {backbone} has no benchmark of its own; name a folder in the MLLMU-Bench "
            "layout with --data."
        )


def _check_layer(space: SearchSpace, folder: Path) -> None:
    from transformers import AutoConfig

    depth = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
    domain = space.domain("rmu_layer")
    layers = domain.choices if isinstance(domain, Choices) else (domain.high,)
    deepest = max(layer or 1 for layer in layers)  # None is a third of the depth
    if deepest > depth:
        raise InputError(
            f"{space.source}: rmu_layer: {space.backbone} has {depth} layers, got {deepest:g}; "
            "lower it."
        )


def _checked_data(request: RequestConfig, space: SearchSpace) -> "Benchmark":
    """Read and encode what the study does, so that a defect is named now and not by a worker."""
    from vgid.evaluation.rehearsal import rehearsed

    tasks, wordings = (space.domain(name) for name in ("train_tasks", "train_wording"))
    assert isinstance(tasks, Choices) and isinstance(wordings, Choices)  # neither has an order
    trials = [
        parse(TrialConfig, {"train_tasks": task, "train_wording": wording}, space.source)
        for task, wording in product(tasks.choices, wordings.choices)
    ]
    return rehearsed(request, trials)


def _check_output(output: Path) -> None:
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"{existing}: is a file; name a folder with --output.")
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        raise InputError(
            f"{output}: only {free // 2**20} MB are free on that disk and a study needs "
            f"{MIN_FREE_BYTES // 2**20} MB; free some space or choose another --output."
        )
