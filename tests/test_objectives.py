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
