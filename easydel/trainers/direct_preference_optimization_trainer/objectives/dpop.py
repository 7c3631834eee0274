"""DPO-Positive: DPO that does not lower the chosen completion."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.options import POSITIVE, option_field
from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import log_sigmoid, relu
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    Objective,
    beta_option,
    register,
)

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("dpop")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOP(Objective):
    """DPO-Positive (Smaug): a penalty where the chosen completion is less likely than under the reference.

    .. math:: -\\log \\sigma(\\beta (r_c - r_r - \\lambda \\max(0, -r_c)))

    The penalty stands inside the sigmoid, as in the paper.

    References:
      Pal et al., Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, 2024, eq. 3.
    """

    paper: ClassVar[str] = "Pal et al. 2024, arXiv 2402.13228"
    beta: float = beta_option()
    dpop_lambda: float = option_field(
        50.0,
        changes="result",
        within=POSITIVE,
        help="Weight λ of the penalty on a chosen completion that is less likely than under the reference.",
    )

    def __call__(self, scores: PairScores) -> PerPair:
        chosen, rejected = scores.chosen_log_ratio, scores.rejected_log_ratio
        return -log_sigmoid(self.beta * (chosen - rejected - self.dpop_lambda * relu(-chosen)))
