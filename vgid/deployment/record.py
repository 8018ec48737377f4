"""A deployment: the one adapter that a team ships for a backbone, and all that it must answer for.

::

    deployments/<backbone>.yaml      this record, sealed by its own last line
    deployments/<backbone>/adapter/  the PEFT adapter that it names, relative to the file

The last line is the SHA-256 of every byte before it, so a changed byte anywhere is found; who may
not trust the writer checks the signature (``vgid.deployment.signing``) too. No name, question or
answer is in it: subjects are the benchmark's pseudonyms, requests the ids that the user gave.
``python -m vgid.deployment.record`` prints the file's JSON Schema, ``record.schema.json``, anew.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from vgid.config import (
    PSEUDONYM,
    Config,
    Flag,
    ForgetRatio,
    RequestConfig,
    StudyConfig,
    TrainPairs,
    TrialConfig,
    derived,
    parse,
)
from vgid.data.benchmark import Benchmark
from vgid.data.synthetic import write_benchmark
from vgid.deployment.rules import REVERSE_RISE
from vgid.errors import InputError
from vgid.evaluation.suppression import verdict
from vgid.files import recover, write_atomically
from vgid.models.adapter_files import copy_adapter, read_adapter
from vgid.models.backbones import locate, revision_of, spec
from vgid.report.records import FURTHER_METRICS, MAIN_METRICS
from vgid.report.tables import Grid
from vgid.results import QuestionPart, Score
from vgid.study.ledger import now

if TYPE_CHECKING:
    from vgid.trial import TrialSession

FOLDER = "deployments"
DEPLOYMENT, ADAPTER, MERGED = "deployment.yaml", "adapter", "merged"
"""The deployment file, the adapter and what is served in an export's folder."""

SCHEMA = Path(__file__).with_suffix(".schema.json")

REVERSED = "reverse prompt (paper A.3.7)"

NOT_RUN = (
    "relearning: fine-tuning the adapter's model on a few of the forgotten facts",
    "extraction from hidden states or from logits of earlier layers",
    "membership inference",
    "weights quantised after unlearning",
    "adversarial images, and prompts optimised against this adapter",
    "conversations of several turns, and other languages",
)
"""Attacks of the literature that this platform does not run, named so that nobody assumes them."""

