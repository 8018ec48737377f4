"""The cost model against torch's own counter, on the real classes, and against brute force.

On the CPU torch's counter knows nothing of fused attention and counts it as nothing, so ``sdpa``
gives all but attention, and ``eager`` adds attention over all pairs of a row, seen or not.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

from tests.benchmarks.architectures import config_of, random_backbone
from tests.benchmarks.cost_model import (
    Flops,
    distinct_tokens,
    fill_minimum,
    released_minimum,
    seen_pairs,
    step_minimum,
    vision_forward,
)
from tests.conftest import make_random_backbone
from tests.random_qwen import make_random_qwen
from vgid.config import TrialConfig
from vgid.method.chunked_kl import chunked_kl
from vgid.method.distillation import DistillationBatch, Student
from vgid.method.profile_prompts import synthetic_set
from vgid.method.released import full_position_kl
from vgid.models.adapters import attached
from vgid.models.memory import activation_bytes, adapter_bytes, cache_bytes, vocabulary_bytes
from vgid.models.packing import hidden_states, pack
from vgid.models.tree_attention import attend_by_trees, lay_out

MAKERS = {
    "tiny-llava": make_random_backbone,
    "llava-1.5-7b": lambda: random_backbone("llava-1.5-7b", shrink=True),
    "qwen, tied": make_random_qwen,
    "qwen, untied": lambda: make_random_qwen(tied=False),
    "qwen2.5-vl-3b": lambda: random_backbone("qwen2.5-vl-3b", shrink=True),
}


@pytest.fixture(scope="module", params=MAKERS)
def backbone(request):
    return MAKERS[request.param]()


def packs_of(backbone, portraits=1, questions=3, max_row_tokens=4096):
    """One tree a portrait, and the teacher's states."""
    data = synthetic_set(backbone, portraits, questions, seed=0)
    responses = [target.response for target in data.targets[0]]
    packed = pack(backbone, data.prompts, responses, max_row_tokens)
    return packed, torch.cat([target.hidden_RD for target in data.targets[0]])


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def counted_step(backbone, packed, teacher_RD, rank):
    """FLOPs of a training step as torch counts them; the features of the image are kept."""
    for picture in packed.pictures:
        backbone.vision.features(picture)
    with attached(backbone, TrialConfig(lora_rank=rank)) as model:
        student = Student(model.train(), backbone)
        batch = DistillationBatch(packed, teacher_RD, 1.0, 1.0)
        return counted(lambda: student(batch, "forget").backward())


class Eager:
    """The backbone's attention as plain products while in the block."""

    def __init__(self, backbone):
        self.model = backbone.model

    def __enter__(self):
        self.model.set_attn_implementation("eager")

    def __exit__(self, *_):
        self.model.set_attn_implementation("sdpa")
        attend_by_trees(self.model)


def test_step_but_for_attention_is_what_torch_counts(backbone):
    packed, teacher_RD = packs_of(backbone)
    assert packed.ids_BL.shape == (1, distinct_tokens(packed))  # nothing padded, one tree
    text_config = backbone.model.config.get_text_config()
    at_4, at_12 = (counted_step(backbone, packed, teacher_RD, rank) for rank in (4, 12))
    least = step_minimum(text_config, [packed], 4)
    assert at_12 - at_4 == 2 * least.lora  # LoRA costs in proportion to its rank, nothing else does
    assert at_4 == least.linear + least.head + least.lora
    assert step_minimum(text_config, [packed], 12).lora == 3 * least.lora


def test_head_is_what_torch_counts(backbone):
    packed, teacher_RD = packs_of(backbone)
    weight_VD = backbone.model.lm_head.weight
    student_RD = torch.zeros_like(teacher_RD, requires_grad=True)
    alone = counted(lambda: chunked_kl(student_RD, teacher_RD, weight_VD, chunk=7).backward())
    assert alone == step_minimum(backbone.model.config.get_text_config(), [packed], 4).head


def test_attention_of_all_pairs_is_what_torch_counts(backbone):
    packed, teacher_RD = packs_of(backbone)
    least = step_minimum(backbone.model.config.get_text_config(), [packed], 4)
    fused = counted_step(backbone, packed, teacher_RD, 4)
    with Eager(backbone):
        attention = counted_step(backbone, packed, teacher_RD, 4) - fused
    assert attention * seen_pairs(packed) == least.attention * packed.ids_BL.numel() ** 2


def test_filling_the_store_is_a_forward_pass(backbone):
    packed, _ = packs_of(backbone)
    text_config = backbone.model.config.get_text_config()
    backbone.vision.features(packed.pictures[0])

    def forward():
        with torch.no_grad():
            hidden_states(backbone, packed)

    least = fill_minimum(text_config, [packed])
    assert counted(forward) == least.linear == least.total - least.attention
    step = step_minimum(text_config, [packed], 4)
    assert step.attention == 3 * least.attention
    generated = fill_minimum(text_config, [packed], generated=True)
    assert generated.head * 3 == step.head
    assert (generated.linear, generated.attention) == (least.linear, least.attention)


def test_the_store_makes_4_P_of_6_P():
    packed, _ = packs_of(random_backbone("llava-1.5-7b", shrink=True))
    text_config = config_of("llava-1.5-7b").get_text_config()
    tokens = distinct_tokens(packed)
    # q, k, v, o of 4096 by 4096 and three of 4096 by 11008 in each of 32 layers
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    with_store = step_minimum(text_config, [packed], 16)
    without = with_store + fill_minimum(text_config, [packed])
    first_layer = 2 * 3 * 4096**2 * tokens  # no gradients go below it
    assert with_store.linear == 4 * parameters * tokens - first_layer
    assert without.linear == 6 * parameters * tokens - first_layer
    assert without.lora == with_store.lora


