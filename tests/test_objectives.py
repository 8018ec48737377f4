import math

import pytest
import torch
import torch.nn.functional as F

from vgid import objectives


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_forward_kl_value_is_the_textbook_sum():
    teacher, student = double(3, 5), double(3, 5, seed=1)
    expected = 0.0
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        p = [math.exp(x) / sum(math.exp(y) for y in t) for x in t]
        q = [math.exp(x) / sum(math.exp(y) for y in s) for x in s]
        expected += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True)) / 3
    assert objectives.forward_kl(teacher, student).item() == pytest.approx(expected, rel=1e-12)


def test_forward_kl_agrees_with_torch_on_any_leading_shape():
    teacher, student = double(2, 4, 7), double(2, 4, 7, seed=1)
    expected = F.kl_div(
        F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="none", log_target=True
    ).sum(-1)
    got = objectives.forward_kl_per_position(teacher, student)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(objectives.forward_kl(teacher, student), expected.mean())


def test_forward_kl_gradient_is_difference_of_distributions():
    teacher, student = double(4, 6), double(4, 6, seed=1).requires_grad_()
    objectives.forward_kl(teacher, student).backward()
    expected = (student.detach().softmax(-1) - teacher.softmax(-1)) / 4
    torch.testing.assert_close(student.grad, expected)


def test_forward_kl_is_exactly_zero_for_equal_logits_and_blind_to_shifts():
    logits = torch.randn(5, 9)
    assert objectives.forward_kl(logits, logits.clone()).item() == 0.0
    assert objectives.forward_kl(logits, logits + 3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_forward_kl_is_forward():
    """KL(p || q) is infinite where q misses p, KL(q || p) is not: the order of arguments counts."""
    teacher = torch.tensor([[0.0, 0.0]])
    student = torch.tensor([[0.0, -1000.0]])
    assert objectives.forward_kl(teacher, student).item() > 100
    assert objectives.forward_kl(student, teacher).item() == pytest.approx(math.log(2), rel=1e-6)


def test_forward_kl_sends_no_gradient_to_the_teacher_and_computes_in_fp32():
    teacher = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    student = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    loss = objectives.forward_kl(teacher, student)
    loss.backward()
    assert loss.dtype == torch.float32
    assert teacher.grad is None
    assert student.grad is not None


def test_vgid_loss_is_equation_5():
    forget, retain = torch.tensor(2.0), torch.tensor(3.0)
    assert objectives.vgid_loss(forget, retain, 0.5, 4.0).item() == 0.5 * 2 + 4 * 3


def test_rmu_of_two_layers_by_hand():
    """The first of two linear layers is steered: every number is worked out on paper."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    base = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    second = torch.eye(2, dtype=torch.float64, requires_grad=True)
    up = torch.tensor([0.0, 1.0], dtype=torch.float64)
    hidden = (first @ x)[None]  # (1, 1)
    assert (second @ hidden[0]).tolist() == [1.0, 1.0]
    ref = (base @ x)[None]  # (3, 4), of length 5
    # Target (0, 2 * 5): 1^2 + 9^2.
    assert objectives.rmu_target(ref, up, 2.0).tolist() == [[0.0, 10.0]]
    forget = objectives.rmu_forget(hidden, ref, up, 2.0)
    assert forget.item() == 82.0
    # (1 - 3)^2 + (1 - 4)^2.
    retain = objectives.rmu_retain(hidden, ref)
    assert retain.item() == 13.0
    # d/dW1 = 2 (h - v) x^T + 10 * 2 (h - h_ref) x^T; nothing reaches the second layer.
    objectives.vgid_loss(forget, retain, 1.0, 10.0).backward()
    assert first.grad.tolist() == [[2.0 - 40.0, 4.0 - 80.0], [-18.0 - 60.0, -36.0 - 120.0]]
    assert second.grad is None


def test_rmu_is_the_mean_over_positions_and_blind_to_the_reference_s_gradient():
    hidden = double(5, 7).requires_grad_()
    ref = double(5, 7, seed=1).requires_grad_()
    direction = F.normalize(double(7, seed=2), dim=0)
    forget = objectives.rmu_forget(hidden, ref, direction, 3.0)
    retain = objectives.rmu_retain(hidden, ref)
    expected, kept = 0.0, 0.0
    for h, r in zip(hidden.tolist(), ref.tolist(), strict=True):
        length = math.sqrt(sum(a * a for a in r))
        target = [3.0 * length * u for u in direction.tolist()]
        expected += sum((a - v) ** 2 for a, v in zip(h, target, strict=True)) / 5
        kept += sum((a - b) ** 2 for a, b in zip(h, r, strict=True)) / 5
    assert forget.item() == pytest.approx(expected, rel=1e-12)
    assert retain.item() == pytest.approx(kept, rel=1e-12)
    (forget + retain).backward()
    assert ref.grad is None
    half = hidden.detach().bfloat16()
    assert objectives.rmu_forget(half, half, direction, 3.0).dtype == torch.float32
    assert objectives.rmu_retain(half, half).item() == 0.0


def test_gradient_ascent_value_and_gradient():
    logp = double(4).requires_grad_()
    loss = objectives.gradient_ascent(logp)
    loss.backward()
    assert loss.item() == pytest.approx(sum(logp.tolist()) / 4)
    torch.testing.assert_close(logp.grad, torch.full_like(logp, 1 / 4))


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.2])
def test_npo_value_and_gradient(beta):
    logp, ref = double(5).requires_grad_(), double(5, seed=1)
    loss = objectives.npo(logp, ref, beta)
    loss.backward()
    expected, gradient = 0.0, []
    for a, b in zip(logp.tolist(), ref.tolist(), strict=True):
        ratio = math.exp(beta * (a - b))
        expected += 2 / beta * math.log(1 + ratio) / 5
        gradient.append(2 * ratio / (1 + ratio) / 5)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logp.grad, torch.tensor(gradient, dtype=torch.float64))


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    logp, ref = double(5).requires_grad_(), double(5, seed=1)
    objectives.npo(logp, ref, 1e-6).backward()
    torch.testing.assert_close(logp.grad, torch.full_like(logp, 1 / 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_value_and_gradient(beta):
    chosen, rejected = double(4).requires_grad_(), double(4, seed=1).requires_grad_()
    ref_chosen, ref_rejected = double(4, seed=2), double(4, seed=3)
    loss = objectives.dpo(chosen, ref_chosen, rejected, ref_rejected, beta)
    loss.backward()
    expected, gradient = 0.0, []
    for c, rc, r, rr in zip(
        *(x.tolist() for x in (chosen, ref_chosen, rejected, ref_rejected)), strict=True
    ):
        margin = beta * ((c - rc) - (r - rr))
        expected += math.log(1 + math.exp(-margin)) / 4
        gradient.append(-beta / (1 + math.exp(margin)) / 4)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(chosen.grad, torch.tensor(gradient, dtype=torch.float64))
    torch.testing.assert_close(rejected.grad, -torch.tensor(gradient, dtype=torch.float64))
