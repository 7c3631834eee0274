"""AlphaPO: SimPO with a reward of another shape."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.options import option_field
from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import expm1
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import register
from easydel.trainers.direct_preference_optimization_trainer.objectives.simpo import SimPO

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("alphapo")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphaPO(SimPO):
    """AlphaPO: SimPO on a power of the length-averaged probability instead of its logarithm.

    .. math:: -\\log \\sigma(\\beta (R_c - R_r) - \\gamma),
       \\qquad R = (1 - \\bar p^{-\\alpha}) / \\alpha, \\; \\bar p = \\pi(y)^{1/n}

    At alpha = 0 it is SimPO. alpha and gamma are those of TRL's CPO trainer (`alpha`, `simpo_gamma`).

    References:
      Gupta et al., AlphaPO: Reward Shape Matters for LLM Alignment, 2025, eq. 5.
    """

    paper: ClassVar[str] = "Gupta et al. 2025, arXiv 2501.03884"
    alphapo_alpha: float = option_field(
        0.25, changes="result", help="Power α of AlphaPO's reward; 0 is the logarithm, which is SimPO."
    )

    def rewards(self, scores: PairScores) -> tuple[PerPair, PerPair]:
        """``(chosen, rejected)``: R of the class."""
        if self.alphapo_alpha == 0:
            return super().rewards(scores)
        chosen, rejected = (
            expm1(-self.alphapo_alpha * logp) / -self.alphapo_alpha
            for logp in (scores.chosen_mean_logp, scores.rejected_mean_logp)
        )
        return chosen, rejected
