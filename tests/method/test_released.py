import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.method.test_teacher import samples
from vgid.config import TrialConfig
from vgid.method.released import (
    distill_released,
    epoch_pairs,
    full_position_kl,
    retain_drawn,
    with_normalised_noise,
)
from vgid.models.adapters import attached
from vgid.models.encoding import collate, encode, response_ids

CONFIG = TrialConfig(released=True, epochs=2, lora_rank=4)


@pytest.fixture
def pairs(random_backbone):
    chosen = samples(6)
    encoded = encode(random_backbone, [s.query for s in chosen])
    return [
        (e, response_ids(random_backbone, s.answer)[:-1])
        for e, s in zip(encoded, chosen, strict=True)
    ]


def test_kl_counts_every_position_and_divides_by_the_batch_only():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 7, generator=generator)
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum() / 3
    assert full_position_kl(teacher, student).item() == pytest.approx(expected.item(), rel=1e-5)


def test_noise_is_uniform_in_normalised_space_and_redrawn(random_backbone, pairs):
    inputs = collate(random_backbone, [e for e, _ in pairs], [r for _, r in pairs])
    generator = torch.Generator().manual_seed(0)
    first = with_normalised_noise(inputs, generator)["pixel_values"]
    second = with_normalised_noise(inputs, generator)["pixel_values"]
    assert first.min() >= 0 and first.max() < 1
    assert first.mean().item() == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(first, second)
    # Normalised pixels of a real image leave [0, 1), those of the noise cannot.
    assert inputs["pixel_values"].min() < 0


def test_an_epoch_shuffles_both_sets_and_ends_with_the_smaller(random_backbone):
    pairs = epoch_pairs(10, 99, CONFIG, 0)
    assert [len(forget) for forget, _ in pairs] == [4, 4, 2]
    assert [len(retain) for _, retain in pairs] == [4, 4, 4]
    assert sorted(i for forget, _ in pairs for i in forget) == list(range(10))
    assert len({i for _, retain in pairs for i in retain}) == 12
    assert pairs == epoch_pairs(10, 99, CONFIG, 0) != epoch_pairs(10, 99, CONFIG, 1)
    assert [len(retain) for _, retain in epoch_pairs(99, 5, CONFIG, 0)] == [4, 1]
    both = [retain for epoch in (0, 1) for _, retain in epoch_pairs(10, 99, CONFIG, epoch)]
    assert list(retain_drawn(10, 99, CONFIG)) == [i for batch in both for i in batch]


def test_the_defaults_are_the_script_s_and_what_it_lacks_is_not_said_of_a_trial():
    alone = TrialConfig(released=True)
    assert (alone.alpha, alone.beta, alone.learning_rate, alone.epochs) == (1, 1, 5e-4, 5)
    assert (alone.batch_size, alone.lora_rank, alone.lora_dropout) == (4, 16, 0.05)
    mixed = TrialConfig(released=True, epochs=3, train_tasks=["cloze"], noise_type="white")
    assert (mixed.epochs, mixed.train_tasks, mixed.train_wording) == (3, ("generation",), "raw")
    assert not {"noise_type", "prompt_style", "max_grad_norm"} & mixed.used.keys()
    assert TrialConfig.model_validate(mixed.used).used == mixed.used
    assert TrialConfig(released=False) == TrialConfig()


def as_the_script(backbone: Any, chosen: list, config: TrialConfig) -> list[torch.Tensor]:
    """The adapter after the script's loop, with its second model and the processor's own inputs."""
    base = copy.deepcopy(backbone.model)
    teacher = copy.deepcopy(base).eval()
    torch.manual_seed(config.seed)
    r = config.lora_rank
    lora = LoraConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=0.05,
        target_modules=backbone.spec.lora_targets,
        init_lora_weights="gaussian",
    )
    student = get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=5e-4, eps=1e-6, weight_decay=0
    )
    for epoch in range(config.epochs):
        torch.manual_seed(config.seed * 100_003 + epoch)
        noise = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        # Stepped once an epoch, over the 2 batches of each set and both epochs.
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 - epoch / 8)
        for pair in epoch_pairs(len(chosen), len(chosen), config, epoch):
            for perturbed, batch in zip((True, False), pair, strict=True):
                inputs = backbone.processor(
                    text=[
                        f"USER: <image>\n{chosen[i].query.text}\nASSISTANT: {chosen[i].answer}"
                        for i in batch
                    ],
                    images=[chosen[i].query.image for i in batch],
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                )
                seen = dict(inputs)
                if perturbed:
                    seen["pixel_values"] = torch.rand(inputs["pixel_values"].shape, generator=noise)
                with torch.no_grad():
                    wanted = teacher(**seen).logits.softmax(-1)
                got = student(**inputs).logits.log_softmax(-1)
                torch.nn.functional.kl_div(got, wanted, reduction="batchmean").backward()
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach() for p in student.parameters() if p.requires_grad]


def test_the_adapter_is_the_script_s(random_backbone, pairs):
    """Its loop, written down again: a gradient clipped at 1 or LoRA of scale 2 would be far off."""
    expected = as_the_script(random_backbone, samples(6), CONFIG)
    with attached(random_backbone, CONFIG) as model:
        norms = [
            report.metrics["grad_norm"]
            for report in distill_released(random_backbone, model, pairs, pairs, CONFIG)
        ]
        found = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    assert len(found) == len(expected) > 0
    assert max(norms) > 1
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().mean() < 1e-6


def test_two_optimizer_steps_a_pair_of_batches(random_backbone, pairs, monkeypatch):
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: steps.append(1) or step(self, *a)
    )
    with attached(random_backbone, CONFIG) as model:
        reports = list(distill_released(random_backbone, model, pairs, pairs, CONFIG))
    assert [r.step for r in reports] == [2, 4]
    assert len(steps) == 2 * 4


def test_retain_loss_alone_starts_at_zero_and_forget_does_not(random_backbone, pairs):
    one = CONFIG.model_copy(update={"epochs": 1, "batch_size": 6, "alpha": 0.0})
    with attached(random_backbone, one) as model:
        (report,) = distill_released(random_backbone, model, pairs, pairs, one)
    assert report.metrics["forget_loss"] > 0.1
    assert report.metrics["retain_loss"] < 1e-6 * report.metrics["forget_loss"]


def test_same_seed_same_adapter(random_backbone, pairs):
    states = []
    for seed in (0, 0, 1):
        config = CONFIG.model_copy(update={"seed": seed})
        with attached(random_backbone, config) as model:
            list(distill_released(random_backbone, model, pairs, pairs, config))
            states.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