CARD_SCORES = (
    *MAIN_METRICS,
    *FURTHER_METRICS,
    *(f"{split}_classification" for split in ("forget", "test", "retain", "celebrity")),
    *(f"earlier_{metric}" for metric in ("rougeL", "cloze", "memorisation")),
)
"""What people are shown of the many scores."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pseudonym = Annotated[str, Field(pattern=f"^{PSEUDONYM}$")]
"""An id of a subject or a request: never a path, never a name with spaces."""

BackboneToScore = Annotated[
    str | None,
    Flag("NAME"),
    Field(
        description="base model, a row of vgid/models/backbones.py; without it, the deployment's "
        "or tiny-llava"
    ),
]
RequestIds = Annotated[
    tuple[Pseudonym, ...],
    Flag("ID"),
    Field(description="id of a forget request that the deployment answers; may be repeated"),
]

Tell = Callable[[str], None]
"""Shows a line on what is being done."""

_SEAL = re.compile(rb"sha256: ([0-9a-f]{64})\n\Z")


class Base(Config):
    """The frozen base model.

    ``hub_id`` is None for an embedded backbone or a local folder, ``model_path`` what took the
    place of the backbone's own weights, ``revision`` the hub's commit or SHA-256 over a local
    folder's files, ``precision`` the dtype that the scores were measured in.
    """

    hub_id: str | None
    model_path: str | None
    revision: str
    precision: Literal["float32", "bfloat16", "float16"]


class Adapter(Config):
    """The PEFT adapter: its folder, relative to the deployment file, and SHA-256 of its files.

    ``scale`` is lora_alpha over rank, ``targets`` a regular expression on module paths, or names.
    """

    path: str
    files: dict[str, Sha256] = Field(min_length=2)
    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    targets: str | tuple[str, ...]

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise ValueError("must be a folder below the deployment file, without '..'")
        return path


class Frame(Config):
    """What surrounds the user text, ``{text}`` its place (see ``backbones.PromptFrame``).

    ``asked`` says where the scores were measured in other turns, the benchmark's.
    """

    image: str
    text: str
    separator: str
    asked: dict[str, str] = Field(default_factory=dict)


class Attack(Config):
    """One attack that was run: scores of the deployed model under it."""

    name: str
    scores: dict[str, Score]


class Scores(Config):
    """What was measured, on which ``part`` of each person's questions; scores are by name.

    A score's value is the mean over the ``seeds`` (of the few-shot choice, test poses and
    bootstrap), its interval the envelope of theirs, its n one seed's questions. ``not_run`` are
    attacks that were not run, in words.
    """

    part: QuestionPart
    seeds: tuple[int, ...] = Field(min_length=1)
    base: dict[str, Score]
    deployed: dict[str, Score]
    attacks: tuple[Attack, ...]
    not_run: tuple[str, ...] = NOT_RUN

    def verdict(self, *splits: str) -> str:
        """What may be said of the people of some splits, see ``vgid.evaluation.suppression``."""
        reverse = next((a.scores for a in self.attacks if a.name == REVERSED), None)
        return verdict(self.base, self.deployed, reverse, splits)

    def grid(self) -> Grid:
        """What people are shown of them."""
        return score_grid(self.base, self.deployed, self.attacks)


def shown_scores(
    scores: Mapping[str, Score], names: Iterable[str] = CARD_SCORES
) -> dict[str, Score]:
    """Those of ``names`` that there are, each with that of text-only and of raw questions."""
    asked = (name + form for name in names for form in ("", "_text", "_raw"))
    return {name: scores[name] for name in asked if name in scores}


def score_grid(
    base: Mapping[str, Score],
    deployed: Mapping[str, Score],
    attacks: Iterable[Attack] = (),
    names: Sequence[str] = CARD_SCORES,
) -> Grid:
    """A model's scores, plainly, beside the base's if there are any, and under each attack."""
    tests = {"plain": deployed} | {attack.name: attack.scores for attack in attacks}
    rows = []
    for test, found in tests.items():
        for name, score in shown_scores(found, names).items():
            known = base[name].value if test == "plain" and name in base else None
            rows.append((test, name, score.n, *([known] if base else []), score))
    last = ("base", "deployed [95 % interval]") if base else ("value [95 % interval]",)
    return Grid(("test", "score", "n", *last), rows)


class Data(Config):
    """The benchmark that was trained and measured on, SHA-256 over its files.

    ``forget_ratio`` is per cent of the people, ``split_seed`` that of the splits of people and
    questions; ``train_pairs`` says whether training saw the held-out questions, as it did before
    one could choose.
    """

    sha256: Sha256
    forget_ratio: ForgetRatio
    retain_people: int
    train_pairs: TrainPairs = "all"
    skip_defects: bool = False
    split_seed: int


class Origin(Config):
    """Where the adapter comes from: study and trial, and ``rule``, by which it was picked.

    Commit (none outside a checkout) and versions are those of the code that trained it.
    """

    study_id: str
    trial_id: str
    rule: str
    git_commit: str | None
    git_dirty: bool
    versions: dict[str, str]


class Parent(Config):
    """The deployment that a request started from, by the SHA-256 of its file.

    Requests and subjects, who must stay forgotten, are its own and its ancestors'.
    """

    sha256: Sha256
    requests: tuple[Pseudonym, ...]
    subjects: tuple[Pseudonym, ...]


class Deployment(Config):
    """The record of a deployment, ``created`` in UTC, ISO 8601.

    ``backbone`` is a row of ``vgid.models.backbones``, ``subjects`` are those whom it suppresses,
    ``frame`` is the prompt frame of training and measuring, ``parent`` the deployment before it.
    An export serves base and adapter in one: a server that keeps them apart answers as the base
    whenever it is asked by the base's name, or by none.
    """

    schema_version: Literal[1] = 1
    backbone: str
    created: str
    requests: tuple[Pseudonym, ...]
    subjects: tuple[Pseudonym, ...] = Field(min_length=1)
    base: Base
    adapter: Adapter
    frame: Frame
    hyperparameters: TrialConfig
    scores: Scores
    data: Data
    origin: Origin
    parent: Parent | None = None
    served_as: Literal["merged"] = "merged"

    def adapter_folder(self, file: Path) -> Path:
        """The adapter's folder, given where the deployment file is."""
        return file.parent / (ADAPTER if file.name == DEPLOYMENT else self.adapter.path)


def deployment_file(target: Path) -> Path:
    """The deployment file of an export's folder; any other target is one itself."""
    return target / DEPLOYMENT if target.is_dir() else target


def benchmark_beside(file: Path) -> Path:
    """Where a study that wrote its own benchmark has it."""
    return file.absolute().parent.parent / "data"


