"""HyPO: DPO that follows its reference only where the reference is right."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import log_sigmoid, relu
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    Objective,
    beta_option,
    register,
)

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("hypo")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HyPO(Objective):
    """HyPO: DPO whose reference counts as neutral on pairs that it ranks wrong.

    .. math:: -\\log \\sigma(\\beta (\\Delta_\\pi - \\max(0, \\Delta_{ref}))),
       \\qquad \\Delta = \\log p(y_c) - \\log p(y_r)

    Where the reference prefers the rejected completion, DPO is content once the policy prefers it a little less; this
    loss continues until the policy itself prefers the chosen one. At the initial policy it is at least DPO's, ln 2.

    References:
      Yuan et al., Mitigating Mismatch within Reference-based Preference Optimization, 2026.
    """

    paper: ClassVar[str] = "Yuan et al. 2026, arXiv 2602.11902"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        return -log_sigmoid(self.beta * (scores.policy_delta - relu(scores.reference_delta)))