def test_released_step_is_what_torch_counts(backbone):
    """One question: teacher and student see the image and make logits at all positions."""
    packed, _ = packs_of(backbone, questions=1)
    length = packed.ids_BL.shape[1]
    (picture,) = packed.pictures
    inputs = {
        "input_ids": packed.ids_BL,
        "attention_mask": torch.ones_like(packed.ids_BL),
        **picture.tensors,
    }
    config = backbone.model.config
    if config.model_type != "llava":
        inputs["mm_token_type_ids"] = (packed.ids_BL == config.image_token_id).int()
    used_layer = getattr(config, "vision_feature_layer", None)
    if used_layer is not None:
        config.vision_feature_layer = -1  # the class runs layers behind the one it uses

    def step():
        with torch.no_grad(), model.disable_adapter():
            teacher_logits_1LV = backbone.model(**inputs).logits
        full_position_kl(teacher_logits_1LV, backbone.model(**inputs).logits).backward()

    with Eager(backbone), attached(backbone, TrialConfig(lora_rank=4)) as model:
        model.train()
        got = counted(step)
    least = released_minimum(config, [packed], 4)
    if used_layer is not None:
        config.vision_feature_layer = used_layer
    dense = least.attention * length**2 // (length * (length + 1) // 2)
    assert got == least.total - least.attention + dense


def test_layers_behind_the_used_one_cost_nothing():
    config = config_of("llava-1.5-7b")
    at = {}
    for layer in (-1, -2, 22, 23, 24):
        config.vision_feature_layer = layer
        at[layer] = vision_forward(config, 576)
    assert at[-1] == at[24] > at[-2] == at[23] > at[22]
    assert vision_forward(config, 0) == 0
    # CLIP ViT-L/14-336 is known to take 191 G multiplications and additions, so 382 GFLOP.
    tower = at[-1] - 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert tower == pytest.approx(382e9, rel=0.02)


@pytest.mark.parametrize(
    "portraits, questions, budget", [(1, 1, 4096), (3, 4, 300), (5, 2, 450), (5, 2, 1000)]
)
def test_tokens_and_pairs_by_brute_force(random_backbone, portraits, questions, budget):
    packed, _ = packs_of(random_backbone, portraits, questions, budget)
    tokens, pairs = set(), set()
    for row, path in zip(packed.rows, packed.paths, strict=True):
        tokens |= {(row, place) for place in path}
        pairs |= {(row, a, b) for i, a in enumerate(path) for b in path[: i + 1]}
    assert distinct_tokens(packed) == len(tokens)
    assert seen_pairs(packed) == len(pairs)
    padding = packed.ids_BL.numel() - len(tokens)
    used = torch.bincount(torch.tensor([row for row, _ in tokens]))
    of_padding = sum(n * (n + 1) // 2 for n in (packed.ids_BL.shape[1] - used).tolist())
    assert int(packed.mask_B1LL.sum()) == len(pairs) + of_padding  # padding sees padding before it
    assert (padding > 0) == (len(packed.ids_BL) > 1)


def test_flops_add_up():
    flops = Flops(linear=1, attention=20, head=300, lora=4000, vision=50000)
    assert flops.total == 54321
    assert (flops + Flops(head=1)) == Flops(1, 20, 301, 4000, 50000)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_bytes_are_those_of_saved_tensors(name, checkpointing):
    backbone = random_backbone(name, dtype=torch.bfloat16, shrink=True)
    packed, teacher_RD = packs_of(backbone)
    text_config = backbone.model.config.get_text_config()
    base = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    trial = TrialConfig(lora_rank=4, gradient_checkpointing=checkpointing)
    with attached(backbone, trial) as model:
        base |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        student = Student(model.train(), backbone)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            kl = student(DistillationBatch(packed, teacher_RD, 1.0, 1.0), "forget")
        measured = sum(size for pointer, size in saved.items() if pointer not in base)
        kl.backward()
    predicted = activation_bytes(text_config, [packed], 4, checkpointing)
    if checkpointing:  # the hooks do not see the layer that is computed again, nor its masks
        trees = lay_out(packed.ends_BL, torch.bfloat16)
        masks = sum(b.mask_QK.untyped_storage().nbytes() for tree in trees for b in tree.blocks)
        all_layers = activation_bytes(text_config, [packed], 4, False) - masks
        predicted -= all_layers // text_config.num_hidden_layers + masks
    assert measured == pytest.approx(predicted, rel=0.03)


def test_adapter_and_vocabulary_bytes():
    backbone = random_backbone("qwen2.5-vl-3b", shrink=True)
    text_config = backbone.model.config.get_text_config()
    with attached(backbone, TrialConfig(lora_rank=4)) as model:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        dropped = [m.in_features for m in model.modules() if hasattr(m, "lora_dropout")]
    packed, _ = packs_of(backbone)
    plain, with_masks = (
        activation_bytes(text_config, [packed], 4, False, dropout) for dropout in (False, True)
    )
    assert with_masks - plain == sum(dropped) * packed.ids_BL.numel()
    assert adapter_bytes(text_config, 4) == 16 * trained
    assert vocabulary_bytes(text_config, 1000, chunk=256) == 2 * 256 * 151936 * 4
    assert vocabulary_bytes(text_config, 100) == 2 * 100 * 151936 * 4


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-3b"])
def test_cache_bytes_are_those_of_the_cache(name):
    backbone = random_backbone(name, dtype=torch.bfloat16, shrink=True)
    packed, _ = packs_of(backbone)
    text_config = backbone.model.config.get_text_config()
    cache = DynamicCache(config=text_config)
    with torch.no_grad():
        hidden_states(backbone, packed, cache)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == cache_bytes(text_config, packed.ids_BL.numel())
