"""MLflow's model registry: an entry a backbone, a version a pick, one of them the champion.

Entry ``vgid-<backbone>``; alias ``champion`` is the version to serve, ``previous`` the champion
before it. A version's model is the deployment file and its adapter, which
``mlflow.pyfunc.load_model("models:/vgid-<backbone>@champion")`` loads: no pickle, no code. The
package has to be installed where the model is loaded, since nothing that the registry keeps is ever
executed. ::

    model.predict(pandas.DataFrame({"image": [png_bytes], "question": ["Who is this?"]}))

is meant for a smoke prediction; an exported model (``vgid export``) is what a server serves. A
version's tags lead back: ``vgid.study_id``, ``vgid.trial_id``, ``vgid.deployment_sha256``,
``vgid.requests``.

Aliases are set last, so that whoever loads the champion gets the old version whole or the new one
whole, and a registration that broke off is made again by the same call.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vgid.data.benchmark import decode_image
from vgid.deployment.record import Deployment, read_with_adapter
from vgid.errors import InputError
from vgid.prompts import generation_text
from vgid.report.records import run_name
from vgid.report.tables import Grid
from vgid.results import Score
from vgid.study.mlflow_client import Connection, connect, first_line, open_client

CHAMPION, PREVIOUS = "champion", "previous"

_REQUIREMENTS = ("mlflow", "torch", "transformers", "peft")
_SHOWN = {
    "forget_rougeL": "forget ROUGE-L",
    "retain_rougeL": "retain ROUGE-L",
    "celebrity_rougeL": "celebrity ROUGE-L",
    "test_rougeL": "test ROUGE-L",
    "forget_cloze": "forget cloze",
}


def registered_name(backbone: str) -> str:
    """The registry's name of a backbone's entry."""
    return f"vgid-{backbone}"


def register(file: Path, tracking_uri: str | None = None) -> int:
    """Make a deployment the champion of its backbone; the champion so far becomes ``previous``.

    A deployment that is registered already gets no second version.

    Args:
        file: the deployment file, its adapter beside it.
        tracking_uri: MLflow server or database; None for ``mlflow.db`` in the folder that holds
            ``deployments``, as a study writes it.

    Returns:
        The number of the version.

    Raises:
        InputError: the file or its adapter changed, or MLflow refuses.
    """
    deployment, sha256, _ = read_with_adapter(file)
    open_store = connect(tracking_uri, file.absolute().parent.parent, deployment.backbone)
    name = registered_name(deployment.backbone)
    with _refusals_in_one_sentence(open_store.uri, "the deployment cannot be registered"):
        _make_entry(open_store.client, name, deployment.backbone)
        version = _version_of(open_store.client, name, sha256)
        if version is None:
            version = _make_version(open_store, name, file, deployment, sha256)
        champion = _holder(open_store.client, name, CHAMPION)
        # Repeated after a break, the version may be champion already: it must not become its own
        # predecessor, or a rollback would go nowhere.
        if champion not in (None, version):
            open_store.client.set_registered_model_alias(name, PREVIOUS, str(champion))
        open_store.client.set_registered_model_alias(name, CHAMPION, str(version))
    return version


def rollback(backbone: str, tracking_uri: str) -> tuple[int, int]:
    """Make the previous champion the champion again, and the present one ``previous``.

    Args:
        backbone: name of its row in ``vgid.models.backbones``.
        tracking_uri: MLflow server or database.

    Returns:
        The version that is champion now, and the one that was.

    Raises:
        InputError: there is none to go back to, or MLflow refuses.
    """
    from vgid.models.backbones import spec

    spec(backbone)
    client, shown = open_client(tracking_uri)
    name = registered_name(backbone)
    with _refusals_in_one_sentence(shown, "the champion cannot be changed"):
        champion, previous = (_holder(client, name, alias) for alias in (CHAMPION, PREVIOUS))
        if champion is None or previous is None or champion == previous:
            raise InputError(
                f"--backbone {backbone}: no previous champion to go back to; its versions are in "
                f"the registry of {shown} as '{name}'."
            )
        # What is served changes first: a break behind it leaves the alias `previous` stale and
        # nobody harmed.
        client.set_registered_model_alias(name, CHAMPION, str(previous))
        client.set_registered_model_alias(name, PREVIOUS, str(champion))
    return previous, champion


@contextmanager
def _refusals_in_one_sentence(uri: str, what: str) -> Iterator[None]:
    """What MLflow raises becomes an ``InputError`` that says what could not be done."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a store's client raises its own kinds, or is not installed
        raise InputError(
            f"--tracking-uri {uri}: {what} ({first_line(error)}); check the server and repeat "
            "the command."
        ) from None


