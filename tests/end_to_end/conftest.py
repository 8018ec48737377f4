"""A benchmark and a small search space for studies of seconds."""

import socket
from pathlib import Path

import pytest

from tests.small_benchmark import write_small

SPACE = """
backbone: tiny-llava
methods:
  vgid:
    parameters:
      alpha: {low: 0.5, high: 2.0, log: true}
      noise_type: {choices: [random, white]}
      prompt_style: strict
      learning_rate: 2.0e-3
      epochs: 2
    first_points:
      - {alpha: 1.0, noise_type: random}
"""


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "data"
    write_small(folder)
    return folder


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(SPACE)
    return path
