"""Supervised fine-tuning on the chosen completions, alone or beside a preference objective."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import Objective, register

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("sft")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Negative log-likelihood of the chosen answers, a mean over all chosen tokens of the update.

    .. math:: -\\log \\pi(y_c) / \\bar n_c

    with n̄_c the mean number of chosen tokens, so that the mean over the update's pairs is the mean over its tokens.

    References:
      Pang et al., Iterative Reasoning Preference Optimization, 2024, eq. 1 (the term that `rpo_alpha` weights).
    """

    needs_reference: ClassVar[bool] = False
    is_preference: ClassVar[bool] = False
    paper: ClassVar[str] = "Pang et al. 2024, arXiv 2404.19733"

    def __call__(self, scores: PairScores) -> PerPair:
        return -scores.chosen_logps / scores.mean_chosen_length
