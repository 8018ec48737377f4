"""The paper's unlearning methods: what each teaches the student, and by which losses.

Every method minimises ``alpha * forget + beta * retain`` (equation 5), shares of means over the
whole batch: over response tokens for KL and cross-entropy, over samples for the others. Sources:
VGID, ICU-T and Noise-T, paper section 3; the others, its Appendix A.3.2, with the means and factors
of the public MLLMU-Bench and NPO code. Shape legend: D hidden width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vgid import config
from vgid.config import TrialConfig, uses
from vgid.errors import SettingError
from vgid.method.student import View
from vgid.method.teacher import Intervention, TargetSource
from vgid.models.backbones import Backbone
from vgid.objectives import dpo, npo, rmu_forget, rmu_retain
from vgid.seeds import sample_generator


class UnlearningMethod(ABC):
    """One method, made for the hyperparameters of one trial and one frozen base."""

    paired = False  # whether a sample brings all its target sets into a batch at once, not in turn
    layers: int | None = None  # that training runs; None for all and ``lm_head``

    def __init__(self, trial: TrialConfig, backbone: Backbone) -> None:
        self.trial = trial

    def forget_teachers(self, seed: int) -> list[tuple[Intervention, TargetSource]]:
        """The target sets of the forget samples; by default, as of retain samples, answers."""
        return [(Intervention(), "reference")]

    @abstractmethod
    def forget_loss(self, view: View) -> Tensor:
        """This share of L_forget, a scalar."""

    def retain_loss(self, view: View) -> Tensor | None:
        """This share of L_retain, a scalar; None for the methods that have none."""
        return None


class Distillation(UnlearningMethod):
    """VGID: the base under the dual intervention; ICU-T and Noise-T under one half of it each."""

    def forget_teachers(self, seed: int) -> list[tuple[Intervention, TargetSource]]:
        """The intervened teacher, one target set for each response source."""
        trial = self.trial
        noise = trial.noise_type if uses(trial.method, "noise_type") else None
        style = trial.prompt_style if uses(trial.method, "prompt_style") else None
        intervention = Intervention(noise, trial.sigma, style, seed)
        if trial.response_source == "mixed":
            return [(intervention, "teacher"), (intervention, "reference")]
        return [(intervention, trial.response_source)]

    def forget_loss(self, view: View) -> Tensor:
        """Forward KL from the intervened teacher, equation 3."""
        return view.kl()

    def retain_loss(self, view: View) -> Tensor:
        """Forward KL from the frozen base, equation 4."""
        return view.kl()


def _ascent(view: View, beta: float) -> Tensor:
    """Equation 6."""
    # Unbounded below: nothing stops it where the model is broken already (Appendix A.3.2).
    return -view.cross_entropy()


def _preferring(view: View, beta: float) -> Tensor:
    """Equation 9."""
    # Both responses ride in one batch, all preferred ones first: they share the prompt's tokens.
    chosen, rejected = view.logp().chunk(2)
    ref_chosen, ref_rejected = view.ref_logp().chunk(2)
    return view.of_batch(dpo(chosen, ref_chosen, rejected, ref_rejected, beta))


class Losses(NamedTuple):
    """What makes a baseline; ``forget`` is given ``preference_beta``."""

    forget: Callable[[View, float], Tensor]
    retain: Callable[[View], Tensor] | None = None
    answers: tuple[TargetSource, ...] = ("reference",)  # preferred ones first


BASELINES: dict[config.Method, Losses] = {
    "ga": Losses(_ascent),
    "ga_diff": Losses(_ascent, View.cross_entropy),  # equation 7; its lambda is the trial's beta
    "kl_min": Losses(_ascent, View.kl),  # equation 8
    # PO as public code has it: a refusal in place of each answer; and as the paper writes it.
    "po_idk": Losses(lambda view, beta: view.cross_entropy(), answers=("refusal",)),
    "po_dpo": Losses(_preferring, answers=("refusal", "reference")),
    # Equation 10, with the factor 2 / beta of its authors.
    "npo": Losses(lambda view, beta: view.of_batch(npo(view.logp(), view.ref_logp(), beta))),
}


class Baseline(UnlearningMethod):
    """A method that is no more than its row in ``BASELINES``; the base is its only teacher."""

    def __init__(self, trial: TrialConfig, backbone: Backbone) -> None:
        super().__init__(trial, backbone)
        self.losses = BASELINES[trial.method]
        self.paired = len(self.losses.answers) > 1

    def forget_teachers(self, seed: int) -> list[tuple[Intervention, TargetSource]]:
        """The row's answers, of which refusals are drawn."""
        seeds = {"refusal": seed}
        return [(Intervention(seed=seeds.get(whose, 0)), whose) for whose in self.losses.answers]

    def forget_loss(self, view: View) -> Tensor:
        """The row's."""
        return self.losses.forget(view, self.trial.preference_beta)

    def retain_loss(self, view: View) -> Tensor | None:
        """The row's, if it has one."""
        return self.losses.retain and self.losses.retain(view)


class RepresentationMisalignment(UnlearningMethod):
    """RMU: the output of one inner layer is steered to a random direction; gamma is ``beta`` here.

    Layers above the steered one do not train; one that the model lacks is a ``SettingError``.
    """

    def __init__(self, trial: TrialConfig, backbone: Backbone) -> None:
        super().__init__(trial, backbone)
        text = backbone.model.config.get_text_config()
        depth = text.num_hidden_layers
        self.layer = self.layers = trial.rmu_layer or max(1, depth // 3)
        if self.layer > depth:
            raise SettingError(
                f"rmu_layer: {backbone.spec.name} has {depth} layers, got {self.layer}; lower it."
            )
        # Equation 11: a Gaussian vector made unit length is uniform on the sphere.
        direction = sample_generator(trial.seed, "rmu direction").standard_normal(text.hidden_size)
        self.direction_D = torch.from_numpy(direction / np.linalg.norm(direction)).float()
        self.direction_D = self.direction_D.to(backbone.device)

    def forget_loss(self, view: View) -> Tensor:
        """Equations 12 and 13."""
        target = self.direction_D, self.trial.rmu_steering
        return self._mean(view, lambda hidden_TD, ref_TD: rmu_forget(hidden_TD, ref_TD, *target))

    def retain_loss(self, view: View) -> Tensor:
        """Equation 14."""
        return self._mean(view, rmu_retain)

    def _mean(self, view: View, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """This share of a loss over the layer's states, the student's and the base's."""
        ref = view.ref_layer_hidden(self.layer)
        pairs = zip(view.layer_hidden(self.layer), ref, strict=True)
        return view.of_batch(torch.stack([loss(hidden, base) for hidden, base in pairs]).mean())


METHODS: dict[config.Method, type[UnlearningMethod]] = {
    **dict.fromkeys(("vgid", "icu_t", "noise_t"), Distillation),
    **dict.fromkeys(BASELINES, Baseline),
    "rmu": RepresentationMisalignment,
}


def make_method(trial: TrialConfig, backbone: Backbone) -> UnlearningMethod:
    """The method of a trial; ``SettingError`` if it asks for a layer that the backbone lacks."""
    return METHODS[trial.method](trial, backbone)