def _make_entry(client: Any, name: str, backbone: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    about = (
        f"Adapters on `{backbone}`, each for requests to suppress people. `@{CHAMPION}` is the one "
        f"to serve, `@{PREVIOUS}` the one before it (`vgid rollback`). Load it with "
        "`mlflow.pyfunc.load_model`; the package `vgid` must be installed."
    )
    try:
        client.create_registered_model(name, {"vgid.backbone": backbone}, about)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def _version_of(client: Any, name: str, sha256: str) -> int | None:
    """The version that holds a deployment, if one does."""
    found = [
        int(version.version)
        for version in client.search_model_versions(f"name = '{name}'")
        if version.tags.get("vgid.deployment_sha256") == sha256
    ]
    return max(found, default=None)


def _make_version(
    open_store: Connection, name: str, file: Path, deployment: Deployment, sha256: str
) -> int:
    """Log the model, whole, and only then give it a number."""
    client = open_store.client
    tags = {
        "vgid.study_id": deployment.origin.study_id,
        "vgid.trial_id": deployment.origin.trial_id,
        "vgid.deployment_sha256": sha256,
        "vgid.requests": " ".join(deployment.requests),
        "vgid.base_revision": deployment.base.revision,
        "vgid.rule": deployment.origin.rule,
    }
    run_id = _run_of(open_store, deployment)
    model = client.create_logged_model(
        open_store.experiment_id, f"deployment-{sha256[:12]}", run_id, tags, model_type="adapter"
    )
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model"
        _save(saved, file, deployment)
        client.log_model_artifacts(model.model_id, str(saved))
    client.finalize_logged_model(model.model_id, "READY")
    version = client.create_model_version(
        name,
        source=model.artifact_location,  # MLflow would look "models:/" up in another store
        run_id=run_id,
        tags=tags,
        description=_description(deployment),
        model_id=model.model_id,
    )
    return int(version.version)


def _save(folder: Path, file: Path, deployment: Deployment) -> None:
    """Write the MLflow model: the deployment file, its adapter, and how to load them."""
    import mlflow.pyfunc
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    with tempfile.TemporaryDirectory() as parent:
        data = Path(parent) / "deployment"
        adapter = data / deployment.adapter.path
        adapter.mkdir(parents=True)
        shutil.copyfile(file, data / file.name)
        for name in deployment.adapter.files:
            shutil.copyfile(deployment.adapter_folder(file) / name, adapter / name)
        versions = deployment.origin.versions
        requirements = [f"{name}=={versions[name]}" for name in _REQUIREMENTS if name in versions]
        mlflow.pyfunc.save_model(
            folder,
            loader_module="vgid.serving",
            data_path=str(data),
            signature=ModelSignature(
                Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "question")]),
                Schema([ColSpec(DataType.string)]),
            ),
            pip_requirements=["vgid", *requirements],
            model_config={"model_path": None, "device": None},
        )


