"""DPO with an offset: each row says by how much its answers differ."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.trainers.direct_preference_optimization_trainer.objectives.f_divergence import DivergenceObjective
from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import log_sigmoid
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import beta_option, register

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("odpo")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ODPO(DivergenceObjective):
    """ODPO: scores are to differ by the row's own margin, its column `margin`.

    .. math:: -\\log \\sigma(\\beta\\delta - m)

    m is in the units of beta times a log-ratio. The paper takes it from the answers' ratings q, as
    alpha log(q_c - q_r) or alpha times another increasing function of the difference.

    Raises:
      ValueError: when called, the batch has no margins, as may happen with a data_collator of your own.

    References:
      Amini et al., Direct Preference Optimization with an Offset, 2024, eq. 8.
    """

    needs_margin: ClassVar[bool] = True
    paper: ClassVar[str] = "Amini et al. 2024, arXiv 2402.10571"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        if scores.margin is None:
            raise ValueError(
                'odpo reads each pair\'s margin, but the batch has no "pair_margin"; let the data_collator give one, '
                "float32 [rows, slots] in nats."
            )
        return -log_sigmoid(self.beta * self.delta(scores) - scores.margin)
