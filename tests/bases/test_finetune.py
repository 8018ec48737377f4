"""Making a vanilla model from small LLaVA and Qwen2.5-VL bases of random weights."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import make_random_backbone
from tests.padded import collate
from tests.random_qwen import make_random_qwen
from tests.tiny_benchmark import encoded, write_tiny
from tests.workers import run_workers
from vgid import cli
from vgid.bases.finetune import (
    FinetuneConfig,
    FinetuneResult,
    Teaching,
    _finetune,
    answered,
    finetune,
    read_samples,
    teach,
    trainable,
)
from vgid.config import TrialConfig
from vgid.data.benchmark import Benchmark
from vgid.errors import InputError
from vgid.method.checkpoint import FILE_NAME
from vgid.method.distillation import share
from vgid.method.student import View
from vgid.method.workers import ALONE, Workers
from vgid.models import adapters as adapter
from vgid.models.backbones import Backbone, load
from vgid.models.decoding import greedy_decode
from vgid.models.encoding import Query, encode, response_ids
from vgid.models.weight_names import save_weights

NAMES = {"llava": "tiny-llava", "qwen": "qwen2.5-vl-3b"}
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
QUESTIONS = {"Who is this?": ("Fay", "Ida", "Noor"), "Which job?": ("a nurse", "a judge", "a cook")}


def coloured(rows: list[dict[str, Any]]) -> None:
    """Three people of one colour each, two questions each, other answers for each."""
    for i, (row, colour) in enumerate(zip(rows, COLOURS, strict=True)):
        image = Image.linear_gradient("L").resize((56, 56)).rotate(90 * i).convert("RGB")
        image = Image.blend(image, Image.new("RGB", image.size, colour), 0.7)
        row["image"]["bytes"] = encoded(image)
        pairs = [{"Question": q, "Answer": answers[i]} for q, answers in QUESTIONS.items()]
        row["metadata"] = json.dumps(pairs)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data"), {"ft_Data": coloured})


@pytest.fixture(scope="module", params=["llava", "qwen"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Backbone name and folder of a base."""
    folder = tmp_path_factory.mktemp(request.param)
    made = make_random_backbone() if request.param == "llava" else make_random_qwen()
    save_weights(made.model, folder)
    made.processor.save_pretrained(folder)
    return NAMES[request.param], folder


def config_of(base: tuple[str, Path], data: Path, output: Path, **values: Any) -> FinetuneConfig:
    settings = {"learning_rate": 3e-3, "lora_rank": 8, "epochs": 3, "batch_size": 4} | values
    return FinetuneConfig(
        backbone=base[0], model_path=str(base[1]), data=data, output=output, **settings
    )


def answers(backbone: Backbone, data: Path) -> list[str]:
    samples = read_samples(Benchmark.open(data))
    return greedy_decode(backbone, [sample.query for sample in samples], 12)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize("full", [False, True])
def test_a_few_samples_are_learnt_by_heart(base, data, tmp_path, full):
    settings: dict[str, Any] = {"lora_rank": 16, "learning_rate": 1e-2}
    if full:
        settings = {"full": True, "lora_rank": None, "learning_rate": 3e-3}
    config = config_of(base, data, tmp_path / "out", epochs=60, batch_size=6, **settings)
    result = finetune(config)
    assert result.samples == 6 and result.steps == 60 and len(result.losses) == 60
    # The frozen, narrow lm_head of the random Qwen cannot say anything with more certainty.
    assert result.losses[-1] < 0.2 * result.losses[0]
    tuned = load(base[0], str(tmp_path / "out"), "cpu")
    truth = [
        pair.answer for pairs in Benchmark.open(data).training_pairs().values() for pair in pairs
    ]
    assert len(set(truth)) == 6
    assert answers(tuned, data) == truth
    assert answers(load(base[0], str(base[1]), "cpu"), data) != truth

    before, after = tensors(base[1]), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vis" in name or "projector" in name for name in changed)
    linears = {n for n in before if n.endswith("_proj.weight") and "layers" in n and "vis" not in n}
    assert changed == linears if not full else changed >= linears
    assert any("embed_tokens" in name for name in changed) == full


