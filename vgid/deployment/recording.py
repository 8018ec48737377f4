"""Makes the record of a deployment out of what was trained and measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgid.config import RequestConfig, TrialConfig
from vgid.deployment.candidates import PART, Scored, attacks_of
from vgid.deployment.lineage import Ancestor
from vgid.deployment.record import Deployment, hash_files
from vgid.models.adapter_files import read_adapter
from vgid.study.ledger import now

if TYPE_CHECKING:
    from vgid.trial import TrialSession


@dataclass(frozen=True)
class Setting:
    """What a deployment was measured in, taken from the session that measured it.

    Attributes:
        request: the forget request.
        hub_id: of the base, None for an embedded one or one from elsewhere.
        revision: of the base.
        precision: dtype of its weights.
        data_sha256: of the benchmark.
        subjects: pseudonyms of the people to forget.
    """

    request: RequestConfig
    hub_id: str | None
    revision: str
    precision: str
    data_sha256: str
    subjects: tuple[str, ...]

    @classmethod
    def of(cls, session: "TrialSession") -> "Setting":
        """The setting of a session."""
        backbone = session.backbone
        return cls(
            request=session.request,
            hub_id=backbone.spec.hub_id if session.request.model_path is None else None,
            revision=backbone.revision,
            precision=session.precision,
            data_sha256=session.benchmark.sha256,
            subjects=tuple(sorted(person.id for person in session.people.forget)),
        )

    @property
    def base(self) -> dict[str, Any]:
        """The base, as a record names it."""
        return {
            "hub_id": self.hub_id,
            "model_path": self.request.model_path,
            "revision": self.revision,
            "precision": self.precision,
        }

    @property
    def data(self) -> dict[str, Any]:
        """The data and its splits, as a record names them."""
        return {
            "sha256": self.data_sha256,
            "forget_ratio": self.request.forget_ratio,
            "retain_people": self.request.retain_people,
            "train_pairs": self.request.train_pairs,
            "skip_defects": self.request.skip_defects,
            "split_seed": self.request.seed,
        }


def record(
    setting: Setting,
    trial: TrialConfig,
    adapter: Path,
    seeds: tuple[int, ...],
    base: Scored,
    scored: Scored,
    requests: tuple[str, ...],
    origin: Mapping[str, Any],
    parent: Ancestor | None,
) -> Deployment:
    """The record of an adapter.

    Args:
        setting: what it was measured in.
        trial: how it was trained.
        adapter: its folder, in a ``<backbone>/adapter`` beside the record.
        seeds: that it was scored with.
        base: the base's scores.
        scored: its own.
        requests: ids of the forget requests that it answers.
        origin: see ``deployment.Origin``.
        parent: the deployment that it started from.

    Raises:
        ValidationError: ``origin`` is not as it must be.
    """
    from vgid.models.backbones import spec

    request = setting.request
    weights = read_adapter(adapter)
    values = {
        "backbone": request.backbone,
        "created": now(),
        "requests": requests,
        "subjects": setting.subjects,
        "base": setting.base,
        "adapter": {
            "path": f"{request.backbone}/adapter",
            "files": hash_files(adapter),
            "rank": weights.rank,
            "scale": weights.scale,
            "targets": weights.targets,
        },
        "frame": spec(request.backbone).frame.recorded,
        "hyperparameters": trial,
        "scores": _scores(seeds, base, scored),
        "data": setting.data,
        "origin": origin,
        "parent": None if parent is None else parent.recorded,
    }
    return Deployment.model_validate(values)


def _scores(seeds: tuple[int, ...], base: Scored, scored: Scored) -> dict[str, Any]:
    attacks, not_run = attacks_of(scored)
    return {
        "part": PART,
        "seeds": seeds,
        "base": base.plain,
        "deployed": scored.plain,
        "attacks": attacks,
        "not_run": not_run,
    }
