import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vgid.errors import InputError
from vgid.method.chunked_kl import BLOCK, chunked_kl
from vgid.objectives import forward_kl_per_position

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def problem(R, V, D, dtype=torch.float64, device="cpu", scale=1.0, seed=0):
    """Student and teacher hidden states, weight, bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    teacher = normal(R, D)
    student = teacher + 0.5 * normal(R, D)
    weight, bias = scale * normal(V, D) / D**0.5, normal(V)
    return [t.to(device, dtype) for t in (student, teacher, weight, bias)]


def naive(student, teacher, weight, bias=None):
    """The same sum from full logits."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher, weight, bias)
    return forward_kl_per_position(teacher_logits, F.linear(student, weight, bias)).sum()


def value_and_grad(function, student, *args, **kwargs):
    student = student.detach().clone().requires_grad_()
    value = function(student, *args, **kwargs)
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 11, 256])
@pytest.mark.parametrize("V", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 77])
def test_value_and_gradient_are_those_of_full_logits(V, chunk, with_bias, device):
    student, teacher, weight, bias = problem(10, V, 6, device=device)
    bias = bias if with_bias else None
    got = value_and_grad(chunked_kl, student, teacher, weight, bias_V=bias, chunk=chunk)
    expected = value_and_grad(naive, student, teacher, weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("V", [5, BLOCK + 3])
def test_gradient_passes_gradcheck(V):
    student, teacher, weight, bias = problem(5, V, 3)

    def loss(student):
        return 0.3 * chunked_kl(student, teacher, weight, bias_V=bias, chunk=2)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_fp32_agrees_with_fp64(scale, device):
    student, teacher, weight, bias = problem(70, 5000, 32, torch.float32, device, scale)
    value, grad = value_and_grad(chunked_kl, student, teacher, weight, bias_V=bias, chunk=32)
    assert value.dtype == grad.dtype == torch.float32
    expected, expected_grad = value_and_grad(
        naive, student.double(), teacher.double(), weight.double(), bias.double()
    )
    # A KL near 0 is a difference of log-probabilities, each rounded at about 1e-6.
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=70 * 1e-6)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
    torch.testing.assert_close(
        (value, grad), value_and_grad(naive, student, teacher, weight, bias), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_agrees_with_fp32_within_the_rounding_of_its_logits(device):
    student, teacher, weight, bias = problem(70, 5000, 32, torch.bfloat16, device)
    value, grad = value_and_grad(chunked_kl, student, teacher, weight, bias_V=bias, chunk=32)
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    exact = [t.float() for t in (student, teacher, weight, bias)]
    expected, expected_grad = value_and_grad(naive, *exact)
    # bf16 keeps 8 bits: logits of about 1 are off by up to 2**-8, gradients by as much relatively.
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert (grad - expected_grad).norm() <= 1e-2 * expected_grad.norm()
    by_full_logits = value_and_grad(naive, student, teacher, weight, bias)[1]
    error = (by_full_logits - expected_grad).norm()
    assert (grad - expected_grad).norm() <= 1.5 * error, "no worse than bf16 autograd"


def test_hidden_states_of_another_dtype_go_through_the_weight_s():
    student, teacher, weight, _ = problem(9, 50, 6, torch.float32)
    value, grad = value_and_grad(chunked_kl, student, teacher.bfloat16(), weight.bfloat16())
    assert value.dtype == grad.dtype == torch.float32
    expected, expected_grad = value_and_grad(
        naive, student.bfloat16(), teacher.bfloat16(), weight.bfloat16()
    )
    assert value.item() == expected.item()
    torch.testing.assert_close(grad, expected_grad.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_underflowing_teacher(dtype, device):
    # Logits from 0 down to -300, so that most teacher probabilities are 0 in fp32. One student is
    # close; the other puts its mass at the far end, where it gives nothing to the answer.
    weight = torch.linspace(-300, 0, 400, dtype=torch.float64)[:, None].to(device)
    teacher = torch.ones(2, 1, dtype=torch.float64, device=device)
    student = torch.tensor([[0.9], [-1.0]], dtype=torch.float64, device=device)
    assert (F.softmax(teacher.float() @ weight.float().T, -1) == 0).float().mean() > 0.6
    for row in range(2):
        pair = student[row : row + 1], teacher[row : row + 1]
        got = value_and_grad(chunked_kl, *(t.to(dtype) for t in (*pair, weight)))
        expected = value_and_grad(naive, *pair, weight)
        torch.testing.assert_close(tuple(t.double() for t in got), expected, rtol=1e-5, atol=1e-6)
    assert expected[0] > 290


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 4, 7, 256])
def test_exactly_zero_where_hidden_states_are_equal(chunk, dtype, device):
    student, teacher, weight, bias = problem(23, BLOCK + 9, 33, dtype, device)
    value, grad = value_and_grad(chunked_kl, teacher, teacher, weight, bias_V=bias, chunk=chunk)
    assert value.item() == 0.0
    assert not grad.any()

    # Some rows only, and a teacher whose memory is aligned otherwise, as in a mapped file.
    shifted = torch.empty(teacher.numel() + 1, dtype=dtype, device=device)[1:].view_as(teacher)
    shifted.copy_(teacher)
    same = torch.arange(23, device=device) % 3 == 0
    mixed = torch.where(same[:, None], teacher, student)
    value, grad = value_and_grad(chunked_kl, mixed, shifted, weight, bias_V=bias, chunk=chunk)
    assert value.item() > 0
    assert (grad.abs().sum(1) == 0).tolist() == same.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["student", "teacher", "weight"])
