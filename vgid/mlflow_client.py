"""The way to an MLflow server or SQLite file, checked before a study starts."""

import logging
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgid.errors import InputError


@dataclass(frozen=True)
class Connection:
    """An open tracking store.

    Attributes:
        client: the ``mlflow.tracking.MlflowClient``.
        uri: where it writes, without credentials, for messages and commands.
        experiment_id: the backbone's experiment.
    """

    client: Any
    uri: str
    experiment_id: str


def connect(uri: str | None, output: Path, backbone: str) -> Connection:
    """Open the store, and find or create the backbone's experiment.

    Importing MLflow and making the tables of a new SQLite file take seconds, so callers do this in
    a thread. It must be done before other processes open the file.

    Args:
        uri: MLflow tracking URI; None for ``mlflow.db`` and ``mlartifacts`` in ``output``.
        output: the study's folder.
        backbone: name of the experiment.

    Raises:
        InputError: the URI is none, nobody answers there, or the database cannot be opened.
    """
    output = output.expanduser().absolute()
    if uri is None:
        output.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{output / 'mlflow.db'}"
    http = uri.startswith(("http://", "https://"))
    shown = _shown(uri)
    _import_quietly(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(backbone)
        if found is not None and found.lifecycle_stage == "deleted":
            raise InputError(
                f"--tracking-uri {shown}: experiment '{backbone}' is deleted; restore it with "
                f"'mlflow experiments restore --experiment-id {found.experiment_id}'."
            )
        if found is None:
            # The kind opens the UI on the runs and their metrics instead of on chat traces.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            # A server knows its place for artifacts; otherwise MLflow takes the working folder.
            artifacts = None if http else (_database_folder(uri) or output) / "mlartifacts"
            experiment_id = client.create_experiment(
                backbone, artifacts.as_uri() if artifacts else None, tags
            )
        else:
            experiment_id = found.experiment_id
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise InputError(
            f"--tracking-uri {shown}: cannot be used ({first_line(error)}); give an MLflow "
            "URI such as sqlite:////folder/mlflow.db or http://host:5000."
        ) from None
    return Connection(client, shown, experiment_id)


def open_existing(uri: str) -> tuple[Any, str]:
    """Open a store that is there already, to read from it; creates nothing.

    Returns:
        The ``mlflow.tracking.MlflowClient``, and the URI without credentials for messages.

    Raises:
        InputError: no such SQLite file, nobody answers, or the URI is none.
    """
    shown = _shown(uri)
    file = uri.removeprefix("sqlite:///").split("?")[0]
    if uri.startswith("sqlite:///") and not Path(file).is_file():
        raise InputError(
            f"--tracking-uri {shown}: there is no such file; name the study's own MLflow."
        )
    _import_quietly(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise InputError(
            f"--tracking-uri {shown}: cannot be read ({first_line(error)}); give an MLflow URI "
            "such as sqlite:////folder/mlflow.db or http://host:5000."
        ) from None
    return client, shown


def first_line(error: BaseException) -> str:
    """What an error says, short enough to stand inside a sentence."""
    cause = getattr(error, "reason", None) or error  # urllib wraps the operating system's error
    reason = str(getattr(cause, "strerror", None) or cause).strip()
    return reason.splitlines()[0][:200].rstrip(".") if reason else type(error).__name__


def _shown(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)  # no user, no password


def _import_quietly(uri: str) -> None:
    """Import MLflow set up for batch work, once an HTTP server has shown that it is there.

    Raises:
        InputError: nobody answers.
    """
    # Set before MLflow is imported: no usage reports, no links on the terminal, and a dead server
    # is noticed soon.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    if uri.startswith(("http://", "https://")):
        _check_answers(uri, _shown(uri))
    import mlflow.tracking  # noqa: F401

    # After the import, which sets its own levels: no word about every table that is made.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _database_folder(uri: str) -> Path | None:
    file = uri.removeprefix("sqlite:///").split("?")[0]
    return Path(file).absolute().parent if uri.startswith("sqlite:///") else None


def _check_answers(uri: str, shown: str) -> None:
    """Ask an HTTP server for a sign of life: MLflow itself would try for minutes.

    Raises:
        InputError: nobody answers.
    """
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # somebody answers; whether we may write shows at the first request
    except (OSError, ValueError) as error:
        raise InputError(
            f"--tracking-uri {shown}: no MLflow server answers ({first_line(error)}); start it or "
            "leave the option out to record into the output folder."
        ) from None