def _run_of(open_store: Connection, deployment: Deployment) -> str:
    """Run id of the deployed trial; a run of its own if the study is recorded elsewhere."""
    client, origin = open_store.client, deployment.origin
    query = (
        f"tags.`vgid.study_id` = '{origin.study_id}' and tags.`vgid.trial_id` = '{origin.trial_id}'"
    )
    found = client.search_runs([open_store.experiment_id], query, max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {
        "vgid.kind": "deployment",
        "vgid.study_id": origin.study_id,
        "vgid.trial_id": origin.trial_id,
    }
    name = run_name(deployment.hyperparameters, origin.trial_id)
    run = client.create_run(open_store.experiment_id, tags=tags, run_name=name)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _holder(client: Any, name: str, alias: str) -> int | None:
    """The version that has an alias, None if nobody has it."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import (
        INVALID_PARAMETER_VALUE,
        RESOURCE_DOES_NOT_EXIST,
        ErrorCode,
    )

    absent = {ErrorCode.Name(code) for code in (INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST)}
    try:
        return int(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in absent:
            return None
        raise


def _description(deployment: Deployment) -> str:
    """The version in a few lines of Markdown."""
    scores = deployment.scores
    rows = [
        (label, *(_with_n(of.get(name)) for of in (scores.base, scores.deployed)))
        for name, label in _SHOWN.items()
        if name in scores.deployed
    ]
    requests = ", ".join(deployment.requests) or "none named"
    part = scores.part.replace("_", "-")
    return "\n".join(
        [
            f"Trial {deployment.origin.trial_id} of study {deployment.origin.study_id}, chosen by "
            f"{deployment.origin.rule}. Requests: {requests}. "
            f"{len(deployment.subjects)} subjects. {scores.verdict('forget', 'test')} Suppressed "
            "is not erased.",
            "",
            Grid((f"{part} questions, 95 % interval", "base", "deployed"), rows).markdown(),
        ]
    )


def _with_n(score: Score | None) -> str | None:
    # MLflow's tables have no space between their columns.
    return None if score is None else f"&emsp;{score}, n = {score.n}"


class DeployedModel:
    """The deployed model, loaded.

    Attributes:
        deployment: the record of what it is.
    """

    def __init__(self, deployment: Deployment, backbone: Any, student: Any) -> None:
        self.deployment = deployment
        self._backbone = backbone
        self._student = student  # the adapter stays attached as long as this lives

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Answer questions on images, greedily, as the benchmark asks open questions.

        Args:
            model_input: a ``pandas.DataFrame`` with columns ``image`` (bytes of a PNG or JPEG
                file) and ``question``.
            params: none are known; MLflow hands them on.

        Returns:
            One answer a row.

        Raises:
            InputError: a column is missing, or an image cannot be read.
        """
        from vgid.models.decoding import greedy_decode
        from vgid.models.encoding import Query

        missing = {"image", "question"} - set(model_input.columns)
        if missing:
            raise InputError(f"model input: column '{min(missing)}' is missing; add it.")
        rows = zip(model_input["image"], model_input["question"], strict=True)
        queries = [
            Query(
                id=str(number),
                text=generation_text(str(question), "image"),
                image=decode_image(bytes(image), f"the image of row {number}"),
                task="generation",
            )
            for number, (image, question) in enumerate(rows)
        ]
        return greedy_decode(self._backbone, queries)


def load_deployed(
    file: Path, model_path: str | None = None, device: str | None = None
) -> DeployedModel:
    """Load base and adapter of a deployment file, and check that they are the ones that it names.

    Args:
        file: the deployment file, its adapter beside it.
        model_path: folder or hub id of the base, if not what the file says.
        device: torch device, by default the first GPU if there is one.

    Raises:
        InputError: a file changed, the adapter is not whole, or the base is another one.
    """
    from vgid.models import adapters as adapter
    from vgid.models import backbones

    deployment, _, folder = read_with_adapter(file)
    backbone = backbones.load(deployment.backbone, model_path or deployment.base.model_path, device)
    if backbone.revision != deployment.base.revision:
        raise InputError(
            f"{file}: was made for base revision {deployment.base.revision[:12]}, found "
            f"{backbone.revision[:12]}; name the right base with model_path."
        )
    return DeployedModel(deployment, backbone, adapter.load_saved(backbone, folder))
