"""The way to an MLflow server or SQLite file, checked before a study starts."""

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from vgid.credentials import without_credentials
from vgid.errors import InputError
from vgid.report.tables import as_text

# How long a server may take to say that it is there; its requests may take longer.
PROBE_SECONDS = 2.0
SETTINGS = {  # before MLflow is imported
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # so that a dead server is noticed soon
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}

MAX_METRICS = 800  # in one request; MLflow takes 1,000 items, parameters and tags among them


@dataclass(frozen=True)
class Connection:
    """An open tracking store, with its ``MlflowClient``, and the backbone's experiment in it."""

    client: Any
    uri: str  # without credentials, for messages and commands
    experiment_id: str

    def answers(self) -> bool:
        """Whether a server gives a sign of life; a database is taken to."""
        return not is_http(self.uri) or _no_answer(self.uri, PROBE_SECONDS) is None

    def log(
        self,
        run_id: str,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write to a run: metrics by name, value, milliseconds and step; parameters but None.

        It takes as many requests as it must; the first has parameters and tags.
        """
        from mlflow.entities import Metric, Param, RunTag

        first, rest = [Metric(*each) for each in metrics[:MAX_METRICS]], metrics[MAX_METRICS:]
        known = {name: value for name, value in (params or {}).items() if value is not None}
        named = [Param(name, as_text(value)) for name, value in known.items()]
        marks = [RunTag(*tag) for tag in (tags or {}).items()]
        self.client.log_batch(run_id, first, named, marks, synchronous=True)
        if rest:
            self.log(run_id, rest)


def open_client(uri: str) -> tuple[Any, str]:
    """A store's ``MlflowClient`` and URI without credentials; ``InputError`` if none is there."""
    file = _database_file(uri)
    if file is not None and not file.is_file():
        raise InputError(
            f"--tracking-uri {without_credentials(uri)}: no database is there; name the one that "
            "a study wrote."
        )
    with _usable(uri) as opened:
        return opened


def connect(uri: str | None, output: Path, backbone: str) -> Connection:
    """Open the store, and find or create the backbone's experiment.

    Importing MLflow and making the tables of a new SQLite file take seconds, so callers do this in
    a thread, and before other processes open the file. Without a URI the file is ``mlflow.db`` in
    ``output``, the study's folder, and ``mlartifacts`` is beside it.

    Raises:
        InputError: the URI is none, nobody answers there, or the database cannot be opened.
    """
    output = output.expanduser().absolute()
    if uri is None:
        output.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{output / 'mlflow.db'}"
    with _usable(uri) as (client, shown):
        found = client.get_experiment_by_name(backbone)
        # It is found by its name all the same, and then refuses every run.
        if found is not None and found.lifecycle_stage == "deleted":
            raise InputError(
                f"--tracking-uri {shown}: experiment '{backbone}' is deleted; restore it with "
                f"'mlflow experiments restore --experiment-id {found.experiment_id}'."
            )
        if found is not None:
            return Connection(client, shown, found.experiment_id)
        # The kind opens the UI on the runs and their metrics instead of on chat traces.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        # A server knows its place for artifacts; otherwise MLflow takes the working folder.
        folder = (_database_file(uri) or output / "mlflow.db").parent / "mlartifacts"
        place = None if is_http(uri) else folder.as_uri()
        return Connection(client, shown, client.create_experiment(backbone, place, tags))


@contextmanager
def _usable(uri: str) -> Iterator[tuple[Any, str]]:
    """The client, and the URI without credentials; what goes wrong with it is one sentence."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    shown = without_credentials(uri)
    # MLflow itself would try for minutes.
    if is_http(uri) and (reason := _no_answer(shown, 10)) is not None:
        raise InputError(
            f"--tracking-uri {shown}: no MLflow server answers ({reason}); start it or leave the "
            "option out to record into the output folder."
        )
    from mlflow.tracking import MlflowClient

    # After the import, which sets its own levels: no word about every table that is made.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    remedy = "give an MLflow URI such as sqlite:////folder/mlflow.db or http://host:5000"
    with one_sentence(f"--tracking-uri {shown}", "cannot be used", remedy):
        yield MlflowClient(tracking_uri=uri, registry_uri=uri), shown


@contextmanager
def one_sentence(place: str, what: str, remedy: str) -> Iterator[None]:
    """What MLflow raises becomes an ``InputError`` that says what could not be done."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a store's client raises its own kinds, or is not installed
        raise InputError(f"{place}: {what} ({first_line(error)}); {remedy}.") from None


def search_runs(client: Any, experiment_id: str, query: str) -> list[Any]:
    """All runs of an experiment that meet ``query``, over as many pages as they take."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], query, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def is_http(uri: str) -> bool:
    """Whether a server is behind an address, and not a database."""
    return uri.startswith(("http://", "https://"))


def first_line(error: BaseException) -> str:
    """What an error says, short enough to stand inside a sentence, without credentials."""
    cause = getattr(error, "reason", None) or error  # urllib wraps the operating system's error
    reason = without_credentials(str(getattr(cause, "strerror", None) or cause)).strip()
    return reason.splitlines()[0][:200].rstrip(".") if reason else type(error).__name__


def _database_file(uri: str) -> Path | None:
    file = uri.removeprefix("sqlite:///").split("?")[0]
    return Path(file).absolute() if uri.startswith("sqlite:///") else None


def _no_answer(shown: str, timeout_s: float) -> str | None:
    """Why a server gives no sign of life; None if it does. Asked without credentials."""
    try:
        with urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=timeout_s):
            return None
    except urllib.error.HTTPError:
        return None  # somebody answers; whether we may write shows at the first request
    except (OSError, ValueError, HTTPException) as error:
        return first_line(error)
