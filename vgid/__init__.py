"""VGID: Visual-noise Guided In-context Distillation, and hyperparameter studies of it.

Rooms from the ground up, each of which imports only those before it: ``data`` and ``models``,
``method``, ``evaluation``, ``trial`` and ``report``, ``cluster``, ``study``; then ``deployment``,
``paper`` and ``bases``, which do not know each other; ``cli``. Modules beside the rooms are words
that every room uses. A trial knows nothing of Ray, Optuna or MLflow.
"""

__version__ = "0.1.0"
