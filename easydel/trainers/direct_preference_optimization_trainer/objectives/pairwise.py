"""Objectives of the difference of a pair's scores: DPO and its nearest relatives."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from easydel.options import POSITIVE, option_field
from easydel.trainers.direct_preference_optimization_trainer.objectives import numerics
from easydel.trainers.direct_preference_optimization_trainer.objectives.f_divergence import DivergenceObjective
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    beta_option,
    label_smoothing_option,
    register,
)

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@register("sigmoid")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid(DivergenceObjective):
    """DPO: Bradley-Terry log-likelihood of the preference; with label smoothing, conservative DPO.

    .. math:: -(1 - \\epsilon) \\log \\sigma(\\beta\\delta) - \\epsilon \\log \\sigma(-\\beta\\delta),
       \\qquad \\delta = s_c - s_r

    Non-negative, and ln 2 where the policy equals the reference.

    References:
      Rafailov et al., Direct Preference Optimization, 2023, eq. 7; Mitchell, A note on DPO with noisy preferences
      (cDPO), 2023.
    """

    paper: ClassVar[str] = "Rafailov et al. 2023, arXiv 2305.18290"
    beta: float = beta_option()
    label_smoothing: float = label_smoothing_option()

    def __call__(self, scores: PairScores) -> PerPair:
        return -numerics.smoothed_log_sigmoid(self.beta * self.delta(scores), self.label_smoothing)


@register("hinge")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hinge(DivergenceObjective):
    """SLiC: linear up to a margin of 1.

    .. math:: \\max(0, 1 - \\beta\\delta)

    References:
      Zhao et al., SLiC-HF, 2023, eq. 8, on DPO's margin as in Liu et al., RSO, 2023, eq. 9.
    """

    paper: ClassVar[str] = "Zhao et al. 2023, arXiv 2305.10425"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        return numerics.relu(1 - self.beta * self.delta(scores))


@register("ipo")
@dataclasses.dataclass(frozen=True, kw_only=True)
class IPO(DivergenceObjective):
    """IPO: squared distance of the length-averaged margin from 1/(2β).

    .. math:: (s_c / n_c - s_r / n_r - 1 / (2\\beta))^2

    beta is the regulariser tau of the paper; larger keeps the policy nearer the reference.

    References:
      Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023, eq. 17;
      the average over tokens is the authors' later correction.
    """

    paper: ClassVar[str] = "Azar et al. 2023, arXiv 2310.12036"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        return (self.mean_delta(scores) - 1 / (2 * self.beta)) ** 2


@register("sigmoid_norm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidNorm(DivergenceObjective):
    """Tülu 3's DPO on length-averaged scores.

    .. math:: -\\log \\sigma(\\beta (s_c / n_c - s_r / n_r))

    References:
      Lambert et al., Tulu 3, 2024, section 5.1.1 (length-normalised DPO).
    """

    paper: ClassVar[str] = "Lambert et al. 2024, arXiv 2411.15124"
    beta: float = beta_option()

    def __call__(self, scores: PairScores) -> PerPair:
        return -numerics.log_sigmoid(self.beta * self.mean_delta(scores))


@register("exo_pair")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EXO(DivergenceObjective):
    """EXO: reverse KL divergence from the smoothed labels; needs label smoothing above 0.

    .. math:: q_w (\\log q_w - \\log(1 - \\epsilon)) + q_l (\\log q_l - \\log \\epsilon),
       \\quad q_w = \\sigma(\\beta\\delta), \\; q_l = \\sigma(-\\beta\\delta)

    References:
      Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, 2024, eq. 16.
    """

    paper: ClassVar[str] = "Ji et al. 2024, arXiv 2402.00856"
    beta: float = beta_option()
    label_smoothing: float = label_smoothing_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing == 0:
            raise ValueError(
                "exo_pair with label_smoothing=0 is infinite everywhere; set it above 0, for example 1e-3."
            )

    def __call__(self, scores: PairScores) -> PerPair:
        margin = self.beta * self.delta(scores)
        log_win, log_lose = numerics.log_sigmoid(margin), numerics.log_sigmoid(-margin)
        win = numerics.exp(log_win) * (log_win - math.log1p(-self.label_smoothing))
        return win + numerics.exp(log_lose) * (log_lose - math.log(self.label_smoothing))


@register("robust")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Robust(DivergenceObjective):
    """Robust DPO: unbiased when a share ε of the labels is flipped.

    .. math:: \\frac{-(1 - \\epsilon) \\log \\sigma(\\beta\\delta)
       + \\epsilon \\log \\sigma(-\\beta\\delta)}{1 - 2\\epsilon}

    References:
      Chowdhury et al., Provably Robust DPO, 2024, eq. 12.
    """

    paper: ClassVar[str] = "Chowdhury et al. 2024, arXiv 2403.00409"
    beta: float = beta_option()
    label_smoothing: float = label_smoothing_option()

    def __call__(self, scores: PairScores) -> PerPair:
        margin, flipped = self.beta * self.delta(scores), self.label_smoothing
        estimate = -(1 - flipped) * numerics.log_sigmoid(margin) + flipped * numerics.log_sigmoid(-margin)
        return estimate / (1 - 2 * flipped)


@register("discopop")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscoPOP(DivergenceObjective):
    """DiscoPOP: logistic where the pair is still wrong, exponential where it is right.

    .. math:: (1 - m)(-\\log \\sigma(l)) + m e^{-l}, \\qquad l = \\beta\\delta, \\; m = \\sigma(l / \\tau)

    References:
      Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, 2024, eq. 7.
    """

    paper: ClassVar[str] = "Lu et al. 2024, arXiv 2406.08414"
    beta: float = beta_option()
    discopop_tau: float = option_field(
        0.05, changes="result", within=POSITIVE, help="Temperature of the discopop objective."
    )

    def __call__(self, scores: PairScores) -> PerPair:
        margin = self.beta * self.delta(scores)
        modulation = numerics.sigmoid(margin / self.discopop_tau)
        return -(1 - modulation) * numerics.log_sigmoid(margin) + modulation * numerics.exp(-margin)
