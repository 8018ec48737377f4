import pytest
import torch

from tests.test_teacher import samples
from vgid.adapter import attached
from vgid.config import TrialConfig
from vgid.encoding import collate, encode, response_ids
from vgid.released import distill_released, full_position_kl, with_normalised_noise

CONFIG = TrialConfig(
    released=True, epochs=2, batch_size=4, retain_batch_size=3, lora_rank=4, learning_rate=5e-4
)


@pytest.fixture
def pairs(random_backbone):
    chosen = samples(6)
    encoded = encode(random_backbone, [s.query for s in chosen])
    return [
        (e, response_ids(random_backbone, s.answer)) for e, s in zip(encoded, chosen, strict=True)
    ]


def test_kl_counts_every_position_and_divides_by_the_batch_only():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 7, generator=generator)
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum() / 3
    assert full_position_kl(teacher, student).item() == pytest.approx(expected.item(), rel=1e-5)


def test_noise_is_uniform_in_normalised_space_and_redrawn(random_backbone, pairs):
    batch = collate(random_backbone, [e for e, _ in pairs], [r for _, r in pairs])
    generator = torch.Generator().manual_seed(0)
    first = with_normalised_noise(batch, generator)["pixel_values"]
    second = with_normalised_noise(batch, generator)["pixel_values"]
    assert first.min() >= 0 and first.max() < 1
    assert first.mean().item() == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(first, second)
    # Normalised pixels of a real image leave [0, 1), those of the noise cannot.
    assert batch.inputs["pixel_values"].min() < 0


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