def write_deployment(path: Path, deployment: Deployment) -> str:
    """Write the sealed file in one step; the SHA-256 of all its bytes, which names it elsewhere."""
    plain = deployment.model_dump(mode="json")
    # Without what the method does not use: to a reader it would be a setting that had an effect.
    used = deployment.hyperparameters.used
    plain["hyperparameters"] = deployment.hyperparameters.model_dump(mode="json", include=set(used))
    body = yaml.dump(
        plain, Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True, width=100
    ).encode()
    content = body + f"sha256: {hashlib.sha256(body).hexdigest()}\n".encode()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_deployment(path: Path) -> tuple[Deployment, str]:
    """Read a deployment file; what ``write_deployment`` was given and what it returned.

    InputError where it is not there, changed since it was written, or no deployment.
    """
    recover(path.parent)  # a killed pick may have left the new one ready and not in place
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); name a deployment file."
        raise InputError(message) from None
    seal = _SEAL.search(content)
    if seal is None:
        raise InputError(
            f"{path}: its last line is no sha256 seal; it is no deployment file, or was changed."
        )
    body = content[: seal.start()]
    if hashlib.sha256(body).hexdigest() != seal[1].decode():
        raise InputError(f"{path}: was changed since it was written; pick the deployment again.")
    try:
        raw = yaml.safe_load(body)
    except (yaml.YAMLError, ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: is no YAML mapping; name a deployment file.")
    return parse(Deployment, raw, str(path)), hashlib.sha256(content).hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder by relative path; what is no file has the hash "".

    InputError where the folder is not there, or a file cannot be read.
    """
    found = {}
    try:
        for path in sorted(folder.rglob("*") if any(folder.iterdir()) else ()):
            sha256 = ""
            if path.is_file():
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            elif path.is_dir() and not path.is_symlink() and any(path.iterdir()):
                continue  # its files tell of it
            found[path.relative_to(folder).as_posix()] = sha256
    except OSError as error:
        message = f"{folder}: cannot be read ({error.strerror}); restore the folder."
        raise InputError(message) from None
    return found


@dataclass(frozen=True)
class Shipped:
    """A deployment whose adapter is as recorded; what a next request starts from.

    That request's frozen base is the adapter merged into the base in memory (``adapters.merge``):
    teacher and reference are the model that users have. Shipped is one adapter against the original
    base, the two made one (``adapter_files.concatenate``).
    """

    deployment: Deployment
    sha256: str
    adapter: Path

    @property
    def as_parent(self) -> Parent:
        """What the next deployment records of it and of its ancestors."""
        chain = [one for one in (self.deployment.parent, self.deployment) if one is not None]
        requests = tuple(request for one in chain for request in one.requests)
        subjects = tuple(subject for one in chain for subject in one.subjects)
        return Parent(sha256=self.sha256, requests=requests, subjects=subjects)

    def request_fields(self, backbone: str | None, model_path: str | None) -> dict[str, Any]:
        """Fields of a ``RequestConfig`` that starts from it, as far as they are not left open.

        InputError for another backbone, or a base that is not the parent's.
        """
        own = self.deployment.backbone
        if backbone not in (None, own):
            raise InputError(f"--backbone: the deployment is of {own}, not {backbone}; name {own}.")
        path = model_path or self.deployment.base.model_path
        find_base(self.deployment, path)
        return {
            "backbone": own,
            "model_path": path,
            "earlier_ids": self.as_parent.subjects,
            "deployed_adapter": self.adapter,
        }

    def followed_by(self, config: StudyConfig) -> tuple[StudyConfig, dict[str, Any]]:
        """A study that starts from it, pinned to this file and base; what it sets of its request.

        InputError as ``request_fields``.
        """
        fields = self.request_fields(config.backbone, config.model_path)
        pinned = {"from_deployment_sha256": self.sha256, "model_path": fields["model_path"]}
        return config.model_copy(update=pinned), fields

    def warning(self, deployed: Mapping[str, Score]) -> str | None:
        """A sentence where earlier people's suppression came back with the next request.

        That is a rise beyond what a pick allows the reverse prompt. Its own people and those before
        it count by their questions, as the next deployment scores them together.
        """
        before, rises = self.deployment.scores.deployed, []
        for metric in ("rougeL", "cloze", "memorisation"):
            names = (f"forget_{metric}", f"earlier_{metric}")
            scores = [before[name] for name in names if name in before]
            after = deployed.get(f"earlier_{metric}")
            if after is not None and scores:
                value = sum(s.value * s.n for s in scores) / sum(s.n for s in scores)
                if after.value - value > REVERSE_RISE:
                    rises.append(f"{metric} {value:.2f} to {after.value:.2f}")
        told = f"People of earlier requests are answered more than before: {', '.join(rises)}."
        return told if rises else None


def read_shipped(file: Path) -> Shipped:
    """Read a deployment file whose adapter is as recorded; InputError where it is not."""
    deployment, sha256 = read_deployment(file)
    folder = deployment.adapter_folder(file)
    if hash_files(folder) != deployment.adapter.files:
        raise InputError(f"{folder}: is not the adapter of {file}; see `vgid verify {file}`.")
    return Shipped(deployment, sha256, folder)


def refuse_to_replace(parent: Path, target: Path) -> None:
    """Raise InputError where a deployment would take the place of the one that it follows."""
    if target == parent:
        raise InputError(
            f"--output: {parent} is the deployment to start from and would be replaced; name "
            "another folder."
        )


def setting_of(session: "TrialSession") -> dict[str, Any]:
    """What was measured in, as fields of a ``Deployment``: backbone, base, data, people."""
    request, backbone = session.request, session.backbone
    base = {
        "hub_id": backbone.spec.hub_id if request.model_path is None else None,
        "revision": backbone.revision,
        "precision": session.precision,
    }
    data = {"sha256": session.benchmark.sha256, "split_seed": request.seed}
    return {
        "backbone": request.backbone,
        "base": derived(Base, request, "deployment", **base),
        "data": derived(Data, request, "deployment", **data),
        "frame": backbone.spec.frame.recorded,
        "subjects": sorted(person.id for person in session.people.forget),
    }


def ship(
    folder: Path, adapter: Path, parent: Shipped | None, **fields: Any
) -> tuple[Deployment, str]:
    """Write ``<backbone>.yaml`` and the adapter beside it; the record, and its file's SHA-256.

    Of the record are given the fields of ``setting_of``, and ``scores``, ``hyperparameters``,
    ``requests`` and ``origin``; ValidationError where one is not as it must be, InputError where
    the adapter cannot be shipped.
    """
    base, place = fields["base"], f"{fields['backbone']}/adapter"
    copy_adapter(adapter, folder / place, base.hub_id, base.revision)
    weights = read_adapter(folder / place)
    fields |= {
        "created": now(),
        "adapter": {
            "path": place,
            "files": hash_files(folder / place),
            "rank": weights.rank,
            "scale": weights.scale,
            "targets": weights.targets,
        },
        "parent": None if parent is None else parent.as_parent,
    }
    deployment = Deployment.model_validate(fields)
    return deployment, write_deployment(folder / f"{deployment.backbone}.yaml", deployment)


def request_of(
    deployment: Deployment, data: Path, store: Path, model_path: str | None = None
) -> RequestConfig:
    """The forget request that a deployment answers, as its scores were measured."""
    return derived(
        RequestConfig,
        deployment.data,
        "deployment",
        backbone=deployment.backbone,
        model_path=model_path or deployment.base.model_path,
        data=data,
        store=store,
        forget_ids=deployment.subjects,
        earlier_ids=() if deployment.parent is None else deployment.parent.subjects,
        seed=deployment.data.split_seed,
    )


@contextmanager
def recorded_benchmark(
    deployment: Deployment, file: Path, data: Path | None
) -> Iterator[Benchmark]:
    """The benchmark of a deployment: as named, as the study wrote it, or the embedded one anew.

    InputError where it is not there, and nothing says that it was the embedded backbone's own.
    """
    own = benchmark_beside(file)
    if data is not None or own.is_dir():
        yield Benchmark.open(data or own)
        return
    with tempfile.TemporaryDirectory(prefix="vgid-verify-") as temporary:
        if spec(deployment.backbone).embedded:
            write_benchmark(Path(temporary) / "data")
            made = Benchmark.open(Path(temporary) / "data")
            # The same bytes on every machine, so anything else was measured on another benchmark.
            if made.sha256 == deployment.data.sha256:
                yield made
                return
        raise InputError("--data: name the benchmark folder that the deployment was measured on.")


def find_base(deployment: Deployment, model_path: str | None = None) -> Path:
    """The folder of the very base that a deployment was made from; InputError for another one."""
    folder = locate(spec(deployment.backbone), model_path or deployment.base.model_path)
    found, wanted = revision_of(folder), deployment.base.revision
    if found != wanted:
        raise InputError(
            f"{folder}: is at revision {found[:12]} and the deployment's base at {wanted[:12]}; "
            "name that base with --model-path."
        )
    return folder


def json_schema() -> str:
    """The JSON Schema of the file, its seal included."""
    schema = Deployment.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "vgid deployment"
    schema["properties"]["sha256"] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    schema["required"].append("sha256")
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


class _QuotingDumper(yaml.SafeDumper):
    """Quotes text that begins like a number: YAML 1.2 reads a plain ``0028`` as 28."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if text[:1].isdigit() or text[:1] in ("+", "-", ".") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_QuotingDumper.add_representer(str, _quoted)


if __name__ == "__main__":
    print(json_schema(), end="")
