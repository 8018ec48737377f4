"""A deployment: the one adapter that a team ships for a backbone, and all that it must answer for.

::

    deployments/<backbone>.yaml      this record, sealed by its own last line
    deployments/<backbone>/adapter/  the PEFT adapter that it names, relative to the file

The last line is the SHA-256 of every byte before it, so a changed byte anywhere is found; who may
not trust the writer checks the signature (``vgid.deployment.signing``) as well. No name, question
or answer is in it: subjects are the benchmark's pseudonyms, requests are the ids that the user
gave.

``record.schema.json`` beside this module is the file's JSON Schema, for other programs;
``python -m vgid.deployment.record`` prints it anew.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from vgid.config import (
    PSEUDONYM,
    Config,
    ForgetRatio,
    RequestConfig,
    TrainPairs,
    TrialConfig,
    derived,
    parse,
)
from vgid.errors import InputError
from vgid.evaluation.suppression import verdict
from vgid.files import recover, write_atomically
from vgid.report.records import FURTHER_METRICS, MAIN_METRICS
from vgid.results import QuestionPart, Score

FOLDER = "deployments"
"""Where deployments are in an output folder."""

DEPLOYMENT, ADAPTER, MERGED = "deployment.yaml", "adapter", "merged"
"""The deployment file, the adapter and what is served in an export's folder."""

SCHEMA = Path(__file__).with_suffix(".schema.json")

REVERSED = "reverse prompt (paper A.3.7)"
"""Name of the attack that asks everything again under the reverse prompt."""

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
    "forget_classification",
    "test_classification",
    "retain_classification",
    "celebrity_classification",
    "earlier_rougeL",
    "earlier_cloze",
    "earlier_memorisation",
)
"""What people are shown of the many scores: in the card, a verification and an audit."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pseudonym = Annotated[str, Field(pattern=f"^{PSEUDONYM}$")]
"""An id of a subject or a request: never a path, never a name with spaces."""

_SEAL = re.compile(rb"sha256: ([0-9a-f]{64})\n\Z")


class Base(Config):
    """The frozen base model.

    Attributes:
        hub_id: Hugging Face repository, None for an embedded backbone or a local folder.
        model_path: folder or hub id that took the place of the backbone's own, if any.
        revision: hub commit, or SHA-256 over a local folder's files.
        precision: dtype that the scores were measured in.
    """

    hub_id: str | None
    model_path: str | None
    revision: str
    precision: Literal["float32", "bfloat16", "float16"]


class Adapter(Config):
    """The PEFT adapter.

    Attributes:
        path: its folder, relative to the deployment file.
        files: SHA-256 of each of its files.
        rank: of LoRA.
        scale: lora_alpha over rank.
        targets: regular expression on module paths, or module names.
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
    """What surrounds the user text; ``{text}`` is its place (see ``backbones.PromptFrame``).

    ``asked`` says where the scores were measured in other turns, the benchmark's.
    """

    image: str
    text: str
    separator: str
    asked: dict[str, str] = Field(default_factory=dict)


class Attack(Config):
    """One attack that was run: scores of the deployed model under it.

    Attributes:
        name: which.
        scores: by name, as ``Scores`` has them.
    """

    name: str
    scores: dict[str, Score]


class Scores(Config):
    """What was measured, on which questions.

    Attributes:
        part: half of each person's questions that was asked.
        seeds: of the few-shot choice, test poses and bootstrap; a score's value is the mean over
            them, its interval the envelope of their intervals, its n one seed's questions.
        base: the base model's scores by name.
        deployed: the deployed model's.
        attacks: those that were run.
        not_run: those that were not, in words.
    """

    part: QuestionPart
    seeds: tuple[int, ...] = Field(min_length=1)
    base: dict[str, Score]
    deployed: dict[str, Score]
    attacks: tuple[Attack, ...]
    not_run: tuple[str, ...] = NOT_RUN

    def verdict(self, *splits: str) -> str:
        """What may be said of the people of some splits, see ``vgid.evaluation.suppression``."""
        reverse = {
            name: s for a in self.attacks if a.name == REVERSED for name, s in a.scores.items()
        }
        return verdict(self.base, self.deployed, reverse, splits)


class Data(Config):
    """The benchmark that was trained and measured on.

    Attributes:
        sha256: over its files.
        forget_ratio: per cent of the people.
        retain_people: people scored as retain set.
        train_pairs: whether training saw the held-out questions, as it did before one could choose.
        skip_defects: whether what was defective in the data was left out.
        split_seed: of the splits of people and questions.
    """

    sha256: Sha256
    forget_ratio: ForgetRatio
    retain_people: int
    train_pairs: TrainPairs = "all"
    skip_defects: bool = False
    split_seed: int


class Origin(Config):
    """Where the adapter comes from.

    Attributes:
        study_id: the study, as MLflow has it.
        trial_id: its trial.
        rule: how the trial was picked, with its bounds.
        git_commit: of the code, None outside a checkout.
        git_dirty: whether the checkout had changes.
        versions: of Python and the libraries.
    """

    study_id: str
    trial_id: str
    rule: str
    git_commit: str | None
    git_dirty: bool
    versions: dict[str, str]


