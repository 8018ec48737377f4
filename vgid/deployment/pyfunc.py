"""A deployment as an MLflow model: base by revision, adapter beside it, no pickle, no code.

MLflow's ``python_function`` flavour names this module; ``mlflow.pyfunc.load_model`` calls
``_load_pyfunc`` with the folder of the deployment file. The package has to be installed where the
model is loaded: nothing that the registry keeps is ever executed. ::

    model = mlflow.pyfunc.load_model("models:/vgid-tiny-llava@champion")
    model.predict(pandas.DataFrame({"image": [png_bytes], "question": ["Who is this?"]}))

Meant for a smoke prediction; an exported model (``vgid export``) is what a server serves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgid.data.benchmark import decode_image
from vgid.deployment.record import Deployment, hash_files, read_deployment
from vgid.errors import InputError
from vgid.prompts import generation_text


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

    deployment, _ = read_deployment(file)
    folder = deployment.adapter_folder(file)
    if hash_files(folder) != deployment.adapter.files:
        raise InputError(f"{folder}: differs from its deployment file; register the pick again.")
    backbone = backbones.load(deployment.backbone, model_path or deployment.base.model_path, device)
    if backbone.revision != deployment.base.revision:
        raise InputError(
            f"{file}: was made for base revision {deployment.base.revision[:12]}, found "
            f"{backbone.revision[:12]}; name the right base with model_path."
        )
    return DeployedModel(deployment, backbone, adapter.load_saved(backbone, folder))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> DeployedModel:
    """MLflow's entry: ``path`` is the folder with the one deployment file.

    ``model_config`` may name ``model_path`` and ``device`` (see ``load_deployed``).
    """
    (file,) = Path(path).glob("*.yaml")
    config = model_config or {}
    return load_deployed(file, config.get("model_path"), config.get("device"))
