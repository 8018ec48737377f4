"""A real vLLM serves exports by the commands that are printed, and answers as the platform does.

``make test-serving`` runs it, with a vLLM for the CPU in an environment of its own; ``make test``
does not. Of each embedded backbone a deployment of two people, by a short trial.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deployment.openai_server import key_of, model_answers
from vgid.data.benchmark import Benchmark
from vgid.data.synthetic import write_benchmark
from vgid.deployment.export import Exported, export
from vgid.deployment.record import read_deployment
from vgid.deployment.unlearn import UnlearnConfig, unlearn
from vgid.deployment.verify import Endpoint, open_questions, verify_served
from vgid.models.backbones import EMBEDDED

START_S = 900
pytestmark = pytest.mark.timeout(2 * START_S)


@dataclass(frozen=True)
class Export:
    """An export, with what it was made from."""

    backbone: str
    data: Path
    exported: Exported

    @property
    def folder(self) -> Path:
        return self.exported.output

    @property
    def name(self) -> str:
        return f"{self.backbone}-0000"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "benchmark"
    write_benchmark(folder)
    return folder


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen2.5-vl"])
def shipped(request, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    root = tmp_path_factory.mktemp(request.param)
    config = UnlearnConfig(
        backbone=request.param,
        data=data,
        forget_ids=Benchmark.open(data).person_ids("forget_5")[:2],
        output=root,
        request_id=("R-1",),
        setting=("method=ga", "epochs=6", "learning_rate=2e-3"),
        min_forget=None,  # a short trial; enough to tell it from the base
        retain_people=6,
        seeds=1,
    )
    return Export(request.param, data, export(unlearn(config).file, root / "export"))


@contextmanager
def running(command: str, folder: Path, log: Path) -> Iterator[str]:
    """Run a printed command in an export's folder, on a free port; gives the URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OMP_", "VLLM_"))}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {port}"],
            cwd=folder,
            env=clean | settings,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(server, url, log)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"vLLM does not start:\n{log.read_text()[-6000:]}")


def refusal(url: str, name: str, messages: list[dict[str, Any]]) -> str:
    """What the server says to messages that it must refuse."""
    body = json.dumps({"model": name, "messages": messages}).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 400
    return caught.value.read().decode()


def test_the_merged_model_answers_as_measured(shipped: Export, tmp_path: Path):
    with running(shipped.exported.serve, shipped.folder, tmp_path / "log") as url:
        found = verify_served(shipped.folder, url, shipped.data)
        assert found.verified, found.conclusion
        assert [c.name for c in found.checks if c.name.startswith("served")] == [
            f"served under {shipped.name}",
            "served under no name",
        ]
        deployment, _ = read_deployment(shipped.folder / "deployment.yaml")
        asked = open_questions(deployment, Benchmark.open(shipped.data))
        contents = [one.content for one in asked]
        merged = model_answers(shipped.backbone, contents, None, shipped.folder / "merged")
        served = [Endpoint(url).answer(shipped.name, content) for content in contents]
        equal = sum(a == merged[key_of(c)] for a, c in zip(served, contents, strict=True))
        print(f"{shipped.backbone}: {equal} of {len(asked)} answers are equal")
        assert equal == len(asked)

        (image, text) = contents[0]
        turn = {"role": "user", "content": [image, text]}
        system = {"role": "system", "content": "You are helpful."}
        assert "no system message" in refusal(url, shipped.name, [system, turn])
        answered = [{"role": "assistant", "content": "Ann."}, {"role": "user", "content": "Who?"}]
        assert "One user message" in refusal(url, shipped.name, [turn, *answered])
        twice = {"role": "user", "content": [image, image, text]}
        assert "At most 1 image" in refusal(url, shipped.name, [twice])
        token = "<image>" if shipped.backbone == "tiny-llava" else "<|image_pad|>"
        for content in (f"Who is {token}?", [image, {"type": "text", "text": f"Who is {token}?"}]):
            said = refusal(url, shipped.name, [{"role": "user", "content": content}])
            assert "image token" in said


def test_the_adapter_beside_the_base_is_not_verified(shipped: Export, tmp_path: Path):
    base = EMBEDDED / shipped.backbone
    assert shipped.exported.compare is not None
    command = shipped.exported.compare.replace("serve BASE", f"serve {base}")
    with running(command, shipped.folder, tmp_path / "log") as url:
        found = verify_served(shipped.folder, url, shipped.data)
    assert not found.verified
    verdicts = {c.name: c.passed for c in found.checks if c.name.startswith("served")}
    assert verdicts == {
        f"served under {base}": False,
        f"served under {shipped.name}": True,
        "served under no name": False,
    }
