"""SimPER: a preference without reference and without options."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import exp
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import Objective, register

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("simper")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SimPER(Objective):
    """SimPER: the inverse perplexity of the rejected completion minus that of the chosen one.

    .. math:: e^{\\bar l_r} - e^{\\bar l_c}, \\qquad \\bar l = \\log \\pi(y) / n

    Between -1 and 1; unlike most losses it is negative once the chosen completion is the likelier one per token.

    References:
      Xiao et al., SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters, 2025, eq. 6.
    """

    needs_reference: ClassVar[bool] = False
    paper: ClassVar[str] = "Xiao et al. 2025, arXiv 2502.00883"

    def __call__(self, scores: PairScores) -> PerPair:
        return exp(scores.rejected_mean_logp) - exp(scores.chosen_mean_logp)
