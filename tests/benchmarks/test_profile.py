import json
import os
import subprocess
import sys

import pytest
import torch

from tests.benchmarks.architectures import TEXT_SIZES, config_of, random_backbone
from tests.benchmarks.cost_model import distinct_tokens, step_minimum
from tests.benchmarks.profile import (
    ASSUMED_MFU,
    ESTIMATED_PEAK,
    LORA_RANK,
    TABLE_HEADER,
    Figures,
    bf16_peak,
    estimate,
    measure,
    out_of_memory_explained,
)
from vgid.errors import InputError
from vgid.method.profile_prompts import QUESTION_TOKENS, RESPONSE_TOKENS, synthetic_set
from vgid.models.packing import hidden_states, pack

PARAMETERS = {
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": sum(
        (
            2 * 32064 * 5120,
            40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120,
            303_507_456,  # the tower
            (1024 + 1) * 5120 + (5120 + 1) * 5120,
        )
    ),
    "qwen2.5-vl-3b": 3_754_622_976,
}
"""Of the published weights, half the bytes that their index files state; for 13B by hand."""
IMAGE_TOKENS = {"llava-1.5-7b": 576, "llava-1.5-13b": 576, "qwen2.5-vl-3b": 144}


def profile(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks.profile", *map(str, args)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a refusal."""
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_true_sizes_have_the_public_parameter_counts(name):
    model = random_backbone(name, "meta").model
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_shrunk_is_narrower_and_shallower_and_else_the_same(name):
    true, small = config_of(name), config_of(name, shrink=True)
    for part in ("text_config", "vision_config"):
        a, b = getattr(true, part), getattr(small, part)
        assert b.num_hidden_layers < a.num_hidden_layers
        assert b.hidden_size < a.hidden_size and b.intermediate_size < a.intermediate_size
    a, b = true.get_text_config(), small.get_text_config()
    assert a.vocab_size == b.vocab_size
    assert (a.num_attention_heads // a.num_key_value_heads) == (
        b.num_attention_heads // b.num_key_value_heads
    )
    assert true.image_token_id == small.image_token_id
    assert true.tie_word_embeddings == small.tie_word_embeddings == (name == "qwen2.5-vl-3b")


def test_random_weights_depend_on_the_seed_only():
    one, same, other = (random_backbone("llava-1.5-7b", shrink=True, seed=s) for s in (1, 1, 2))
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, same.model.state_dict()[name])
    head = "lm_head.weight"
    assert not torch.equal(one.model.state_dict()[head], other.model.state_dict()[head])
    assert not any(p.requires_grad for p in one.model.parameters())


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"choose one of llava-1\.5-7b, llava-1\.5-13b, q"):
        config_of("tiny-llava")


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_synthetic_prompts_are_as_the_benchmarks(name):
    backbone = random_backbone(name, shrink=True)
    data, again = (synthetic_set(backbone, 2, 3, seed=5) for _ in range(2))
    assert len(data) == 6 and len(set(data.portraits)) == 2
    assert [p.prompt_ids for p in data.prompts] == [p.prompt_ids for p in again.prompts]
    image = backbone.processor.image_token_id
    for prompt, target in zip(data.prompts, data.targets[0], strict=True):
        assert prompt.prompt_ids.count(image) == IMAGE_TOKENS[name]
        asked = len(prompt.prompt_ids) - prompt.prompt_ids.index(image) - IMAGE_TOKENS[name]
        assert QUESTION_TOKENS[0] <= asked <= QUESTION_TOKENS[1]
        assert RESPONSE_TOKENS[0] <= len(target.response) <= RESPONSE_TOKENS[1]
        assert target.hidden_RD.shape == (len(target.response), TEXT_WIDTHS[name])
    packed = pack(backbone, data.prompts, [t.response for t in data.targets[0]])
    assert len(packed.pictures) == 2
    assert distinct_tokens(packed) < 2 * (IMAGE_TOKENS[name] + 5 + 3 * (55 + 25) + 1)
    assert hidden_states(backbone, packed).isfinite().all()


TEXT_WIDTHS = {"llava-1.5-7b": 128, "llava-1.5-13b": 160, "qwen2.5-vl-3b": 128}


