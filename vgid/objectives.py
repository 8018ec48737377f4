"""Losses of unlearning as pure functions of logits and log-probabilities.

VGID's forward KL is equations 3 and 4 of the paper; the baselines are its Appendix A.3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl_per_position(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher || student) at each position: fp32 (or fp64, if given) of shape (...), in nats.

    Both logits have shape (..., V) and any floating dtype; no gradient flows into the teacher's.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    teacher_logp = F.log_softmax(teacher_logits.detach().to(dtype), dim=-1)
    student_logp = F.log_softmax(student_logits.to(dtype), dim=-1)
    # Forward KL, so the student is held to whatever the teacher finds likely: the refusal's words
    # as well as the rest. Reverse KL could be small on one of them alone.
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(dim=-1)


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(pi_T || pi_theta) of equations 3 and 4, mean over positions; a scalar in nats."""
    return forward_kl_per_position(teacher_logits, student_logits).mean()


def vgid_loss(forget_kl: Tensor, retain_kl: Tensor, alpha: float, beta: float) -> Tensor:
    """L_overall = alpha * L_forget + beta * L_retain: equation 5, and 7, 8 and 15 alike."""
    return alpha * forget_kl + beta * retain_kl


def gradient_ascent(logp: Tensor) -> Tensor:
    """GA, equation 6: mean of the forget answers' summed log-probabilities, shape (B,)."""
    return logp.mean()


def npo(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """NPO, equation 10, with the factor 2 / beta of its authors; beta > 0.

    ``logp`` are summed log-probabilities of the forget answers under the student, shape (B,),
    ``ref_logp`` the same under the frozen base.
    """
    # Equation 10 has no 2 / beta; with it, beta to 0 gives gradient ascent, as its authors show,
    # and a learning rate means about the same at every beta.
    return -(2 / beta) * F.logsigmoid(-beta * (logp - ref_logp.detach())).mean()


def dpo(
    chosen_logp: Tensor,
    ref_chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """PO as the paper writes it, equation 9: DPO of a refusal over the original answer; beta > 0.

    Given are summed log-probabilities of shape (B,), ``chosen`` of the refusals and ``rejected`` of
    the original answers, under the student and, ``ref``, under the frozen base.
    """
    chosen = chosen_logp - ref_chosen_logp.detach()
    rejected = rejected_logp - ref_rejected_logp.detach()
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def rmu_target(ref_hidden_TD: Tensor, direction_D: Tensor, steering: float) -> Tensor:
    """v_f of RMU, equation 12: ``steering * ||h_ref|| * u`` at each position, fp32 (or fp64).

    ``ref_hidden_TD`` are the frozen base's states, any floating dtype; ``direction_D`` is the unit
    vector u of equation 11; ``steering`` is lambda > 0.
    """
    dtype = torch.promote_types(ref_hidden_TD.dtype, torch.float32)
    lengths_T1 = ref_hidden_TD.detach().to(dtype).norm(dim=-1, keepdim=True)
    return steering * lengths_T1 * direction_D.to(dtype)


def rmu_forget(
    hidden_TD: Tensor, ref_hidden_TD: Tensor, direction_D: Tensor, steering: float
) -> Tensor:
    """Forget loss of RMU, equation 13: squared distance to v_f, mean over positions.

    ``hidden_TD`` are the student's states at layer l; the others are ``rmu_target``'s.
    """
    target_TD = rmu_target(ref_hidden_TD, direction_D, steering)
    return (hidden_TD.to(target_TD.dtype) - target_TD).square().sum(dim=-1).mean()


def rmu_retain(hidden_TD: Tensor, ref_hidden_TD: Tensor) -> Tensor:
    """Retain loss of RMU, equation 14: squared distance to the base, mean over positions."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    return (hidden_TD.to(dtype) - ref_hidden_TD.detach().to(dtype)).square().sum(dim=-1).mean()
