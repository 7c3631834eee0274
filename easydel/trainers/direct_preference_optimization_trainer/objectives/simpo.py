"""SimPO: a preference without reference, by a target margin."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.options import Range, option_field
from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import smoothed_log_sigmoid
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    Objective,
    beta_option,
    label_smoothing_option,
    register,
)

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("simpo")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SimPO(Objective):
    """SimPO: length-averaged log-probabilities are to differ by a target margin.

    .. math:: -\\log \\sigma(\\beta (\\bar l_c - \\bar l_r) - \\gamma),
       \\qquad \\bar l = \\log \\pi(y) / n

    gamma, `target_margin`, is in the units of beta times a log-probability, as in the paper's eq. 6 and in TRL
    (`simpo_gamma`). The authors' code is given gamma / beta (`gamma_beta_ratio`): multiply that by beta.

    With label smoothing, the label of a pair is taken to be swapped at that rate.

    References:
      Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024, eq. 6.
    """

    needs_reference: ClassVar[bool] = False
    paper: ClassVar[str] = "Meng et al. 2024, arXiv 2405.14734"
    beta: float = beta_option()
    target_margin: float = option_field(
        0.5,
        changes="result",
        within=Range(least=0),
        help="Margin γ, times beta, by which length-averaged log-probs are to differ; γ = beta * gamma_beta_ratio.",
    )
    label_smoothing: float = label_smoothing_option()

    def rewards(self, scores: PairScores) -> tuple[PerPair, PerPair]:
        """``(chosen, rejected)``, whose difference times beta is to exceed the target margin."""
        return scores.chosen_mean_logp, scores.rejected_mean_logp

    def __call__(self, scores: PairScores) -> PerPair:
        chosen, rejected = self.rewards(scores)
        return -smoothed_log_sigmoid(self.beta * (chosen - rejected) - self.target_margin, self.label_smoothing)
