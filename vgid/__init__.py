"""VGID: Visual-noise Guided In-context Distillation, and hyperparameter studies of it.

Rooms from the ground up, each of which imports only those before it: ``data`` and ``models``,
``method``, ``evaluation``, ``trial`` and ``report``, ``cluster``, ``study``; then ``deployment``,
``paper`` and ``bases``, which do not know each other; ``cli``. Modules beside the rooms are words
that every room uses. A trial knows nothing of Ray, Optuna or MLflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgid.config import RequestConfig, StudyConfig, TrialConfig
    from vgid.deployment.pick import PickConfig, pick_deployment
    from vgid.study.run import run_study
    from vgid.trial import run_trial

__version__ = "0.1.0"

__all__ = [
    "PickConfig",
    "RequestConfig",
    "StudyConfig",
    "TrialConfig",
    "pick_deployment",
    "run_study",
    "run_trial",
]

_MODULES = {
    "PickConfig": "vgid.deployment.pick",
    "pick_deployment": "vgid.deployment.pick",
    "run_study": "vgid.study.run",
    "run_trial": "vgid.trial",
}


def __getattr__(name: str) -> Any:
    # Late, so that `import vgid` and every command that needs no model start quickly.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "vgid.config")), name)
