"""Loads a registered deployment: every registered model stores this module's name, so it stays.

MLflow's ``python_function`` flavour calls ``_load_pyfunc`` with the folder of the deployment file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgid.deployment.registry import DeployedModel, load_deployed


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> DeployedModel:
    """MLflow's entry: ``path`` is the folder with the one deployment file.

    ``model_config`` may name ``model_path`` and ``device`` (see ``load_deployed``).
    """
    (file,) = Path(path).glob("*.yaml")
    config = model_config or {}
    return load_deployed(file, config.get("model_path"), config.get("device"))
