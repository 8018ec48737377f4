"""A small OpenAI-compatible server of the real tiny models: base and adapter under given names."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from vgid.data.benchmark import decode_image
from vgid.models import adapters as adapter
from vgid.models.backbones import load
from vgid.models.decoding import greedy_decode
from vgid.models.encoding import Query

Key = tuple[str, bytes | None]
"""What is asked: text, and the pixels of the image if any."""

Answers = Mapping[Key, str]


def key_of(content: Sequence[Mapping[str, Any]]) -> Key:
    """Reads the parts of a message."""
    text = "".join(part["text"] for part in content if part["type"] == "text")
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    if not urls:
        return text, None
    return text, decode_image(base64.b64decode(urls[0].partition(",")[2])).tobytes()


def model_answers(
    name: str,
    contents: Sequence[Sequence[Mapping[str, Any]]],
    folder: Path | None,
    base: Path | None = None,
) -> Answers:
    """What the base, or an adapter on it, answers to messages; ``base`` instead of its own."""
    backbone = load(name, None if base is None else str(base), "cpu")
    queries = []
    for number, content in enumerate(contents):
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        image = decode_image(base64.b64decode(urls[0].partition(",")[2])) if urls else None
        queries.append(Query(str(number), key_of(content)[0], image))
    if folder is None:
        answers = greedy_decode(backbone, queries)
    else:
        with adapter.loaded(backbone, folder):
            answers = greedy_decode(backbone, queries)
    return dict(zip(map(key_of, contents), answers, strict=True))


@contextmanager
def serving(models: Mapping[str | None, Answers]) -> Iterator[str]:
    """Serve on the loopback; gives the URL.

    Args:
        models: answers by model name, under None those to a request that names no model; a name
            that is not there is refused, and so is a request without one.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = [{"id": name, "object": "model"} for name in models if name is not None]
            self._reply(200 if self.path == "/v1/models" else 404, {"data": listed})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions" or body.get("model") not in models:
                self._reply(404, {"error": {"message": "no such model"}})
                return
            assert body.keys() <= {"messages", "model"}  # as most clients send it
            (message,) = body["messages"]
            text = models[body.get("model")][key_of(message["content"])]
            self._reply(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

        def _reply(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