class Parent(Config):
    """The deployment that a sequential request started from.

    Attributes:
        sha256: of the parent's file, its seal included.
        requests: the parent's and its ancestors' request ids.
        subjects: the parent's and its ancestors' subjects, who must stay forgotten.
    """

    sha256: Sha256
    requests: tuple[Pseudonym, ...]
    subjects: tuple[Pseudonym, ...]


class Deployment(Config):
    """The record of a deployment.

    Attributes:
        schema_version: of this layout.
        backbone: name of its row in ``vgid.models.backbones``.
        created: UTC, ISO 8601.
        requests: ids of the forget requests that it answers.
        subjects: pseudonyms of the people that it suppresses.
        base: the base model.
        adapter: the adapter.
        frame: the prompt frame that it was trained and measured with.
        hyperparameters: the trial's setting.
        scores: what was measured.
        data: on which data.
        origin: where it comes from.
        parent: the deployment before it, for a sequential request.
        served_as: what an export serves: base and adapter in one. A server that keeps them apart
            answers as the base whenever it is asked by the base's name, or by none.
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
        return file.parent / self.adapter.path


def write_deployment(path: Path, deployment: Deployment) -> str:
    """Write the sealed file in one step.

    Returns:
        SHA-256 of the whole file, which names the deployment elsewhere.

    Raises:
        InputError: it cannot be written.
    """
    plain = deployment.model_dump(mode="json")
    plain["hyperparameters"] = _plain(deployment.hyperparameters.used)
    body = yaml.dump(
        plain, Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True, width=100
    ).encode()
    content = body + f"sha256: {hashlib.sha256(body).hexdigest()}\n".encode()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_deployment(path: Path) -> tuple[Deployment, str]:
    """Read a deployment file and check its seal.

    Returns:
        The deployment, and the SHA-256 of the whole file.

    Raises:
        InputError: it is not there, changed since it was written, or no deployment.
    """
    recover(path.parent)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); name a deployment file."
        ) from None
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
    """SHA-256 of each file of an adapter folder, by name.

    Raises:
        InputError: the folder is not there, or a file cannot be read.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    except OSError as error:
        raise InputError(
            f"{folder}: the adapter cannot be read ({error.strerror}); restore its folder."
        ) from None


def read_with_adapter(file: Path) -> tuple[Deployment, str, Path]:
    """Read a deployment file whose adapter is as recorded.

    Returns:
        The deployment, the SHA-256 of the whole file, and the adapter's folder.

    Raises:
        InputError: see ``read_deployment`` and ``check_adapter``.
    """
    deployment, sha256 = read_deployment(file)
    folder = deployment.adapter_folder(file)
    check_adapter(deployment, file, folder)
    return deployment, sha256, folder


def check_adapter(deployment: Deployment, file: Path, folder: Path) -> None:
    """The files of an adapter are the recorded ones.

    Raises:
        InputError: they are not there, or others.
    """
    if hash_files(folder) != deployment.adapter.files:
        raise InputError(f"{folder}: is not the adapter of {file}; see `vgid verify {file}`.")


def request_of(
    deployment: Deployment, data: Path, store: Path, model_path: str | None = None
) -> RequestConfig:
    """The forget request that a deployment answers, as its scores were measured.

    Args:
        deployment: the record.
        data: benchmark folder.
        store: folder of the teacher store.
        model_path: folder or hub id of the base, where it is not what the record says.
    """
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
    deployment: Deployment, file: Path, data: Path | None, optional: bool
) -> Iterator[Path | None]:
    """The benchmark of a deployment: as named, as the study wrote it, or the embedded one anew.

    Yields:
        Its folder; None if it is not there and ``optional``.

    Raises:
        InputError: it is not there, and nothing says that it was the embedded backbone's own.
    """
    from vgid.models.backbones import spec

    own = file.absolute().parent.parent / "data"
    if data is not None or own.is_dir():
        yield data or own
    elif optional:
        yield None
    elif not spec(deployment.backbone).embedded:
        raise InputError("--data: name the benchmark folder that the deployment was measured on.")
    else:
        from vgid.data.benchmark import Benchmark
        from vgid.data.synthetic import write_benchmark

        with tempfile.TemporaryDirectory(prefix="vgid-verify-") as temporary:
            made = Path(temporary) / "data"
            write_benchmark(made)
            if Benchmark.open(made).sha256 != deployment.data.sha256:
                raise InputError(
                    "--data: the deployment was not measured on the backbone's own benchmark; name "
                    "the folder of the one that it was measured on."
                )
            yield made


def find_base(deployment: Deployment, model_path: str | None = None) -> Path:
    """The folder of the very base that a deployment was made from.

    Args:
        deployment: names the base and its revision.
        model_path: folder or hub id of it, where it is not what the deployment says.

    Raises:
        InputError: it is not there, or is another one.
    """
    from vgid.models.backbones import locate, revision_of, spec

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


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists; YAML's safe dialect has no other."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


if __name__ == "__main__":
    print(json_schema(), end="")
