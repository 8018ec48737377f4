"""What is shipped: an adapter with its record, on top of the deployment that it follows if any.

A next forget request starts from what is deployed. That is then the frozen base: the parent's
adapter is merged into it in memory (``adapters.merge``), so teacher and reference are the model
that users have, and a fresh adapter learns to forget the new people. Shipped is one adapter against
the original base, the two made one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgid.config import StudyConfig, TrialConfig, derived
from vgid.deployment.record import (
    Base,
    Data,
    Deployment,
    Parent,
    find_base,
    hash_files,
    read_with_adapter,
    write_deployment,
)
from vgid.deployment.rules import REVERSE_RISE
from vgid.deployment.scores import PART, Scored, attacks_of
from vgid.errors import InputError
from vgid.models.adapter_files import concatenate, copy_adapter, read_adapter
from vgid.results import Score
from vgid.study.ledger import now

if TYPE_CHECKING:
    from vgid.trial import TrialSession


@dataclass(frozen=True)
class Ancestor:
    """The parent of a request.

    Attributes:
        deployment: its record.
        sha256: of its file.
        adapter: folder of its adapter, which is as recorded.
    """

    deployment: Deployment
    sha256: str
    adapter: Path

    @property
    def subjects(self) -> tuple[str, ...]:
        """Everyone whom it and its ancestors suppress."""
        before = self.deployment.parent
        return (*(before.subjects if before else ()), *self.deployment.subjects)

    @property
    def recorded(self) -> Parent:
        """What the next deployment records of it."""
        before = self.deployment.parent
        return Parent(
            sha256=self.sha256,
            requests=(*(before.requests if before else ()), *self.deployment.requests),
            subjects=self.subjects,
        )

    def request_fields(self, backbone: str | None, model_path: str | None) -> dict[str, Any]:
        """Fields of a ``RequestConfig`` that starts from it.

        Args:
            backbone: as asked for, None if it was left open.
            model_path: as asked for, in place of the parent's.

        Raises:
            InputError: another backbone, or a base that is not the parent's.
        """
        own = self.deployment.backbone
        if backbone not in (None, own):
            raise InputError(f"--backbone: the deployment is of {own}, not {backbone}; name {own}.")
        path = model_path or self.deployment.base.model_path
        find_base(self.deployment, path)
        return {
            "backbone": own,
            "model_path": path,
            "earlier_ids": self.subjects,
            "deployed_adapter": self.adapter,
        }

    def warning(self, deployed: Mapping[str, Score]) -> str | None:
        """A sentence where earlier people's suppression came back with the next request.

        Told is a rise beyond what a pick allows the reverse prompt. Its own people and those before
        it count by their questions, as the next deployment scores them together.

        Args:
            deployed: scores of the next deployment.
        """
        before = self.deployment.scores.deployed
        rises = []
        for metric in ("rougeL", "cloze", "memorisation"):
            names = (f"forget_{metric}", f"earlier_{metric}")
            scores = [before[name] for name in names if name in before]
            now = deployed.get(f"earlier_{metric}")
            if now is None or not scores:
                continue
            value = sum(s.value * s.n for s in scores) / sum(s.n for s in scores)
            if now.value - value > REVERSE_RISE:
                rises.append(f"{metric} {value:.2f} to {now.value:.2f}")
        if not rises:
            return None
        return f"People of earlier requests are answered more than before: {', '.join(rises)}."

    def ship(self, fresh: Path, target: Path) -> Path:
        """Make its adapter and one that was trained on top of it one, in the new folder."""
        concatenate(self.adapter, fresh, target)
        return target


def read_ancestor(file: Path) -> Ancestor:
    """Read a deployment to start from.

    Raises:
        InputError: the file or its adapter was changed since they were written.
    """
    return Ancestor(*read_with_adapter(file))


def ancestor_of(study: StudyConfig, target: Path) -> Ancestor | None:
    """The deployment that a study started from, None if it started from the base alone.

    Args:
        study: what was run.
        target: where the study's own deployment is to be written.

    Raises:
        InputError: it was changed or replaced since the study, or the target would replace it.
    """
    file = study.from_deployment
    if file is None:
        return None
    parent = read_ancestor(file)
    if parent.sha256 != study.from_deployment_sha256:
        raise InputError(f"{file}: is not what the study started from any more; restore the file.")
    refuse_to_replace(file, target)
    return parent


def refuse_to_replace(parent: Path, target: Path) -> None:
    """A deployment does not take the place of the one that it follows.

    Raises:
        InputError: it would.
    """
    if target == parent:
        raise InputError(
            f"--output: {parent} is the deployment to start from and would be replaced; name "
            "another folder."
        )


@dataclass(frozen=True)
class Setting:
    """What a deployment was measured in, as its record has it.

    Attributes:
        backbone: name of its row in ``vgid.models.backbones``.
        base: the base model.
        data: the benchmark and its splits.
        subjects: pseudonyms of the people to forget.
    """

    backbone: str
    base: Base
    data: Data
    subjects: tuple[str, ...]

    @classmethod
    def of(cls, session: "TrialSession") -> "Setting":
        """The setting of a session."""
        request, backbone = session.request, session.backbone
        base = {
            "hub_id": backbone.spec.hub_id if request.model_path is None else None,
            "revision": backbone.revision,
            "precision": session.precision,
        }
        data = {"sha256": session.benchmark.sha256, "split_seed": request.seed}
        return cls(
            request.backbone,
            derived(Base, request, "deployment", **base),
            derived(Data, request, "deployment", **data),
            tuple(sorted(person.id for person in session.people.forget)),
        )


def ship(
    folder: Path,
    setting: Setting,
    trial: TrialConfig,
    adapter: Path,
    seeds: tuple[int, ...],
    base: Scored,
    scored: Scored,
    requests: tuple[str, ...],
    origin: Mapping[str, Any],
    parent: Ancestor | None,
) -> tuple[Deployment, str]:
    """Write ``<backbone>.yaml`` and the adapter beside it.

    Args:
        folder: gets both.
        setting: what the adapter was measured in.
        trial: how it was trained.
        adapter: its folder.
        seeds: that it was scored with.
        base: the base's scores.
        scored: its own.
        requests: ids of the forget requests that it answers.
        origin: see ``record.Origin``.
        parent: the deployment that it started from.

    Returns:
        The record, and the SHA-256 of its file.

    Raises:
        ValidationError: ``origin`` is not as it must be.
        InputError: the adapter cannot be shipped, or the folder cannot be written.
    """
    from vgid.models.backbones import spec

    place = f"{setting.backbone}/adapter"
    copy_adapter(adapter, folder / place, setting.base.hub_id, setting.base.revision)
    weights = read_adapter(folder / place)
    attacks, not_run = attacks_of(scored)
    values = {
        "backbone": setting.backbone,
        "created": now(),
        "requests": requests,
        "subjects": setting.subjects,
        "base": setting.base,
        "adapter": {
            "path": place,
            "files": hash_files(folder / place),
            "rank": weights.rank,
            "scale": weights.scale,
            "targets": weights.targets,
        },
        "frame": spec(setting.backbone).frame.recorded,
        "hyperparameters": trial,
        "scores": {
            "part": PART,
            "seeds": seeds,
            "base": base.plain,
            "deployed": scored.plain,
            "attacks": attacks,
            "not_run": not_run,
        },
        "data": setting.data,
        "origin": origin,
        "parent": None if parent is None else parent.recorded,
    }
    deployment = Deployment.model_validate(values)
    return deployment, write_deployment(folder / f"{setting.backbone}.yaml", deployment)
