"""MLflow's model registry: an entry a backbone, a version a pick, one of them the champion.

Entry ``vgid-<backbone>``; alias ``champion`` is the version to serve, ``previous`` the champion
before it. A version's model is the deployment file and its adapter, for a smoke prediction; what a
server serves is an exported model. Nothing that the registry keeps is ever executed, neither pickle
nor code: the package has to be installed where the model is loaded.

Aliases are set last, so whoever loads the champion gets the old version whole or the new one whole,
and a registration that broke off is made again by the same call.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgid.data.benchmark import decode_image
from vgid.deployment.record import Deployment, Shipped, find_base, read_shipped, score_grid
from vgid.errors import InputError
from vgid.models.backbones import spec
from vgid.prompts import generation_text
from vgid.report.page import rendered
from vgid.report.records import run_name
from vgid.study.mlflow_client import Connection, connect, one_sentence, open_client

CHAMPION, PREVIOUS = "champion", "previous"

_REMEDY = "check the server and repeat the command"
_REQUIREMENTS = ("mlflow", "torch", "transformers", "peft")
_SHOWN = ("forget_rougeL", "retain_rougeL", "celebrity_rougeL", "test_rougeL", "forget_cloze")


def registered_name(backbone: str) -> str:
    """The registry's name of a backbone's entry."""
    return f"vgid-{backbone}"


def register(file: Path, tracking_uri: str | None = None) -> int:
    """Make a deployment the champion of its backbone; the champion so far becomes ``previous``.

    A deployment that is registered already gets no second version. Without an address it is written
    to ``mlflow.db`` in the folder that holds ``deployments``, as a study writes it. Returned is the
    version's number; InputError where the file or its adapter changed, or MLflow refuses.
    """
    shipped = read_shipped(file)
    deployment = shipped.deployment
    open_store = connect(tracking_uri, file.absolute().parent.parent, deployment.backbone)
    client, name = open_store.client, registered_name(deployment.backbone)
    place = f"--tracking-uri {open_store.uri}"
    with one_sentence(place, "the deployment cannot be registered", _REMEDY):
        if not client.search_registered_models(f"name = '{name}'"):
            about = (
                f"Adapters on `{deployment.backbone}`, each for requests to suppress people. "
                f"`@{CHAMPION}` is the one to serve, `@{PREVIOUS}` the one before it (`vgid "
                "rollback`); `mlflow.pyfunc.load_model` needs the package `vgid`."
            )
            client.create_registered_model(name, {"vgid.backbone": deployment.backbone}, about)
        query = f"name = '{name}' and tags.`vgid.deployment_sha256` = '{shipped.sha256}'"
        found = [int(version.version) for version in client.search_model_versions(query)]
        version = max(found) if found else _make_version(open_store, name, file, shipped)
        champion = _aliases(client, name).get(CHAMPION)
        # Repeated after a break, the version may be champion already: were it its own predecessor,
        # a rollback would go nowhere.
        if champion not in (None, version):
            client.set_registered_model_alias(name, PREVIOUS, str(champion))
        client.set_registered_model_alias(name, CHAMPION, str(version))
    return version


def rollback(backbone: str, tracking_uri: str) -> tuple[int, int]:
    """Make the previous champion the champion again; its version, and that of the one till now.

    InputError where there is none to go back to, or MLflow refuses.
    """
    spec(backbone)
    client, shown = open_client(tracking_uri)
    name = registered_name(backbone)
    with one_sentence(f"--tracking-uri {shown}", "the champion cannot be changed", _REMEDY):
        champion, previous = (_aliases(client, name).get(alias) for alias in (CHAMPION, PREVIOUS))
        if champion is None or previous is None or champion == previous:
            raise InputError(
                f"--backbone {backbone}: no previous champion to go back to; its versions are in "
                f"the registry of {shown} as '{name}'."
            )
        # What is served changes first: after a break only the alias `previous` is stale.
        client.set_registered_model_alias(name, CHAMPION, str(previous))
        client.set_registered_model_alias(name, PREVIOUS, str(champion))
    return previous, champion


def _aliases(client: Any, name: str) -> dict[str, int]:
    """The version that has each alias; nothing where there is no such entry."""
    entries = client.search_registered_models(f"name = '{name}'")
    return {alias: int(number) for entry in entries for alias, number in entry.aliases.items()}


def _make_version(open_store: Connection, name: str, file: Path, shipped: Shipped) -> int:
    """Log the model, whole, and only then give it a number."""
    client, deployment, sha256 = open_store.client, shipped.deployment, shipped.sha256
    scores = deployment.scores
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
    table = score_grid(scores.base, scores.deployed, names=_SHOWN).markdown(gap="&emsp;")
    description = rendered("vgid.deployment", "registry.md.jinja", **dict(deployment), table=table)
    version = client.create_model_version(
        name,
        source=model.artifact_location,  # MLflow would look "models:/" up in another store
        run_id=run_id,
        tags=tags,
        description=description.rstrip(),
        model_id=model.model_id,
    )
    return int(version.version)


def _save(folder: Path, file: Path, deployment: Deployment) -> None:
    import mlflow.pyfunc
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    with tempfile.TemporaryDirectory() as parent:
        data = Path(parent) / "deployment"
        shutil.copytree(deployment.adapter_folder(file), data / deployment.adapter.path)
        # Under the name that finds the adapter by the record's path, also from an export.
        shutil.copyfile(file, data / f"{deployment.backbone}.yaml")
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
    tags = {"vgid.study_id": origin.study_id, "vgid.trial_id": origin.trial_id}
    query = " and ".join(f"tags.`{k}` = '{v}'" for k, v in tags.items())
    found = client.search_runs([open_store.experiment_id], query, max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags["vgid.kind"] = "deployment"
    name = run_name(deployment.hyperparameters, origin.trial_id)
    run = client.create_run(open_store.experiment_id, tags=tags, run_name=name)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


@dataclass(eq=False)
class DeployedModel:
    """The deployed model, loaded, with the record of what it is."""

    deployment: Deployment
    _backbone: Any
    _student: Any  # the adapter stays attached as long as this lives

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Answer each row's question on its image, greedily, as the benchmark asks open questions.

        ``model_input`` is a ``pandas.DataFrame`` with columns ``image`` (bytes of a PNG or JPEG
        file) and ``question``. InputError where one is missing, or an image cannot be read.
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
    """Load base and adapter of a deployment file; without ``device`` on the first GPU, if any.

    InputError where a file changed, the adapter is not whole, or the base is another one.
    """
    from vgid.models import adapters, backbones

    shipped = read_shipped(file)
    deployment = shipped.deployment
    path = model_path or deployment.base.model_path
    find_base(deployment, path)
    backbone = backbones.load(deployment.backbone, path, device)
    return DeployedModel(deployment, backbone, adapters.load_saved(backbone, shipped.adapter))
