import math
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import make_random_backbone
from tests.method.test_teacher import samples, teachers
from tests.padded import collate
from tests.workers import run_workers
from vgid.config import TrialConfig, uses
from vgid.method import sharding
from vgid.method.checkpoint import FILE_NAME
from vgid.method.distillation import (
    DistillationSet,
    LossNotFiniteError,
    Student,
    distill,
    share,
)
from vgid.method.methods import make_method
from vgid.method.sharding import parted
from vgid.method.teacher import Intervention
from vgid.method.workers import ALONE, Workers
from vgid.models.adapters import attached, loaded, save
from vgid.models.encoding import encode

CONFIG = TrialConfig(epochs=2, batch_size=4, retain_batch_size=3, lora_rank=4, learning_rate=1e-2)


def make_set(backbone, root: Path, intervention: Intervention, n: int = 6) -> DistillationSet:
    chosen = samples(n)
    targets = teachers(root, backbone).targets(chosen, intervention, "reference")
    prompts = encode(backbone, [s.query for s in chosen])
    return DistillationSet(prompts, [targets], [s.task for s in chosen])


@pytest.fixture
def forget(random_backbone, tmp_path):
    return make_set(random_backbone, tmp_path, Intervention("random", None, "strict"))


@pytest.fixture
def retain(random_backbone, tmp_path):
    return make_set(random_backbone, tmp_path, Intervention(), 7)


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def train(
    backbone, forget, retain, config=CONFIG, epochs=None, workers=ALONE, **options
) -> tuple[dict, list]:
    """Adapter and reports, after the first of the ``epochs`` only if a number is given."""
    with attached(backbone, config) as model, parted(backbone, config, workers):
        run = distill(backbone, model, forget, retain, config, workers=workers, **options)
        reports = list(islice(run, epochs))
        return adapter_state(model), reports


def test_kl_is_exactly_zero_at_step_0_for_the_unperturbed_input(random_backbone, retain):
    """Same weights with the adapter off: not small, zero."""
    with attached(random_backbone, CONFIG) as model:
        part = share(random_backbone, retain, range(7), 0)[0]
        loss = Student(model, random_backbone)(part, "forget")
        assert loss.item() == 0.0


def test_kl_of_the_perturbed_teacher_is_the_mean_over_response_tokens(random_backbone, forget):
    """Against full logits, one sample at a time and without the store or padding."""
    model = random_backbone.model
    total, count = 0.0, 0
    for prompt, target in zip(forget.prompts, forget.targets[0], strict=True):
        batch = collate(random_backbone, [prompt], [target.response])
        with torch.no_grad():
            logits = model(**batch.inputs).logits[0, len(prompt.prompt_ids) - 1 : -1].double()
            teacher = model.lm_head(target.hidden_RD).double()
        p, q = teacher.log_softmax(-1), logits.log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
        count += len(target.response)
    with attached(random_backbone, CONFIG) as adapted:
        (part,) = share(random_backbone, forget, range(6), 0)
        loss = Student(adapted, random_backbone)(part, "forget").item()
    assert loss == pytest.approx(total / count, rel=1e-4)
    assert loss > 0.01


def test_lora_touches_the_language_model_only(random_backbone):
    with attached(random_backbone, CONFIG) as model:
        names = list(adapter_state(model))
        assert names
        assert all("language_model" in name for name in names)
        assert not any("vision_tower" in n or "multi_modal_projector" in n for n in names)
        assert len(names) == 2 * 7 * random_backbone.model.config.text_config.num_hidden_layers


