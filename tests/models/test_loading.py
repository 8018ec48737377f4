"""Loading a base onto an accelerator: what of it passes through the node's memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.architectures import config_of
from tests.hub_folder import write_folder

NAME = "llava-1.5-7b"
SHARD = 128 * 10**6
LAYERS = 40

# The accelerator is made up: torch's meta device takes a tensor whose bytes were copied once, as a
# driver stages them, and keeps nothing of it in the node's memory.
LOADING = """
import json, sys, threading, time
from pathlib import Path
import torch
from transformers import core_model_loading
from vgid.models import backbones

torch.set_num_threads(1)
read = []

def staged(tensor, device=None, dtype=None):
    copied = tensor[...].clone()
    read.append(copied.nbytes)
    return copied.to(device=device, dtype=dtype)

core_model_loading._materialize_copy = staged

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

name, folder, device = sys.argv[1:]
backbones.outline(name, folder)  # imports are none of it
before, peak, done = held(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = backbones.load(name, folder, device).model
done = True
watcher.join()
kinds = sorted({p.device.type for p in (*model.parameters(), *model.buffers())})
print(json.dumps({"peak": peak - before, "read": sum(read), "kinds": kinds}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A narrow LLaVA of 500 MB in shards of 128 MB, with the real number of layers and more."""
    from transformers import AutoModelForImageTextToText

    folder = write_folder(NAME, tmp_path_factory.mktemp("hub") / NAME)
    for path in folder.glob("model*"):
        path.unlink()
    config = config_of(NAME, shrink=True)
    text = {"hidden_size": 640, "intermediate_size": 1720, "num_hidden_layers": LAYERS}
    for key, value in text.items():
        setattr(config.text_config, key, value)
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 10
    config.text_config.head_dim = 64
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


def load(folder: Path, device: str) -> dict:
    command = [sys.executable, "-c", LOADING, NAME, str(folder), device]
    # glibc keeps freed blocks for later as it pleases (up to all that two threads copied); with a
    # fixed threshold it gives each of these back at once, and the peak is what is in use.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


def test_a_base_never_passes_through_the_nodes_memory_as_a_whole(folder):
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(shards) >= 4
    placed, kept = load(folder, "meta"), load(folder, "cpu")
    assert placed["kinds"] == ["meta"] and kept["kinds"] == ["cpu"]
    # All is read in both; on the CPU, where it belongs, all stays as well.
    assert placed["read"] == kept["read"] == pytest.approx(sum(shards), rel=0.01)
    assert placed["peak"] < 1.1 * max(shards)
    assert kept["peak"] > sum(shards)
