"""Objectives that judge each completion of a pair by itself, not only against the other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import log_sigmoid, sigmoid
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    Objective,
    beta_option,
    register,
)

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("nca_pair")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NCA(Objective):
    """NCA: the chosen score is to rise by itself, not only against the rejected one.

    .. math:: -\\log \\sigma(\\beta r_c) - \\tfrac12 \\log \\sigma(-\\beta r_c) - \\tfrac12 \\log \\sigma(-\\beta r_r)

    References:
      Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, 2024, eq. 12.
    """

    paper: ClassVar[str] = "Chen et al. 2024, arXiv 2402.05369"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        chosen, rejected = self.beta * scores.chosen_log_ratio, self.beta * scores.rejected_log_ratio
        return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


@register("bco_pair")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BCO(Objective):
    """BCO: a binary classifier of each completion, without the paper's reward shift.

    .. math:: -\\log \\sigma(\\beta r_c) - \\log \\sigma(-\\beta r_r)

    References:
      Jung et al., Binary Classifier Optimization for Large Language Model Alignment, 2024.
    """

    paper: ClassVar[str] = "Jung et al. 2024, arXiv 2404.04656"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        return -log_sigmoid(self.beta * scores.chosen_log_ratio) - log_sigmoid(-self.beta * scores.rejected_log_ratio)


@register("sppo_hard")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SPPO(Objective):
    """SPPO: self-play with hard win rates of 1 and 0.

    .. math:: (r_c - \\tfrac{1}{2\\beta})^2 + (r_r + \\tfrac{1}{2\\beta})^2

    References:
      Wu et al., Self-Play Preference Optimization for Language Model Alignment, 2024, eq. 4.7.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2405.00675"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        target = 0.5 / self.beta
        return (scores.chosen_log_ratio - target) ** 2 + (scores.rejected_log_ratio + target) ** 2


@register("apo_zero")
@dataclasses.dataclass(frozen=True, kw_only=True)
class APOZero(Objective):
    """APO-zero: raise the chosen, lower the rejected; for a model worse than the chosen answers.

    .. math:: 1 - \\sigma(\\beta r_c) + \\sigma(\\beta r_r)

    References:
      D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, 2024.
    """

    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv 2408.06266"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        return 1 - sigmoid(self.beta * scores.chosen_log_ratio) + sigmoid(self.beta * scores.rejected_log_ratio)


@register("apo_down")
@dataclasses.dataclass(frozen=True, kw_only=True)
class APODown(Objective):
    """APO-down: lower both, the rejected more; for a model better than the chosen answers.

    .. math:: \\sigma(\\beta r_c) + 1 - \\sigma(\\beta (r_c - r_r))

    References:
      D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, 2024.
    """

    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv 2408.06266"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        chosen, rejected = scores.chosen_log_ratio, scores.rejected_log_ratio
        return sigmoid(self.beta * chosen) + 1 - sigmoid(self.beta * (chosen - rejected))