def test_adapter_off_is_the_base_bit_for_bit(random_backbone, forget, retain):
    batch = collate(random_backbone, list(forget.prompts))
    with torch.no_grad():
        base = random_backbone.model(**batch.inputs).logits
    with attached(random_backbone, CONFIG) as model:
        list(distill(random_backbone, model, forget, retain, CONFIG))
        with torch.no_grad():
            assert not torch.equal(random_backbone.model(**batch.inputs).logits, base)
            with model.disable_adapter():
                assert torch.equal(random_backbone.model(**batch.inputs).logits, base)
    with torch.no_grad():
        assert torch.equal(random_backbone.model(**batch.inputs).logits, base)
    assert not any("lora" in name for name, _ in random_backbone.model.named_modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lora_b_is_non_zero_after_a_step(random_backbone, forget, retain, checkpointing):
    config = CONFIG.model_copy(
        update={"epochs": 1, "batch_size": 6, "gradient_checkpointing": checkpointing}
    )
    state, reports = train(random_backbone, forget, retain, config)
    assert reports[0].step == 1
    lora_b = {name: value for name, value in state.items() if "lora_B" in name}
    assert lora_b
    assert all(bool((value != 0).any()) for value in lora_b.values())


def test_gradient_checkpointing_leaves_training_unchanged(random_backbone, forget, retain):
    plain, reports = train(random_backbone, forget, retain)
    config = CONFIG.model_copy(update={"gradient_checkpointing": True})
    checkpointed, same = train(random_backbone, forget, retain, config)
    assert [r.metrics for r in same] == [r.metrics for r in reports]
    assert all(torch.equal(plain[n], checkpointed[n]) for n in plain)


def test_a_trial_in_a_used_process_equals_the_first_bit_for_bit(random_backbone, forget, retain):
    first, _ = train(random_backbone, forget, retain)
    train(random_backbone, forget, retain, CONFIG.model_copy(update={"seed": 1, "lora_rank": 2}))
    again, _ = train(random_backbone, forget, retain)
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_alpha_0_only_retains_and_beta_0_only_forgets(random_backbone, forget, retain):
    _, keeping = train(random_backbone, forget, retain, CONFIG.model_copy(update={"alpha": 0.0}))
    _, forgetting = train(random_backbone, forget, retain, CONFIG.model_copy(update={"beta": 0.0}))
    assert forgetting[-1].metrics["forget_loss"] < forgetting[0].metrics["forget_loss"]
    # The student starts as the base, so the retain loss has nothing to teach (AdamW makes steps
    # of rounding errors, hence not zero).
    drift = keeping[-1].metrics["retain_loss"]
    assert drift < 0.05 * forgetting[-1].metrics["retain_loss"]


def test_a_share_learns_from_the_target_whose_turn_it_is(random_backbone, forget, retain):
    targets = [forget.targets[0], retain.targets[0][:6]]
    mixed = DistillationSet(forget.prompts, targets, forget.tasks)
    for epoch in (0, 1):
        (met,) = mixed.rounds(range(6), epoch)
        sources = [mixed.turns[i] + epoch for i in range(6)]
        assert all(
            t is targets[s % 2][i] for i, (t, s) in enumerate(zip(met, sources, strict=True))
        )
        (part,) = share(random_backbone, mixed, range(6), epoch)
        assert torch.equal(part.teacher_RD, torch.cat([t.hidden_RD for t in met]))


def test_nan_fails_the_trial_in_one_sentence(random_backbone, forget, retain):
    with pytest.raises(LossNotFiniteError, match="not finite at step"):
        train(
            random_backbone,
            forget,
            retain,
            CONFIG.model_copy(update={"learning_rate": 1e20, "epochs": 30}),
        )


def test_resumed_trial_equals_the_uninterrupted_one(random_backbone, forget, retain, tmp_path):
    config = CONFIG.model_copy(update={"epochs": 4, "lora_dropout": 0.3})
    expected, reports = train(random_backbone, forget, retain, config)
    folder = tmp_path / "checkpoint"
    with attached(random_backbone, config) as model:
        run = distill(
            random_backbone, model, forget, retain, config, trial_id="7", checkpoint=folder
        )
        head = [next(run), next(run)]
        run.close()
    assert head == reports[:2]
    got, again = train(random_backbone, forget, retain, config, trial_id="7", checkpoint=folder)
    assert again == reports  # the first two too: their hearer may have been killed with the trial
    assert all(torch.equal(expected[n], got[n]) for n in expected)


def test_checkpoint_of_another_trial_or_a_torn_one_is_not_used(
    random_backbone, forget, retain, tmp_path
):
    train(random_backbone, forget, retain, trial_id="7", checkpoint=tmp_path)
    _, reports = train(random_backbone, forget, retain, trial_id="8", checkpoint=tmp_path)
    assert [r.epoch for r in reports] == [1, 2]
    (tmp_path / "state.safetensors").write_bytes(b"torn")
    _, reports = train(random_backbone, forget, retain, trial_id="8", checkpoint=tmp_path)
    assert [r.epoch for r in reports] == [1, 2]


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape"])
def test_a_checkpoint_of_other_parameters_is_not_used(
    random_backbone, forget, retain, tmp_path, fault
):
    train(random_backbone, forget, retain, trial_id="7", checkpoint=tmp_path)
    with safe_open(tmp_path / FILE_NAME, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / FILE_NAME)
    name = min(n for n in tensors if n.startswith("parameter/"))
    if fault == "missing":
        del tensors[name]
    elif fault == "surplus":
        tensors |= {n.replace("layers.0.", "layers.9."): x.clone() for n, x in tensors.items()}
    else:
        tensors[name] = torch.zeros(1, 1)
    save_file(tensors, tmp_path / FILE_NAME, metadata)
    state, reports = train(random_backbone, forget, retain, trial_id="7", checkpoint=tmp_path)
    fresh, _ = train(random_backbone, forget, retain)
    assert len(reports) == CONFIG.epochs
    assert all(torch.equal(state[n], fresh[n]) for n in fresh)


def test_saved_adapter_loads_and_unloads(random_backbone, forget, retain, tmp_path):
    batch = collate(random_backbone, list(forget.prompts))
    with torch.no_grad():
        base = random_backbone.model(**batch.inputs).logits
    with attached(random_backbone, CONFIG) as model:
        list(distill(random_backbone, model, forget, retain, CONFIG))
        with torch.no_grad():
            adapted = random_backbone.model(**batch.inputs).logits
        save(model, tmp_path / "adapter")
    with loaded(random_backbone, tmp_path / "adapter"), torch.no_grad():
        assert torch.equal(random_backbone.model(**batch.inputs).logits, adapted)
    with torch.no_grad():
        assert torch.equal(random_backbone.model(**batch.inputs).logits, base)


@pytest.mark.parametrize("parts", [1, 2])
def test_shares_of_all_ranks_weigh_as_the_whole(random_backbone, forget, parts):
    (whole,) = share(random_backbone, forget, range(5), 0)
    shares = [
        s for rank in range(2) for s in share(random_backbone, forget, range(5), 0, rank, 2, parts)
    ]
    assert len(shares) == 2 * parts
    assert sum(len(s.teacher_RD) for s in shares) == len(whole.teacher_RD)
    assert all(s.weight == whole.weight == 1 / len(whole.teacher_RD) for s in shares)
    assert whole.fraction == 1.0
    assert sum(s.fraction for s in shares) == pytest.approx(1.0)
    assert {round(5 * s.fraction) for s in shares} == ({2, 3} if parts == 1 else {1, 2})
    placeholder = share(random_backbone, forget, [2], 0, 1, 2)[0]
    assert (placeholder.weight, placeholder.fraction) == (0.0, 0.0)


def test_a_portraits_questions_stay_in_one_share(random_backbone, tmp_path):
    chosen = [
        replace(sample, query=replace(sample.query, id=f"{sample.query.id}/{k}", text=f"{k}?"))
        for k in range(3)
        for sample in samples(2)
    ]
    prompts = encode(random_backbone, [s.query for s in chosen])
    targets = teachers(tmp_path, random_backbone).targets(chosen, Intervention(), "reference")
    data = DistillationSet(prompts, [targets], [s.task for s in chosen])
    for rank in range(2):
        (mine,) = share(random_backbone, data, range(6), 0, rank, 2)
        assert len(mine.packed.pictures) == 1
        assert len(mine.packed.rows) == 3


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_leaves_the_loss_unchanged(random_backbone, forget, retain, parts):
    whole, expected = train(random_backbone, forget, retain)
    config = CONFIG.model_copy(update={"gradient_accumulation": parts})
    state, reports = train(random_backbone, forget, retain, config)
    for got, want in zip(reports, expected, strict=True):
        for name, value in want.metrics.items():
            assert math.isclose(got.metrics[name], value, rel_tol=1e-4, abs_tol=1e-6), name
    assert max((state[n] - whole[n]).abs().max().item() for n in whole) < 1e-4


def test_vgid_s_numbers_are_those_from_before_the_other_methods_came(random_backbone, tmp_path):
    """Of the loop that knew VGID only, on today's batches; adapters were equal bit for bit."""
    first, second = (
        make_set(random_backbone, tmp_path, Intervention("random", None, "strict", seed=seed))
        for seed in (0, 4)
    )
    mixed = DistillationSet(first.prompts, [first.targets[0], second.targets[0]], first.tasks)
    retain = make_set(random_backbone, tmp_path, Intervention(), 7)
    _, reports = train(random_backbone, mixed, retain)
    found = [(r.metrics["forget_loss"], r.metrics["retain_loss"]) for r in reports]
    recorded = [
        (0.9469208121299744, 0.05392053723335266),
        (0.8466855883598328, 0.0678829774260521),
    ]
    assert found == [pytest.approx(pair, rel=1e-4) for pair in recorded]


WHOLE = {
    "vgid": {},
    "npo": {},
    "po_dpo": {"preference_beta": 0.3},
    "rmu": {"rmu_layer": 2, "max_grad_norm": 1e6},
}
"""Methods whose means differ: over tokens, over samples, over pairs, over samples of a layer."""


def _sets(method: str, backbone, root: Path) -> tuple[DistillationSet, DistillationSet | None]:
    """5 forget and 7 retain samples of a method."""
    retain = make_set(backbone, root / "store", Intervention(), 7)
    if method == "vgid":
        return make_set(backbone, root / "store", Intervention("random", None, "strict"), 5), retain
    chosen = samples(5)
    made = make_method(TrialConfig(method=method), backbone)
    store = teachers(root / "store", backbone)
    targets = [store.targets(chosen, *teacher) for teacher in made.forget_teachers(seed=1)]
    prompts = encode(backbone, [s.query for s in chosen])
    forget = DistillationSet(prompts, targets, [s.task for s in chosen], made.paired)
    return forget, retain if uses(method, "beta") else None


def _config(method: str, **settings: Any) -> TrialConfig:
    if uses(method, "beta"):
        settings["retain_batch_size"] = 1
    own = WHOLE[method]
    return TrialConfig(method=method, epochs=2, batch_size=3, lora_rank=4, **own, **settings)


ACCUMULATED, TWICE = {"gradient_accumulation": 2}, {"gradient_checkpointing": True}
LEAN: dict[str, dict[str, Any]] = {
    "both": ACCUMULATED | TWICE,
    "in parts": ACCUMULATED,
    "activations twice": TWICE,
}


DEALT = [*(f"dealt, {lean}" for lean in LEAN), "DDP, then dealt", "dealt, then DDP"]


def _run(
    workers: Workers, root: Path, method: str, backbone: Any, lean: str = "both", **options: Any
) -> tuple[dict, list]:
    sets, config = _sets(method, backbone, root), _config(method, **LEAN[lean])
    return train(backbone, *sets, config, workers=workers, **options)


def _trained(workers: Workers, root: Path, methods: list[str]) -> dict[str, Any]:
    """What each method comes to with a whole base on each worker (DDP)."""
    backbone = make_random_backbone()
    return {method: _run(workers, root, method, backbone) for method in methods}


def _dealt(workers: Workers, root: Path) -> dict[str, Any]:
    """VGID with a whole base, with one dealt out (FSDP2), and each from the other's checkpoint."""
    whole, dealt = make_random_backbone(), make_random_backbone()
    run = partial(_run, workers, root, "vgid")
    of_ddp, of_fsdp = ({"trial_id": "0000", "checkpoint": root / way} for way in ("ddp", "fsdp"))
    found = {"vgid": run(whole)}
    run(whole, epochs=1, **of_ddp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "device_bytes", lambda device: 1)  # too small for a whole base
        found |= {f"dealt, {lean}": run(dealt, lean) for lean in LEAN}
        found["DDP, then dealt"] = run(dealt, **of_ddp)
        run(dealt, epochs=1, **of_fsdp)
    layers = [backbone.model.model.language_model.layers for backbone in (whole, dealt)]
    assert [all(hasattr(layer, "unshard") for layer in each) for each in layers] == [False, True]
    found["dealt, then DDP"] = run(whole, **of_fsdp)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def two(root) -> list[dict[str, Any]]:
    """What two workers have in the end, for each method."""
    return run_workers(_trained, 2, root / "2", root, list(WHOLE))


@pytest.fixture(scope="module")
def four(root) -> list[dict[str, Any]]:
    """What four have, for each way to hold a base."""
    return run_workers(_dealt, 4, root / "4", root)


@pytest.mark.parametrize(
    "several, way",
    [*(("two", method) for method in WHOLE), *(("four", way) for way in ("vgid", *DEALT))],
)
def test_several_workers_have_the_loss_curve_of_one(random_backbone, root, several, way, request):
    """Batches of 3 and 2 forget questions and a single retain question: some ranks hold none.

    The one computes each batch at once, the others theirs in two parts, activations twice, or both.
    """
    workers = request.getfixturevalue(several)
    (first, reports), *others = (worker[way] for worker in workers)
    assert all(torch.equal(first[n], state[n]) for state, _ in others for n in first)
    method = way if way in WHOLE else "vgid"
    config = _config(method)
    alone, expected = train(random_backbone, *_sets(method, random_backbone, root), config)
    for got, want in zip(reports, expected, strict=True):
        assert got.step == want.step  # the global batch is the config's
        assert got.metrics == pytest.approx(want.metrics, rel=1e-5, abs=1e-5)
    # AdamW makes steps of rounding errors where a gradient vanishes, so not each entry is bounded.
    differences = torch.cat([(first[n] - alone[n]).abs().flatten() for n in alone])
    assert differences.mean() < 1e-6
    assert differences.max() < config.learning_rate


@pytest.mark.parametrize("way", ["dealt, both", "DDP, then dealt", "dealt, then DDP"])
def test_a_base_dealt_out_gives_the_adapter_of_a_whole_one_to_the_bit(four, way):
    """Of DDP and FSDP2 each goes on from the other's checkpoint."""
    (whole, expected), (dealt, reports) = four[0]["vgid"], four[0][way]
    assert all(torch.equal(whole[n], dealt[n]) for n in whole)
    assert reports == expected


def test_optimizer_steps_take_turns_between_the_views(random_backbone, forget, retain, tmp_path):
    """Each view's batch is that of a set whose only prompts are that view's; targets stay."""
    darker = [
        replace(s.query, image=s.query.image.point(lambda level: level // 2)) for s in samples(6)
    ]
    others = encode(random_backbone, darker)
    both = replace(forget, views=[others])
    only = replace(forget, prompts=others)
    for step, single in enumerate([forget, only, forget, only]):
        (mine,) = share(random_backbone, both, range(6), 0, step=step)
        (plain,) = share(random_backbone, single, range(6), 0)
        with attached(random_backbone, CONFIG) as model:
            student = Student(model, random_backbone)
            assert student(mine, "forget").item() == student(plain, "forget").item()
    same, _ = train(random_backbone, replace(forget, views=[forget.prompts]), retain)
    alone, _ = train(random_backbone, forget, retain)
    varied, _ = train(random_backbone, both, retain)
    assert all(torch.equal(same[name], alone[name]) for name in alone)
    assert not all(torch.equal(varied[name], alone[name]) for name in alone)
