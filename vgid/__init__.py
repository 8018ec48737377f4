"""VGID: Visual-noise Guided In-context Distillation, and hyperparameter studies of it.

The method (``interventions``, ``teacher``, ``objectives``, ``distillation``, ``evaluation``,
``trial``) knows nothing of Ray, Optuna or MLflow; ``ray_train``, ``search``, ``study`` and
``tracking`` wrap it. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
