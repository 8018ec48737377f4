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
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from vgid.config import PSEUDONYM, Config, ForgetRatio, TrainPairs, TrialConfig, parse
from vgid.errors import InputError
from vgid.evaluation.suppression import verdict
from vgid.files import recover, write_atomically
from vgid.results import QuestionPart, Score

FOLDER = "deployments"
"""Where deployments are in an output folder."""

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
