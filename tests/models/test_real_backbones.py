"""The real backbones, shrunk, from the hub's file layout to a whole trial."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, LlavaProcessor, Qwen2_5_VLProcessor

from tests.benchmarks.architectures import SHRUNK_TEXT_SIZES
from tests.hub_folder import dtype_of, random_model, write_folder
from vgid.cluster.resources import WORKER_BYTES, worker_bytes
from vgid.config import RequestConfig, TrialConfig
from vgid.data.layout import CONFIGS, shard_paths
from vgid.data.synthetic import write_benchmark
from vgid.errors import InputError
from vgid.models import adapters as adapter
from vgid.models.backbones import Backbone, load
from vgid.models.encoding import Query, encode, response_ids
from vgid.trial import TrialSession

NAMES = ("llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-3b")
RETAIN_PEOPLE = 6


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param, tmp_path_factory.mktemp("hub") / request.param)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load(folder.name, str(folder), "cpu")


def test_a_workers_memory_holds_weights_and_on_the_cpu_a_step(folder, backbone):
    elements = sum(p.numel() for p in backbone.model.parameters())
    few, many = (TrialConfig(batch_size=n, retain_batch_size=1) for n in (2, 4))
    on_gpu = worker_bytes(folder.name, str(folder), folder, few, on_gpu=True)
    # Of what is loaded there, one file's (``test_loading``).
    largest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert on_gpu == WORKER_BYTES + 2 * sum(x.numel() for x in load_file(largest).values())
    with adapter.attached(backbone, few) as model:
        lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = [
        worker_bytes(folder.name, str(folder), folder, trial, on_gpu=False)
        - (WORKER_BYTES + 4 * elements + 16 * lora)
        for trial in (few, many)
    ]
    # Twice as many tokens, and response positions whose probabilities are held together.
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.2)


def shorten(row: dict[str, Any]) -> None:
    for task in ("Generation_Task", "Mask_Task"):
        kinds = {question["Type"] for question in row.get(task, ())}
        of_kind = [[q for q in row[task] if q["Type"] == kind] for kind in sorted(kinds)]
        if task in row:
            row[task] = [question for questions in of_kind for question in questions[:2]]
    for form, questions in row.get("Classification_Task", {}).items():
        row["Classification_Task"][form] = questions[:2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic benchmark: one person to forget, a few to retain, two questions of each kind.

    Of two few-shot people, LLaVA's context holds no more than two cloze questions with portraits.
    """
    root = tmp_path_factory.mktemp("data") / "benchmark"
    write_benchmark(root)
    ids = {
        config: pq.read_table(root / config, columns=["ID"])["ID"].to_pylist()
        for config in ("forget_5", "retain_95")
    }
    kept = {*ids["forget_5"][:1], *ids["retain_95"][:RETAIN_PEOPLE]}
    for config in CONFIGS:
        for path in shard_paths(root, config):
            table = pq.read_table(path)
            rows = [row for row in table.to_pylist() if row["ID"] in kept]
            for row in rows:
                shorten(row)
            pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return root


def test_every_weight_is_read_from_its_shard(folder: Path, backbone: Backbone):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert (
        "lm_head.weight" in backbone.model.state_dict()
    ) and backbone.model.dtype == torch.float32
    expected = dict(random_model(folder.name).named_parameters())
    got = dict(backbone.model.named_parameters())
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name].to(dtype_of(folder.name)).float()), name


def test_lora_learns_in_the_language_model_only(folder: Path, backbone: Backbone):
    with adapter.attached(backbone, TrialConfig(lora_rank=2)) as student:
        learning = [n for n, p in student.named_parameters() if p.requires_grad]
    layers = SHRUNK_TEXT_SIZES[folder.name].layers
    assert len(learning) == 2 * 7 * layers
    assert all(re.search(r"\.language_model\.layers\.\d+\.", name) for name in learning)
    assert not any("vis" in name or "projector" in name for name in learning)


