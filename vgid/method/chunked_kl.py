"""Forward KL at the response positions straight from hidden states, lean in memory.

Positions go through ``lm_head`` a chunk at a time, and the student's gradient is made in the same
pass; so two (chunk, V) buffers hold all that is vocabulary-sized. Shapes: R response positions, C
positions of a chunk, r a few of these, D hidden width, V vocabulary, v a block of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vgid.errors import InputError

BLOCK = 4096
"""Columns of the vocabulary whose products are made at a time: scratch is (C, BLOCK) at most."""


def chunked_kl(
    student_RD: Tensor,
    teacher_RD: Tensor,
    weight_VD: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk: int = 256,
) -> Tensor:
    """Sum over positions of KL(teacher || student): the sums in equations 3 and 4 of the paper.

    ``student_RD`` and ``teacher_RD`` are the last hidden states that predict the response tokens,
    of any floating dtype. The frozen ``lm_head``, ``weight_VD`` and ``bias_V``, makes logits of
    them: ``F.linear(hidden, weight_VD, bias_V)``. Only the student's states get a gradient, and it
    can be taken once. ``chunk`` positions go through ``lm_head`` at a time.

    A position with equal states adds exactly 0 to the value and to the gradient. One with NaN or
    inf makes the value NaN or inf. The same input gives the same bits.

    Returns:
        A scalar in nats: fp32, or fp64 where the weight is fp64.

    Raises:
        InputError: shapes that do not fit together, or a chunk below 1.
    """
    student, teacher, weight = (tuple(x.shape) for x in (student_RD, teacher_RD, weight_VD))
    bias = weight[:1] if bias_V is None else tuple(bias_V.shape)
    alike = len(student) == 2 and teacher == student
    connected = len(weight) == 2 and weight[-1:] == student[-1:]
    for fits, given, remedy in (
        (alike, f"teacher_RD: {teacher}", "both states as (R, D)"),
        (connected, f"weight_VD: {weight}", "lm_head's (V, D)"),
        (bias == weight[:1], f"bias_V: {bias}", "the same lm_head's, (V,)"),
        (chunk >= 1, f"chunk {chunk}", "1 or more"),
    ):
        if not fits:
            raise InputError(f"{given} does not fit; give {remedy}.")
    return _ChunkedKL.apply(
        student_RD,
        teacher_RD.detach(),
        weight_VD.detach(),
        None if bias_V is None else bias_V.detach(),
        chunk,
        torch.is_grad_enabled() and student_RD.requires_grad,
    )


# Of 2,000 response positions the logits over Qwen's 151,936 tokens are 1.2 GB in fp32, and autograd
# would keep several such tensors. But the derivative of KL(p || q) with respect to q's logits is
# q - p, which needs the chunk at hand only; behind lm_head it has the size of the hidden states.
class _ChunkedKL(torch.autograd.Function):
    """The value, with its gradient made in the forward pass while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        student_RD: Tensor,
        teacher_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        chunk: int,
        with_grad: bool,
    ) -> Tensor:
        """Keeps grad_RD, of the student's shape and dtype, if ``with_grad``."""
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        size = max(1, min(chunk, len(student_RD)))
        # One buffer for both hidden states: a matrix product may round differently at another
        # memory alignment, and equal hidden states must give equal logits.
        hidden_CD = weight_VD.new_empty(size, weight_VD.shape[1])
        teacher_CV = weight_VD.new_empty(size, len(weight_VD), dtype=dtype)
        student_CV = torch.empty_like(teacher_CV)
        kl_R = weight_VD.new_empty(len(student_RD), dtype=dtype)
        # Made now or never: in the backward pass the logits would have to be computed again.
        grad_RD = torch.empty_like(student_RD) if with_grad else None
        for start in range(0, len(student_RD), size):
            rows = slice(start, start + size)
            filled = slice(0, len(kl_R[rows]))
            for source_RD, logits_CV in ((teacher_RD, teacher_CV), (student_RD, student_CV)):
                hidden_CD[filled] = source_RD[rows]
                _logits(hidden_CD[filled], weight_VD, bias_V, logits_CV[filled])
            _divergence(teacher_CV[filled], student_CV[filled], kl_R[rows])
            if grad_RD is not None:
                grad_RD[rows] = _product(student_CV[filled], weight_VD)
        if grad_RD is not None:
            ctx.save_for_backward(grad_RD)
        return kl_R.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Of the student's states only."""
        (grad_RD,) = ctx.saved_tensors
        # The value is a sum, so what arrives is one factor for all positions.
        return grad_RD * grad_output, None, None, None, None, None


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out_CV: Tensor) -> None:
    """Fill ``out_CV``, block by block: logits of half precision never exist whole."""
    for start in range(0, len(weight_VD), BLOCK):
        v = slice(start, start + BLOCK)
        bias_v = None if bias_V is None else bias_V[v]
        out_CV[:, v] = F.linear(hidden_CD, weight_VD[v], bias_v)


def _divergence(teacher_CV: Tensor, student_CV: Tensor, out_C: Tensor) -> None:
    """KL of each position; ``student_CV`` then holds its gradient, p_student - p_teacher."""
    # A softmax needs whole rows, so scratch here is a few rows, as large as a block of columns.
    size = max(1, len(teacher_CV) * BLOCK // teacher_CV.shape[1])
    for start in range(0, len(teacher_CV), size):
        rows = slice(start, start + size)
        # Equations 3 and 4: sum over v of p_teacher * (log p_teacher - log p_student).
        ratio_rV = F.log_softmax(teacher_CV[rows], dim=-1)
        ratio_rV -= F.log_softmax(student_CV[rows], dim=-1)
        p_teacher_rV = F.softmax(teacher_CV[rows], dim=-1)
        out_C[rows] = ratio_rV.mul_(p_teacher_rV).sum(dim=-1)
        # Not exp of the log-softmax: the fused kernel is faster on CPU.
        torch.sub(F.softmax(student_CV[rows], dim=-1), p_teacher_rV, out=student_CV[rows])


def _product(difference_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """``difference_CV @ weight_VD`` in the weight's dtype, blocks added up in the buffer's."""
    # A bf16 sum of 38 blocks (Qwen) would lose the small ones, so only the products are bf16.
    grad_CD = difference_CV.new_zeros(len(difference_CV), weight_VD.shape[1])
    for start in range(0, len(weight_VD), BLOCK):
        v = slice(start, start + BLOCK)
        grad_CD += difference_CV[:, v].to(weight_VD.dtype) @ weight_VD[v]
    return grad_CD