def test_qwens_positions_are_those_of_its_class():
    backbone = random_backbone("qwen2.5-vl-3b", shrink=True)
    for prompt in synthetic_set(backbone, 1, 2, seed=0).prompts:
        ids_1L = torch.tensor([prompt.prompt_ids])
        positions_A1L, _ = backbone.model.model.get_rope_index(
            input_ids=ids_1L,
            mm_token_type_ids=(ids_1L == backbone.processor.image_token_id).int(),
            image_grid_thw=prompt.pictures[0].tensors["image_grid_thw"],
        )
        assert torch.equal(prompt.positions_AL, positions_A1L[:, 0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-3b"])
def test_measured_figures(name, checkpointing):
    backbone = random_backbone(name, shrink=True)
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    found = measure(
        backbone,
        portraits=1,
        questions=2,
        steps=2,
        gradient_checkpointing=checkpointing,
        peak_flops=1e12,
    )
    after = dict(backbone.model.named_parameters())
    assert before.keys() == after.keys()  # the adapter is off again
    assert all(torch.equal(before[n], after[n]) for n in before)
    packs = []
    for seed in (0, 1):
        data = synthetic_set(backbone, 1, 2, seed)
        packs.append(pack(backbone, data.prompts, [t.response for t in data.targets[0]]))
    text_config = backbone.model.config.get_text_config()
    assert found.questions == 4
    assert found.tokens == sum(map(distinct_tokens, packs))
    assert found.tflop == step_minimum(text_config, packs, LORA_RANK).total / 1e12
    assert found.released_tflop > found.tflop
    assert found.seconds > 0 and found.mfu == pytest.approx(found.tflop / found.seconds)
    assert (found.peak_bytes, found.checkpointing) == (None, checkpointing)
    assert found.source.startswith("CPU, 20") and "commit" in found.source


def test_an_unknown_peak_leaves_mfu_out(random_backbone):
    found = measure(random_backbone, portraits=1, questions=1, steps=1)
    assert found.mfu is None and " unknown " in found.row()


@pytest.mark.parametrize(
    "device, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
        ("CPU", None),
    ],
)
def test_peaks_by_device_name(device, peak):
    assert bf16_peak(device) == peak


def test_row_and_rates():
    figures = Figures("x", "card, day, sha", False, 28, 4000, 100.0, 1000.0, 0.5, 0.2, 3 * 10**9)
    assert figures.row().count("|") == TABLE_HEADER.splitlines()[0].count("|")
    assert figures.row() == (
        "| x | card, day, sha | nothing | 4,000 | 100.0 | 0.500 | 56.0 | 8,000 | 20.0% | 3.0 GB "
        "| 10.0 times |"
    )
    found = figures.as_json()
    assert found["steps_per_second"] == 2.0
    assert found["questions_per_second"] == 56.0
    assert found["tokens_per_second"] == 8000.0


def test_estimate_follows_from_the_minimum_at_the_assumed_mfu():
    plain, checkpointed = estimate("qwen2.5-vl-3b", portraits=1, questions=2)
    assert plain.mfu == ASSUMED_MFU
    assert plain.seconds == pytest.approx(plain.tflop * 1e12 / (0.45 * ESTIMATED_PEAK))
    # Checkpointing runs the forward pass again, a good third more, in far less memory.
    assert checkpointed.tflop == plain.tflop
    assert 1.3 < checkpointed.seconds / plain.seconds < 1.6
    assert checkpointed.mfu == pytest.approx(0.45 * plain.seconds / checkpointed.seconds)
    assert plain.peak_bytes > checkpointed.peak_bytes > 2 * PARAMETERS["qwen2.5-vl-3b"]
    # Sharing two questions' image and keeping the teacher, logits of responses only.
    assert plain.released_tflop > 2 * plain.tflop


def test_out_of_memory_is_one_sentence():
    explained = out_of_memory_explained("llava-1.5-7b", "--portraits 1")
    with pytest.raises(InputError, match=r"b does not fit .*; try --portraits 1\.$"), explained:
        raise torch.OutOfMemoryError


def test_without_a_gpu_it_refuses_in_one_sentence():
    sentence = refused(profile("--backbone", "llava-1.5-7b", "--random-weights"))
    assert "no GPU" in sentence and "--estimate" in sentence


def test_estimates_from_the_command_line():
    machine = profile("--estimate", "--backbone", "all", "--json")
    assert (machine.returncode, machine.stderr) == (0, "")
    found = json.loads(machine.stdout)["estimates"]
    assert [row["backbone"] for row in found] == [n for n in TEXT_SIZES for _ in range(2)]
    assert all("estimate" in row["source"] and row["questions"] == 28 for row in found)


def test_estimates_as_a_table():
    done = profile("--estimate", "--portraits=1", "--peak-tflops=312")
    lines = done.stdout.splitlines()
    assert "\n".join(lines[:2]) == TABLE_HEADER
    assert len(lines) == 4
    assert all("| llava-1.5-7b | estimate for 312 TFLOP/s |" in line for line in lines[2:])


def test_an_embedded_backbone_has_no_estimate():
    with pytest.raises(InputError, match="tiny-llava"):
        estimate("tiny-llava")
