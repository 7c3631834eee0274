"""Divergences that hold the policy near the reference, as transforms of the log-ratio."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from easydel.options import option_field
from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import exp, expm1, log_sigmoid
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import Objective

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "chi_squared"]


def reverse_kl(log_ratio: PerPair, coefficient: float) -> PerPair:
    """DPO's own: h(r) = r."""
    del coefficient
    return log_ratio


def forward_kl(log_ratio: PerPair, coefficient: float) -> PerPair:
    """h(r) = 1 - exp(-r)."""
    del coefficient
    return 1 - exp(-log_ratio)


def js_divergence(log_ratio: PerPair, coefficient: float) -> PerPair:
    """Jensen-Shannon: h(r) = ln 2 + log sigma(r)."""
    del coefficient
    return math.log(2.0) + log_sigmoid(log_ratio)


def alpha_divergence(log_ratio: PerPair, coefficient: float) -> PerPair:
    """h(r) = (exp((alpha - 1) r) - 1) / (alpha - 1), which is r at alpha = 1."""
    if coefficient == 1.0:
        return log_ratio
    return expm1((coefficient - 1) * log_ratio) / (coefficient - 1)


def chi_squared(log_ratio: PerPair, coefficient: float) -> PerPair:
    """chi-squared mixed with KL (chi-PO): h(r) = r + exp(r) - 1, which is phi(z) = z + log z of the ratio z, minus 1.

    The paper's algorithm also clips beta (phi(z_c) - phi(z_r)) to twice the largest reward. Data give no such bound, so
    only the exponent is bounded here, against overflow.

    References:
      Huang et al., Correcting the Mythos of KL-Regularization, 2024, arXiv 2407.13399, algorithm 1.
    """
    del coefficient
    return log_ratio + expm1(log_ratio)


# The first four: Wang et al., Beyond Reverse KL, 2024. All up to constants, chosen so that h(0) = 0: a policy that
# equals its reference scores 0 under every divergence. In a difference of scores they cancel; where a loss averages
# over tokens they do not.
F_DIVERGENCES: dict[FDivergence, Callable[[PerPair, float], PerPair]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
    "chi_squared": chi_squared,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceObjective(Objective):
    """An objective of the difference of two scores s = h(r), whose divergence can be chosen.

    Under a divergence f the reward of a completion is beta h(r) plus a term that depends on the prompt alone. It
    cancels in a difference of two completions of one prompt, and only there: objectives that judge each completion by
    itself own no divergence.
    """

    f_divergence_type: FDivergence = option_field(
        "reverse_kl", changes="result", help="Divergence that holds the policy near the reference."
    )
    f_alpha_divergence_coef: float = option_field(0.5, changes="result", help="Coefficient of the alpha divergence.")

    def __post_init__(self) -> None:
        super().__post_init__()
        default = type(self).__dataclass_fields__["f_alpha_divergence_coef"].default
        if self.f_alpha_divergence_coef != default and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef={self.f_alpha_divergence_coef} has no effect with "
                f'f_divergence_type={self.f_divergence_type!r}; set f_divergence_type="alpha_divergence".'
            )

    def score(self, log_ratio: PerPair) -> PerPair:
        """s = h(r): a log-ratio in nats through the divergence."""
        return F_DIVERGENCES[self.f_divergence_type](log_ratio, self.f_alpha_divergence_coef)

    def delta(self, scores: PairScores) -> PerPair:
        """s_c - s_r."""
        return self.score(scores.chosen_log_ratio) - self.score(scores.rejected_log_ratio)

    def mean_delta(self, scores: PairScores) -> PerPair:
        """s_c / n_c - s_r / n_r: the difference of the scores averaged over their tokens."""
        chosen, rejected = self.score(scores.chosen_log_ratio), self.score(scores.rejected_log_ratio)
        return chosen / scores.chosen_length - rejected / scores.rejected_length
