"""The loss of a configuration: named objectives with their options, added up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig
from easydel.trainers.direct_preference_optimization_trainer.objectives.f_divergence import F_DIVERGENCES
from easydel.trainers.direct_preference_optimization_trainer.objectives.losses import LOSSES, PairScores, PerPair, sft
from easydel.trainers.direct_preference_optimization_trainer.objectives.options import LOSS_OPTIONS


@dataclasses.dataclass(frozen=True)
class Objective:
    """Sum of weighted objectives, plus ``rpo_alpha`` times `sft`; see `DPOConfig` for the fields.

    A list of losses sums ``weight_i * mean(loss_i)``. `log_weight` in the call is the pair's log-weight of WPO (Zhou
    et al., WPO, 2024), None without weighting; it multiplies the preference losses and carries no gradient.
    """

    loss_types: tuple[str, ...]
    loss_weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    f_divergence_type: str
    f_alpha_divergence_coef: float
    discopop_tau: float
    rpo_alpha: float | None
    reads_reference: bool = True

    @classmethod
    def of(cls, config: DPOConfig) -> Objective:
        """The objective that a configuration asks for."""
        return cls(
            loss_types=config.loss_types,
            loss_weights=tuple(config.loss_weights or [1.0] * len(config.loss_types)),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            f_divergence_type=config.f_divergence_type,
            f_alpha_divergence_coef=config.f_alpha_divergence_coef,
            discopop_tau=config.discopop_tau,
            rpo_alpha=config.rpo_alpha,
            reads_reference=config.reads_reference,
        )

    def score(self, log_ratio: PerPair) -> PerPair:
        """A log-ratio through the f-divergence."""
        return F_DIVERGENCES[self.f_divergence_type](log_ratio, self.f_alpha_divergence_coef)

    def __call__(self, scores: PairScores, log_weight: PerPair | None = None) -> PerPair:
        """One loss a pair; the update's loss is their mean."""
        loss = jnp.zeros_like(scores.chosen)
        for name, weight in zip(self.loss_types, self.loss_weights):
            loss += weight * LOSSES[name](scores, **self._options(name))
        if log_weight is not None:
            loss *= jax.lax.stop_gradient(jnp.exp(log_weight))
        return loss if self.rpo_alpha is None else loss + self.rpo_alpha * sft(scores)

    def _options(self, name: str) -> dict[str, float]:
        if name == "sft":
            return {}
        own = {"label_smoothing": self.label_smoothing, "discopop_tau": self.discopop_tau}
        return {"beta": self.beta} | {option: own[option] for option in LOSS_OPTIONS[name] & own.keys()}