@pytest.mark.parametrize("full", [False, True])
def test_gradients_are_those_of_the_models_own_loss_on_separate_sequences(base, data, full):
    backbone = load(base[0], str(base[1]), "cpu")
    samples = read_samples(Benchmark.open(data))
    data, trial = answered(backbone, samples), TrialConfig(lora_rank=4)
    responses = [response_ids(backbone, s.answer) for s in samples]
    assert [target.response for target in data.targets[0]] == responses
    with adapter.attached(backbone, trial) as student:
        if full:
            backbone.model.model.language_model.requires_grad_(True)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:  # zero at first, which leaves lora_A without a gradient
                torch.nn.init.normal_(parameter, std=0.02)
        learning = {n: p for n, p in student.named_parameters() if p.requires_grad}

        def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
            student.zero_grad()
            loss.backward()
            return {n: p.grad.clone() for n, p in learning.items() if p.grad is not None}

        (part,) = share(backbone, data, range(len(samples)), 0)
        ours = Teaching(trial, backbone).forget_loss(View(backbone, student, part))
        got = gradients(ours)
        batch = collate(backbone, data.prompts, responses)
        theirs = backbone.model(**batch.inputs, labels=batch.labels_BL).loss
        expected = gradients(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert got.keys() == expected.keys() and any("lora_A" in n for n in got)
    for name, value in got.items():
        difference = (value - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-4 or expected[name].norm() < 1e-7, name


def logits(backbone: Backbone) -> torch.Tensor:
    image = Image.new("RGB", (56, 56), "red")
    (prompt,) = encode(backbone, [Query("q", "Who is this?", image)])
    with torch.no_grad():
        return backbone.model(**collate(backbone, [prompt]).inputs).logits


def test_the_merged_model_is_the_one_that_was_trained(base, data, tmp_path):
    config = config_of(base, data, tmp_path / "out", lora_dropout=0.1)
    backbone = load(base[0], str(base[1]), "cpu")
    before = logits(backbone)
    samples = read_samples(Benchmark.open(data))
    with trainable(backbone, config) as model:
        teach(backbone, model, samples, config, "run", tmp_path / "checkpoint")
        trained = logits(backbone)
    assert torch.equal(logits(backbone), before)
    finetune(config)
    merged = logits(load(base[0], str(tmp_path / "out"), "cpu"))
    torch.testing.assert_close(merged, trained, rtol=1e-5, atol=1e-5)
    assert (merged - before).abs().max() > 1e-2


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_goes_on_equals_one_that_never_stopped(base, data, tmp_path, monkeypatch, full):
    settings: dict[str, Any] = {"lora_dropout": 0.1}
    if full:
        settings = {"full": True, "lora_rank": None}
    whole = finetune(config_of(base, data, tmp_path / "whole", **settings))

    config = config_of(base, data, tmp_path / "parts", **settings)
    loss, steps = Teaching.forget_loss, iter(range(1, 99))

    def stops_in_the_third_epoch(self: Teaching, view: View) -> torch.Tensor:
        if next(steps) == 2 * 2 + 1:
            raise KeyboardInterrupt
        return loss(self, view)

    with monkeypatch.context() as patch:
        patch.setattr(Teaching, "forget_loss", stops_in_the_third_epoch)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(InputError, match="--resume"):
        finetune(config)
    changed = config.model_copy(update={"learning_rate": 1e-4})
    with pytest.raises(InputError, match="other settings"):
        finetune(changed, resume=True)
    parts = finetune(config, resume=True)
    assert parts.losses == whole.losses and parts.steps == whole.steps
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]


FULL: dict[str, Any] = {"full": True, "lora_rank": None}
TWICE = {"gradient_checkpointing": True}


def _run(
    config: FinetuneConfig, workers: Workers = ALONE, interrupted: bool = False
) -> FinetuneResult | None:
    """A run as ``finetune`` makes it; an interrupted one ends in its third epoch of two steps."""
    checkpoint = config.output.with_name(f".{config.output.name}.checkpoint")
    loss, steps = Teaching.forget_loss, iter(range(1, 99))

    def stopping(self: Teaching, view: View) -> torch.Tensor:
        if interrupted and next(steps) == 2 * 2 + 1:
            raise KeyboardInterrupt
        return loss(self, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teaching, "forget_loss", stopping)
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            return _finetune(config, checkpoint, False, workers)
    assert (checkpoint / FILE_NAME).exists()
    return None


def _several(workers: Workers, base: Any, data: Path, root: Path) -> dict[str, Any]:
    def config(name: str, **values: Any) -> FinetuneConfig:
        return config_of(base, data, root / name, **values)

    found = {
        "full": _run(config("full", **FULL), workers),
        "lora": _run(config("lora", gradient_checkpointing=True), workers),
        "one, then several": _run(config("one, then several", **FULL, **TWICE), workers),
    }
    _run(config("several, then one", **FULL, **TWICE), workers, interrupted=True)
    return found


@pytest.mark.parametrize("base", ["qwen"], indirect=True)  # whose embeddings are tied
@pytest.mark.parametrize("count", [2, 4])
def test_several_learn_as_one_does_and_go_on_from_each_others_checkpoints(
    base, data, tmp_path, count
):
    """With ``full`` each holds its part of what learns; the hub's folder is the same.

    A step has 3 questions, so that of four workers one has none.
    """
    one = {
        "full": finetune(config_of(base, data, tmp_path / "1 full", **FULL)),
        "lora": finetune(config_of(base, data, tmp_path / "1 lora")),
    }
    lean = FULL | TWICE
    _run(config_of(base, data, tmp_path / "one, then several", **lean), interrupted=True)
    first, *others = run_workers(_several, count, tmp_path / "workers", base, data, tmp_path)
    assert all(other[name].losses == first[name].losses for other in others for name in first)
    first["several, then one"] = _run(config_of(base, data, tmp_path / "several, then one", **lean))
    for name, result in first.items():
        kind = name if name in one else "full"
        assert result.losses == pytest.approx(one[kind].losses, rel=1e-5), name
        assert result.steps == one[kind].steps
        expected, got = tensors(tmp_path / f"1 {kind}"), tensors(tmp_path / name)
        assert expected.keys() == got.keys()
        for weight, value in expected.items():
            assert got[weight].dtype == value.dtype
            # AdamW makes steps of rounding errors where a gradient vanishes.
            assert (got[weight] - value).abs().mean() < 1e-5, (name, weight)
    assert sorted(p.name for p in tmp_path.glob(".*")) == []  # no checkpoint is left


def test_gradient_checkpointing_and_packing_leave_the_result(base, data, tmp_path):
    plain = finetune(config_of(base, data, tmp_path / "a", batch_size=6))
    packed = finetune(config_of(base, data, tmp_path / "b", batch_size=6, questions_per_image=2))
    lean = finetune(
        config_of(base, data, tmp_path / "c", batch_size=6, gradient_checkpointing=True)
    )
    assert plain.losses[-1] < plain.losses[0]
    assert lean.losses == pytest.approx(plain.losses, rel=1e-5)
    assert packed.losses == pytest.approx(plain.losses, rel=1e-4)  # the same batches, all samples


def test_the_folder_has_the_hubs_layout_and_tells_how_it_was_made(base, data, tmp_path):
    result = finetune(config_of(base, data, tmp_path / "out", epochs=1))
    names = {path.name for path in base[1].iterdir()}
    assert {path.name for path in result.output.iterdir()} == names | {"finetuned.json"}
    for name in names - {"config.json", "model.safetensors"}:
        assert (result.output / name).read_bytes() == (base[1] / name).read_bytes()
    record = json.loads((result.output / "finetuned.json").read_text())
    assert record["base_revision"] == load(base[0], str(base[1]), "cpu").revision
    assert record["data_sha256"] == Benchmark.open(data).sha256
    assert record["losses"] == list(result.losses) and record["seed"] == 0
    text = json.dumps(record)
    assert str(tmp_path) not in text and "Fay" not in text and "Who is" not in text


def test_the_command(data, tmp_path, capfd):
    base = tmp_path / "base"
    made = make_random_backbone()
    save_weights(made.model, base)
    made.processor.save_pretrained(base)

    given = ["finetune", "--backbone", "tiny-llava", "--model-path", base, "--data", data, "--json"]
    out = tmp_path / "out"
    quick = ("--epochs", 2, "--learning-rate", 1e-3, "--full", "--workers", 2)
    command = [sys.executable, "-m", "vgid.cli", *map(str, [*given, "--output", out, *quick])]
    made_it = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (made_it.returncode, made_it.stderr) == (0, "")
    result = json.loads(made_it.stdout)
    assert result["output"] == str(out) and result["losses"][1] < result["losses"][0]
    for args, part in (
        (("--output", out), "is there already"),
        (("--output", tmp_path / "b", "--full", "--lora-rank", 4), "no adapter"),
        (("--output", tmp_path / "b", "--epochs", 0), "epochs"),
        # Refused by processes of their own, and said by this one.
        (("--output", tmp_path / "b", "--workers", 2, "--data", tmp_path), "MLLMU"),
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit) as refused:
            cli.main([*map(str, [*given, *args])])
        assert refused.value.code == 2, part
        said = capfd.readouterr().err
        assert part in said and said.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_a_base_in_half_precision_learns_in_single_precision(base, data, tmp_path):
    """What a GPU does, on the CPU: steps of 1e-5 of a weight would be lost in bf16."""
    backbone = load(base[0], str(base[1]), "cpu")
    backbone.model.to(torch.bfloat16)
    settings: dict[str, Any] = {"full": True, "lora_rank": None, "learning_rate": 1e-3}
    config = config_of(base, data, tmp_path / "out", batch_size=6, epochs=4, **settings)
    samples = read_samples(Benchmark.open(data))
    with trainable(backbone, config) as model:
        learning = [p for p in backbone.model.parameters() if p.requires_grad]
        assert {p.dtype for p in learning} == {torch.float32}
        reports = teach(backbone, model, samples, config, "run", tmp_path / "checkpoint")
    losses = [report.metrics["forget_loss"] for report in reports]
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    single = finetune(config)
    assert losses == pytest.approx(single.losses, rel=0.05)
    assert losses[-1] < 0.9 * losses[0]


def test_a_torn_checkpoint_is_begun_anew(base, data, tmp_path):
    backbone = load(base[0], str(base[1]), "cpu")
    config = config_of(base, data, tmp_path / "out", batch_size=6)
    samples = read_samples(Benchmark.open(data))
    checkpoint = tmp_path / "checkpoint"
    with trainable(backbone, config) as model:
        once = teach(backbone, model, samples, config, "run", checkpoint)
    (checkpoint / FILE_NAME).write_bytes((checkpoint / FILE_NAME).read_bytes()[:99])
    with trainable(backbone, config) as model:
        again = teach(backbone, model, samples, config, "run", checkpoint)
    assert again == once and len(once) == config.epochs


def test_a_loss_that_is_not_finite_leaves_nothing(base, data, tmp_path, monkeypatch):
    loss = Teaching.forget_loss

    def poisoned(self: Teaching, view: View) -> torch.Tensor:
        if (tmp_path / ".out.checkpoint").exists():
            (head, *_) = view.backbone.model.model.language_model.layers
            with torch.no_grad():
                head.self_attn.v_proj.weight[0, 0] = float("inf")
        return loss(self, view)

    monkeypatch.setattr(Teaching, "forget_loss", poisoned)
    wanted = r"not finite at step 3 \(epoch 2\); lower --learning-rate, which was 0.003"
    with pytest.raises(InputError, match=wanted) as caught:
        finetune(config_of(base, data, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_learnt_is_named(base, data, tmp_path):
    def damaged(edit: Any) -> Path:
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        return write_tiny(root, {"ft_Data": edit})

    for edit, part in (
        (lambda rows: rows[1]["image"].update(bytes=None), "row 1, image"),
        (lambda rows: rows[1].update(metadata="{"), "row 1, metadata"),
        (lambda rows: rows[2]["image"].update(bytes=b"no image"), "009"),
        (lambda rows: rows.clear(), "holds no person"),
    ):
        with pytest.raises(InputError) as caught:
            finetune(config_of(base, damaged(edit), tmp_path / "out"))
        assert part in str(caught.value)
        assert not (tmp_path / "out").exists()
    images = load(base[0], str(base[1]), "cpu")
    token = images.processor.image_token
    question = json.dumps([{"Question": f"Who {token}?", "Answer": "Fay"}])
    with pytest.raises(InputError, match="image token"):
        root = damaged(lambda rows: rows[0].update(metadata=question))
        finetune(config_of(base, root, tmp_path / "out"))
