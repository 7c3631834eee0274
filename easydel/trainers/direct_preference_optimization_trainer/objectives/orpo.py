"""ORPO: fine-tuning and preference in one loss, without reference."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import log_sigmoid
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    Objective,
    beta_option,
    register,
)
from easydel.trainers.direct_preference_optimization_trainer.objectives.sft import SFT

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair

# A completion's mean log-probability counts as at most this: its odds p / (1 - p) have no bound.
LARGEST_MEAN_LOGP = -1e-6


@register("orpo")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """ORPO: likelihood of the chosen answers, plus β times the log-sigmoid of the log odds ratio.

    .. math:: -\\log \\pi(y_c) / \\bar n_c - \\beta \\log \\sigma\\left(
       \\log \\frac{p_c}{1 - p_c} - \\log \\frac{p_r}{1 - p_r}\\right), \\qquad p = \\pi(y)^{1/n}

    beta is the paper's lambda, as in TRL. The likelihood is that of `SFT`: over the completion's tokens, a mean over
    the update, while TRL's is over the tokens of prompt and completion.

    References:
      Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, 2024, eqs. 6 and 7.
    """

    needs_reference: ClassVar[bool] = False
    paper: ClassVar[str] = "Hong et al. 2024, arXiv 2403.07691"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        log_odds_ratio = log_odds(scores.chosen_mean_logp) - log_odds(scores.rejected_mean_logp)
        return SFT()(scores) - self.beta * log_sigmoid(log_odds_ratio)


def log_odds(logp: PerPair) -> PerPair:
    """log(p / (1 - p)) from log p, in nats, to float precision for p near 0 and near 1.

    Args:
      logp: log-probabilities; above `LARGEST_MEAN_LOGP` they count as that.

    References:
      Mächler, Accurately Computing log(1 - exp(-|a|)), 2012.
    """
    import jax.numpy as jnp

    logp = jnp.minimum(logp, LARGEST_MEAN_LOGP)
    is_likely = logp > -math.log(2)
    # Each branch sees only its own half, so that the gradient of the other is finite too.
    likely, unlikely = jnp.where(is_likely, logp, -1.0), jnp.where(is_likely, -1.0, logp)
    return logp - jnp.where(is_likely, jnp.log(-jnp.expm1(likely)), jnp.log1p(-jnp.exp(unlikely)))
