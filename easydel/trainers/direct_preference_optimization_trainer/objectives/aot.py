"""Alignment by optimal transport: losses of sorted values, over all pairs of an update."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import smoothed_log_sigmoid
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    Objective,
    beta_option,
    label_smoothing_option,
    register,
)

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SortingObjective(Objective):
    """An objective that compares two samples in sorted order, so it needs all pairs of an update at once."""

    needs_whole_update: ClassVar[bool] = True
    paper: ClassVar[str] = "Melnyk et al. 2024, arXiv 2406.05882"
    beta: float = beta_option()
    label_smoothing: float = label_smoothing_option()

    def over_quantiles(self, better: PerPair, worse: PerPair, scores: PairScores) -> PerPair:
        """Compute the smoothed sigmoid loss between the sorted values of two samples.

        Args:
          better, worse: one value per slot, in nats.
          scores: says which slots hold a pair; empty slots sort after all pairs and count nothing.

        Returns:
          The mean over quantiles, in every slot.
        """
        import jax.numpy as jnp

        def in_order(values: PerPair) -> PerPair:
            return jnp.sort(jnp.where(scores.is_pair, values, jnp.inf).reshape(-1))

        count = jnp.sum(scores.is_pair)
        is_quantile = jnp.arange(scores.is_pair.size) < count
        better, worse = (jnp.where(is_quantile, in_order(values), 0.0) for values in (better, worse))
        losses = -smoothed_log_sigmoid(self.beta * better - self.beta * worse, self.label_smoothing)
        # Every pair carries the mean, so that the mean over pairs is the mean over quantiles.
        mean = jnp.sum(jnp.where(is_quantile, losses, 0.0)) / count
        return jnp.broadcast_to(mean, scores.is_pair.shape)


@register("aot")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AOT(_SortingObjective):
    """AOT, paired: the policy's margins dominate the reference's, quantile by quantile.

    .. math:: \\Delta = \\mathrm{sort}(\\log\\pi_c - \\log\\pi_r)
       - \\mathrm{sort}(\\log\\pi^{ref}_c - \\log\\pi^{ref}_r)

    and the smoothed sigmoid loss of :math:`\\beta\\Delta`; sorted over all pairs of the update.

    References:
      Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, 2024, paired.
    """

    def __call__(self, scores: PairScores) -> PerPair:
        return self.over_quantiles(scores.policy_delta, scores.reference_delta, scores)


@register("aot_unpaired", "aot_pair")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AOTUnpaired(_SortingObjective):
    """AOT, unpaired: chosen log-ratios dominate rejected ones, quantile by quantile.

    .. math:: \\Delta = \\mathrm{sort}(r_c) - \\mathrm{sort}(r_r)

    and the smoothed sigmoid loss of :math:`\\beta\\Delta`; sorted over all pairs of the update.

    References:
      Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, 2024, unpaired.
    """

    def __call__(self, scores: PairScores) -> PerPair:
        return self.over_quantiles(scores.chosen_log_ratio, scores.rejected_log_ratio, scores)