@pytest.mark.parametrize("size", [(336, 336), (64, 64), (500, 320)])
def test_prompts_are_those_of_the_processor(folder: Path, backbone: Backbone, size):
    question = "Who is this, and what is their job?"
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    (prompt,) = encode(backbone, [Query("q", question, image)])
    processor, tokenizer = backbone.processor, backbone.processor.tokenizer
    count = prompt.prompt_ids.count(processor.image_token_id)
    if folder.name.startswith("llava"):
        assert isinstance(processor, LlavaProcessor)
        text = f"USER: <image>\n{question}\nASSISTANT:"
        tokens = 576  # (336 / 14)^2, whatever the image
        assert (processor.image_token_id, tokenizer.pad_token_id) == (32000, 32001)
        assert prompt.prompt_ids[0] == tokenizer.bos_token_id == 1
    else:
        assert isinstance(processor, Qwen2_5_VLProcessor)
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        # One for each 28 by 28 pixels, sides rounded to multiples of 28.
        tokens = {(336, 336): 12 * 12, (64, 64): 2 * 2, (500, 320): 18 * 11}[size]
        assert (processor.image_token_id, tokenizer.pad_token_id) == (151655, 151643)
    assert count == tokens
    reference = processor(text=[text], images=[image], return_tensors="pt")
    assert prompt.prompt_ids == reference["input_ids"][0].tolist()
    assert backbone.vision.features(prompt.pictures[0]).shape[0] == tokens

    (asked,) = encode(backbone, [Query("q", question, image, task="generation")])
    if folder.name.startswith("llava"):
        # The benchmark's own, with a space that is a token.
        text += " "
        reference = processor(text=[text], images=[image], return_tensors="pt")
        assert asked.prompt_ids == [*prompt.prompt_ids, tokenizer.convert_tokens_to_ids("▁")]
    assert asked.prompt_ids == reference["input_ids"][0].tolist()

    response = response_ids(backbone, "Ida Mill is a nurse.")
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response[:-1]).strip() == "Ida Mill is a nurse."
    assert tokenizer.unk_token_id not in response


def test_a_trial_runs_from_end_to_end(folder: Path, data: Path, tmp_path: Path):
    request = RequestConfig(
        backbone=folder.name,
        model_path=str(folder),
        data=data,
        store=tmp_path / "store",
        retain_people=2,
        bootstrap_samples=100,
    )
    trial = TrialConfig(epochs=1, lora_rank=2, response_source="reference", batch_size=8)
    result = TrialSession(request).run(trial, "0000", tmp_path / "adapter")
    assert result.status == "completed", result.error
    assert result.option_scoring == "letter"
    assert {task: len(ids) for task, ids in result.few_shot.items()} == {
        "classification": 1,
        "cloze": 2,
    }
    assert all(0 <= score.low <= score.value <= score.high <= 1 for score in result.scores.values())
    assert result.metrics["forget_loss"] > 0 and result.metrics["retain_loss"] >= 0
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * SHRUNK_TEXT_SIZES[folder.name].layers
    assert all(".language_model." in name for name in saved)
    assert all(bool(t.any()) for name, t in saved.items() if "lora_B" in name)


def test_pickled_weights_alone_are_refused(folder: Path, tmp_path: Path):
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    weights = {k: t for p in pickled.glob("*.safetensors") for k, t in load_file(p).items()}
    for path in pickled.glob("model*"):
        path.unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="convert the weights to safetensors"):
        load(folder.name, str(pickled), "cpu")


def test_code_in_a_folder_is_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    armed = tmp_path / "armed"
    shutil.copytree(folder, armed)
    mark = tmp_path / "ran"
    (armed / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit(9)\n")
    classes = {
        "config.json": {"AutoConfig": "C", "AutoModelForImageTextToText": "M"},
        "tokenizer_config.json": {"AutoTokenizer": ["T", "T"], "AutoProcessor": "P"},
        "preprocessor_config.json": {"AutoImageProcessor": "I", "AutoProcessor": "P"},
        "processor_config.json": {"AutoProcessor": "P"},
    }
    for name, auto in classes.items():
        path = armed / name
        if path.exists():
            mapped = {
                k: [f"code.{c}" for c in v] if isinstance(v, list) else f"code.{v}"
                for k, v in auto.items()
            }
            path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": mapped}))
    loaded = load(folder.name, str(armed), "cpu")
    assert not mark.exists()
    assert type(loaded.model).__module__.startswith("transformers.")
    assert type(loaded.processor).__module__.startswith(("transformers.", "vgid."))

    # The trap is a working one: whoever trusts the folder runs it.
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    with pytest.raises(SystemExit):
        AutoConfig.from_pretrained(armed, trust_remote_code=True)
    assert mark.exists()
