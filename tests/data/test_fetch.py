"""Fetching against a hub served here for real: its revision, tree and resolve routes over HTTP."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.tiny_benchmark import SHARD, WHO, write_tiny
from vgid.data.benchmark import Benchmark
from vgid.data.fetch import REPOSITORY, REVISION

MAIN = "5" * 40
BIG = f"ft_Data/{SHARD}"


class Hub(ThreadingHTTPServer):
    """One data set at two revisions (the pinned one and ``main``), with the same files.

    Attributes:
        refusal: status and headers of every answer, or only of those with files, if the hub
            refuses.
        sizes: sizes that are told in place of the true ones.
        cut_at: bytes after which the next answer with a file is cut, by path.
        dies: once every parquet file was asked for and one was cut, connections are closed without
            an answer (``dead``).
        requests: method, path and Range header of each request.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.refuse_files_only = False
        self.sizes: dict[str, int] = {}
        self.cut_at: dict[str, int] = {}
        self.dies = False
        self.dead = False
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self, name: str) -> list[str | None]:
        """Range headers of the downloads of a file."""
        return [r for m, path, r in self.requests if m == "GET" and path.endswith(f"/{name}")]

    def all_asked_for(self) -> bool:
        """Whether every parquet file was asked for."""
        return all(self.ranges(name) for name in self.files if name.endswith(SHARD))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.dead:
            self.close_connection = True
            return
        is_file = "/resolve/" in path
        if hub.refusal is not None and (is_file or not hub.refuse_files_only):
            status, headers = hub.refusal
            self.reply(status, b"{}", headers)
            return
        api = f"/api/datasets/{REPOSITORY}"
        if path.startswith(f"{api}/revision/"):
            commit = {"main": MAIN, MAIN: MAIN, REVISION: REVISION}.get(path.rsplit("/", 1)[1])
            if commit is None:
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [
                {"rfilename": n, "size": hub.sizes.get(n, len(b))} for n, b in hub.files.items()
            ]
            self.reply_json({"id": REPOSITORY, "sha": commit, "siblings": siblings})
        elif path.startswith(f"{api}/tree/"):
            self.reply_json(
                [
                    {"type": "file", "path": name, "size": len(body), "oid": digest(body)[:40]}
                    for name, body in hub.files.items()
                ]
            )
        elif is_file:
            commit, name = path.split("/resolve/")[1].split("/", 1)
            self.reply_file(name, hub.files[name], commit)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply_file(self, name: str, body: bytes, commit: str) -> None:
        headers = {"ETag": f'"{digest(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if (wanted := self.headers.get("Range")) is not None:
            status, start = 206, int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = self.server.cut_at.pop(name, None) if self.command == "GET" else None
        if cut is None:
            self.reply(status, body[start:], headers)
            return
        while self.server.dies and not self.server.all_asked_for():
            time.sleep(0.01)
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body) - start), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[start:cut])
        self.close_connection = True
        self.server.dead = self.server.dies


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def large_portrait() -> bytes:
    """A PNG of 13 MB: the hub client takes up a broken file at multiples of 10 MiB."""
    noise = np.random.default_rng(0).integers(0, 256, (2100, 2100, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    portrait = large_portrait()
    root = tmp_path_factory.mktemp("original")
    return write_tiny(root, {"ft_Data": lambda rows: rows[0]["image"].update(bytes=portrait)})


@pytest.fixture
def hub(original: Path) -> Iterator[Hub]:
    files = {f"{config}/{SHARD}": (original / config / SHARD).read_bytes() for config in WHO}
    # What a hub has besides, and what nobody here wants.
    files |= {"README.md": b"# card", ".gitattributes": b"x", "Full_Set/train.zip": b"zip"}
    with Hub(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(endpoint: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vgid.cli", "data", "fetch", *map(str, args)]
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=outside | {"HF_ENDPOINT": endpoint} | environment,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith(".\n"), result.stderr
    for part in parts:
        assert part in result.stderr


def test_all_configs_come_whole_at_the_pinned_commit(hub: Hub, original: Path, tmp_path: Path):
    folder = tmp_path / "new" / "benchmark"
    first = fetch(hub.url, folder, "--json", HF_HOME=str(tmp_path / "home"))
    assert (first.returncode, first.stderr) == (0, "")
    report = json.loads(first.stdout)
    assert report["commit"] == report["revision"] == REVISION
    assert report["files"] == len(WHO) and report["check"]["defects"] == []
    assert report["check"]["configs"]["Test_Set"]["images"] == 6
    assert Benchmark.open(folder).sha256 == Benchmark.open(original).sha256
    assert sorted(p.name for p in folder.iterdir()) == sorted([*WHO, "fetched.json"])
    assert [p.name for p in folder.parent.iterdir()] == ["benchmark"]
    record = json.loads((folder / "fetched.json").read_text())
    assert record["commit"] == REVISION and record["bytes"][BIG] == len(hub.files[BIG])
    assert not any("README" in path or "zip" in path for _, path, _ in hub.requests)

    hub.requests.clear()
    again = fetch(hub.url, folder, "--json", HF_HOME=str(tmp_path / "home"))
    assert (again.returncode, hub.requests) == (0, [])
    assert json.loads(again.stdout) == report

    other = fetch(hub.url, folder, "--revision", "main", HF_HOME=str(tmp_path / "home"))
    assert_refused(other, REVISION, MAIN, "another folder")


def test_a_cut_connection_is_taken_up_where_it_broke(hub: Hub, original: Path, tmp_path: Path):
    hub.cut_at[BIG] = 11 * 2**20
    result = fetch(hub.url, tmp_path / "b", "--revision", "main", HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert hub.ranges(BIG) == [None, f"bytes={10 * 2**20}-"]
    assert Benchmark.open(tmp_path / "b").sha256 == Benchmark.open(original).sha256
    record = json.loads((tmp_path / "b" / "fetched.json").read_text())
    assert (record["revision"], record["commit"]) == ("main", MAIN)
    assert "No defects" in result.stdout and MAIN in result.stdout
    assert "Fetching 10 files: 100%" in result.stderr


def test_a_fetch_that_broke_off_is_continued_by_the_next(hub: Hub, original: Path, tmp_path: Path):
    hub.cut_at[BIG] = 5
    hub.dies = True
    small = {name for name in hub.files if name.endswith(SHARD) and name != BIG}
    broken = fetch(hub.url, tmp_path / "b", "--json", HF_HOME=str(tmp_path / "home"))
    assert_refused(broken, "call again", "HF_ENDPOINT", "copy the data set")
    assert not (tmp_path / "b").exists()
    (partial,) = tmp_path.glob(".b.*.partial")
    assert {name for name in small if (partial / name).is_file()} == small

    hub.dead = hub.dies = False
    hub.requests.clear()
    result = fetch(hub.url, tmp_path / "b", "--json", HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert Benchmark.open(tmp_path / "b").sha256 == Benchmark.open(original).sha256
    assert all(hub.ranges(name) == [] for name in small) and hub.ranges(BIG) == [None]
    assert not list(tmp_path.glob(".b*"))


@pytest.mark.parametrize(
    ("status", "headers", "files_only", "parts"),
    [
        (401, {}, False, ("401", "HF_TOKEN")),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            False,
            ("401", "Invalid credentials", "HF_TOKEN"),
        ),
        (403, {"X-Error-Code": "GatedRepo"}, True, ("403", "gated", "HF_TOKEN")),
        (403, {"X-Error-Message": "forbidden"}, True, ("403", "forbidden", "HF_TOKEN")),
        (404, {"X-Error-Code": "RepoNotFound"}, False, ("404", "HF_ENDPOINT")),
        (500, {}, False, ("500", "HF_ENDPOINT", "copy the data set")),
    ],
)
def test_a_refusal_is_one_sentence(
    hub: Hub,
    tmp_path: Path,
    status: int,
    headers: dict[str, str],
    files_only: bool,
    parts: tuple[str, ...],
):
    hub.refusal, hub.refuse_files_only = (status, headers), files_only
    result = fetch(
        hub.url, tmp_path / "b", "--json", HF_HOME=str(tmp_path / "home"), HF_TOKEN="hf_secret"
    )
    assert_refused(result, REPOSITORY, *parts)
    assert "hf_secret" not in result.stderr and not (tmp_path / "b").exists()


def test_what_stands_in_the_way_is_one_sentence(hub: Hub, tmp_path: Path):
    home = str(tmp_path / "home")
    unknown = fetch(hub.url, tmp_path / "b", "--revision", "v9", HF_HOME=home)
    assert_refused(unknown, "404", "revision v9", "--revision")
    offline = fetch(hub.url, tmp_path / "b", HF_HOME=home, HF_HUB_OFFLINE="1")
    assert_refused(offline, "HF_HUB_OFFLINE", "by hand")
    nowhere = fetch("http://127.0.0.1:9", tmp_path / "b", HF_HOME=home)
    assert_refused(nowhere, "refused", "HF_ENDPOINT", "by hand")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    occupied = fetch(hub.url, tmp_path / "full", HF_HOME=home)
    assert_refused(occupied, "not an empty folder")
    assert (tmp_path / "full" / "note.txt").read_text() == "mine"

    hub.sizes[BIG] = 10**18
    assert_refused(fetch(hub.url, tmp_path / "b", HF_HOME=home), "are free", "make room")
    del hub.files[BIG]
    assert_refused(fetch(hub.url, tmp_path / "b", HF_HOME=home), "config ft_Data", "--revision")


def test_defects_of_what_came_are_listed(hub: Hub, tmp_path: Path):
    hub.files[f"Retain_Set/{SHARD}"] = b"torn"
    result = fetch(hub.url, tmp_path / "b", "--json", HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 2
    (defect,) = json.loads(result.stdout)["check"]["defects"]
    assert (defect["config"], defect["field"]) == ("Retain_Set", SHARD)