def test_what_is_not_finite_is_not_hidden(bad, place):
    student, teacher, weight, _ = problem(6, BLOCK + 9, 4, torch.float32)
    {"student": student, "teacher": teacher, "weight": weight}[place][2, 1] = bad
    value, grad = value_and_grad(chunked_kl, student, teacher, weight, chunk=4)
    assert not value.isfinite()
    assert not grad[2].isfinite().all()
    if place != "weight":
        assert grad[[0, 1, 3, 4, 5]].isfinite().all()


def test_no_positions_give_zero_and_no_gradient():
    student, teacher, weight, bias = problem(0, 11, 4, torch.float32)
    value, grad = value_and_grad(chunked_kl, student, teacher, weight, bias_V=bias)
    assert value.item() == 0.0 and value.shape == ()
    assert grad.shape == (0, 4)


def test_only_the_student_gets_a_gradient_and_inputs_stay_as_they_were():
    inputs = [t.requires_grad_() for t in problem(5, 30, 4)]
    before = [t.detach().clone() for t in inputs]
    student, teacher, weight, bias = inputs
    (2 * chunked_kl(student, teacher, weight, bias_V=bias, chunk=2)).backward()
    assert student.grad is not None
    assert teacher.grad is None and weight.grad is None and bias.grad is None
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))

    assert not chunked_kl(student.detach(), teacher, weight, bias_V=bias).requires_grad
    with torch.no_grad():
        assert not chunked_kl(student, teacher, weight, bias_V=bias).requires_grad


def test_without_a_gradient_none_is_computed():
    student, teacher, weight, _ = problem(5, 30, 4)

    def products(student):
        with Recorder(1) as recorder:
            chunked_kl(student, teacher, weight)
        return recorder.calls[torch.ops.aten.mm.default]

    assert products(student) == 2
    assert products(student.requires_grad_()) == 3
    with torch.no_grad():
        assert products(student) == 2


def test_gradient_of_the_gradient_is_refused():
    student, teacher, weight, _ = problem(5, 30, 4)
    value = chunked_kl(student.requires_grad_(), teacher, weight)
    (grad,) = torch.autograd.grad(value**2, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_backward_can_be_repeated_and_bits_do_not_change():
    student, teacher, weight, bias = problem(70, 5000, 32, torch.float32)
    first = value_and_grad(chunked_kl, student, teacher, weight, bias_V=bias, chunk=32)
    second = value_and_grad(chunked_kl, student, teacher, weight, bias_V=bias, chunk=32)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])

    leaf = student.clone().requires_grad_()
    value = chunked_kl(leaf, teacher, weight, bias_V=bias, chunk=32)
    value.backward(retain_graph=True)
    value.backward()
    assert torch.equal(leaf.grad, 2 * first[1])


class Recorder(TorchDispatchMode):
    """Counts calls of operators, and storages of at least ``numel`` elements alive at once.

    Operators see what autograd and composite functions are made of, in both passes; a storage
    counts from the operator that returned it until it is freed.
    """

    def __init__(self, numel):
        super().__init__()
        self.numel = numel
        self.calls = {}
        self.alive = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func] = self.calls.get(func, 0) + 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.nbytes() >= self.numel * leaf.element_size():
                    self.alive.add(storage)
        self.peak = max(self.peak, len(self.alive))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("R", "V", "chunk"), [(70, 3 * BLOCK + 5, 32), (40, BLOCK + 600, 64)])
def test_two_vocabulary_sized_buffers_and_no_more(R, V, chunk, dtype):
    student, teacher, weight, bias = problem(R, V, 8, dtype)
    size = min(R, chunk) * V

    def peak(function, **kwargs):
        leaf = student.clone().requires_grad_()
        with Recorder(size) as recorder:
            function(leaf, teacher, weight, **kwargs).backward()
        assert not recorder.alive, "nothing vocabulary-sized outlives the step"
        return recorder.peak

    assert peak(chunked_kl, bias_V=bias, chunk=chunk) == 2
    assert peak(naive, bias=bias) >= 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher_RD": torch.zeros(4, 4)}, "teacher_RD"),
        ({"teacher_RD": torch.zeros(1, 4)}, "teacher_RD"),
        ({"student_RD": torch.zeros(1, 5, 4), "teacher_RD": torch.zeros(1, 5, 4)}, "teacher_RD"),
        ({"weight_VD": torch.zeros(9, 3)}, "weight_VD"),
        ({"weight_VD": torch.zeros(4)}, "weight_VD"),
        ({"bias_V": torch.zeros(1)}, "bias_V"),
        ({"chunk": 0}, "chunk 0"),
    ],
)
def test_bad_input_is_one_sentence(change, named):
    good = {
        "student_RD": torch.zeros(5, 4),
        "teacher_RD": torch.zeros(5, 4),
        "weight_VD": torch.zeros(9, 4),
    }
    assert chunked_kl(**good).item() == 0.0
    with pytest.raises(InputError, match=f"^{named}.*; give .*[.]$"):
        chunked_kl(**(good | change))
