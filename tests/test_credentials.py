"""Passwords in a tracking URI: used, and never written or shown."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from studies.pareto_search import main
from vgid.config import StudyConfig
from vgid.credentials import without_credentials
from vgid.errors import InputError
from vgid.study.ledger import Ledger
from vgid.study.mlflow_client import connect, open_client
from vgid.study.plan import make_plan

SHA = "0" * 64


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pa55@host:5000/mlflow", "http://host:5000/mlflow"),
        ("https://us%40er:pa55/w@rd@host", "https://host"),
        ("postgresql+psycopg2://user:pa55@/db?host=/run", "postgresql+psycopg2:///db?host=/run"),
        ("postgresql://h/db?user=u&password=pa55&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("to http://u:pa55@a/x and 'http://v:pa55@b/y'", "to http://a/x and 'http://b/y'"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("file:///home/me@work", "file:///home/me@work"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_addresses_and_messages_lose_their_credentials(text, shown):
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown


@pytest.fixture
def guarded():
    """A server that refuses everyone, and tells what they said."""
    asked: list[tuple[str, str | None]] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_error(401, "who are you?")

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("place", ["the address", "the environment"])
def test_a_server_hears_the_password_and_its_refusal_does_not_tell_it(
    guarded, tmp_path, caplog, monkeypatch, place
):
    port, asked = guarded
    user = "user:pa55word@" if place == "the address" else ""
    if not user:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55word")
    uri = f"http://{user}127.0.0.1:{port}"
    with pytest.raises(InputError, match="401") as refused:
        connect(uri, tmp_path, "tiny-llava")
    said = "Basic " + base64.b64encode(b"user:pa55word").decode()
    api = [authorization for path, authorization in asked if path != "/health"]
    assert api and set(api) == {said}
    client, shown = open_client(uri)
    with pytest.raises(Exception, match="401"):
        client.get_run("0" * 32)
    assert shown == f"http://127.0.0.1:{port}"
    assert "pa55word" not in str(refused.value) + caplog.text


@pytest.mark.parametrize(
    "uri",
    ["http://user:pa55word@127.0.0.1:9", "http://user:pa55word@[bad", "http://u:pa55word@h:port"],
)
def test_a_password_is_in_no_message_of_the_command_line(uri, tmp_path, capsys):
    output = str(tmp_path / "study")
    assert main(["--output", output, "--tracking-uri", uri, "--dry-run"]) == 0
    assert main(["--output", output, "--tracking-url", uri]) == 2  # an unknown flag is quoted
    with pytest.raises(InputError) as refused:
        connect(uri, tmp_path, "tiny-llava")
    shown = capsys.readouterr()
    assert "pa55word" not in shown.out + shown.err + str(refused.value)


def test_a_study_keeps_its_password_in_memory_only_and_takes_another(tmp_path):
    config = StudyConfig(output=tmp_path / "s", tracking_uri="http://user:pa55word@host")
    assert make_plan(config).config.tracking_uri == config.tracking_uri
    assert "pa55word" not in repr(config) + config.model_dump_json() + str(config.model_dump())
    with Ledger(config.output) as ledger:
        ledger.open(config, SHA, resume=False)
    kept = (config.output / "trials" / "study.json").read_text()
    assert json.loads(kept)["config"]["tracking_uri"] == "http://host"
    for uri in ("http://host", "http://user:an0ther@host"):
        other = config.model_copy(update={"tracking_uri": uri})
        with Ledger(config.output) as ledger:
            ledger.open(other, SHA, resume=True)
    elsewhere = config.model_copy(update={"tracking_uri": "http://user:pa55word@elsewhere"})
    with Ledger(config.output) as ledger, pytest.raises(InputError, match="http://host ") as told:
        ledger.open(elsewhere, SHA, resume=True)
    assert "http://elsewhere" in str(told.value) and "pa55word" not in str(told.value)
