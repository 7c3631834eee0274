"""Compute the loss and the metrics of pairs from their log-probs under policy and reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.trainers.direct_preference_optimization_trainer.objectives.combined import CombinedObjective
from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores
from easydel.trainers.direct_preference_optimization_trainer.scoring import (
    SCORED_KEYS,
    PairLogps,
    ScoringOptions,
    completion_lengths,
    score_pairs,
)
from easydel.trainers.trainer_protocol import DeviceBatch, Metrics, SelfCheckError


class UpdateTotals(NamedTuple):
    """Counts over the whole update: its pairs, and their mean number of scored chosen tokens."""

    pairs: Int[Array, ""]
    mean_chosen_length: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """The `easydel.trainers.trainer_protocol.TaskLoss` of an objective over pairs.

    Attributes:
      objective: what is minimised.
      scoring: how completions are scored.
      dtype: the dtype that policy and reference compute in.
      scored_keys: keys of the batch that `score` reads.
    """

    objective: CombinedObjective
    scoring: ScoringOptions
    dtype: np.dtype

    scored_keys: ClassVar[tuple[str, ...]] = SCORED_KEYS

    def score(self, model: EasyDeLBaseModule, batch: DeviceBatch, *, remat: bool = False) -> PairLogps:
        """Sum the log-probabilities of every pair's completions under the policy, in nats per slot."""
        return score_pairs(model, batch, self.scoring, remat=remat)

    def totals(self, batch: DeviceBatch) -> UpdateTotals:
        """Count the pairs of an update and the mean number of their scored chosen tokens."""
        pairs, slots = jnp.sum(batch["pair_mask"]), batch["target_slots"]
        return UpdateTotals(pairs, jnp.sum((slots >= 0) & (slots % 2 == 0)) / pairs)

    def __call__(self, scores: PairLogps, batch: DeviceBatch, totals: UpdateTotals) -> Metrics:
        """Compute the batch's share of the means over the update's pairs.

        Rewards are ``beta`` times the log-ratio, in nats; a tie counts one half as accurate; only the loss is
        weighted. If the objective needs no reference, there are no rewards.

        Args:
          scores: the policy's log-probs.
          batch: with ``ref_chosen_logps`` and ``ref_rejected_logps``, in nats, if the objective needs a reference.
          totals: counts of the update.
        """
        objective = self.objective
        chosen_length, rejected_length = (jnp.maximum(length, 1) for length in completion_lengths(batch))
        # Without a reference, log-ratios are 0, and the objective reads none of them.
        reference = (scores.chosen, scores.rejected)
        if objective.needs_reference:
            reference = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
        pairs = PairScores(
            chosen_logps=scores.chosen,
            rejected_logps=scores.rejected,
            reference_chosen_logps=reference[0],
            reference_rejected_logps=reference[1],
            chosen_length=chosen_length,
            rejected_length=rejected_length,
            is_pair=batch["pair_mask"],
            mean_chosen_length=totals.mean_chosen_length,
            margin=batch.get("pair_margin"),
            log_weight=scores.log_weight,
        )
        losses = objective(pairs) * batch["pair_weight"]

        def mean(values: Float[Array, "rows slots"]) -> Array:
            return jnp.sum(jnp.where(batch["pair_mask"], values, 0.0)) / totals.pairs

        metrics = {"logps/chosen": mean(scores.chosen), "logps/rejected": mean(scores.rejected)}
        if objective.needs_reference:
            beta = objective.beta
            chosen_log_ratio, rejected_log_ratio = pairs.chosen_log_ratio, pairs.rejected_log_ratio
            margins = chosen_log_ratio - rejected_log_ratio
            size = jnp.sum(jnp.abs(jnp.stack([scores.chosen, scores.rejected, *reference])), axis=0)
            rounding = margin_rounding(size, chosen_length + rejected_length, self.dtype)
            # <=, not >: a NaN margin then stays NaN.
            beyond_rounding = jnp.where(jnp.abs(margins) <= rounding, 0.0, margins)
            metrics |= {
                "rewards/chosen": mean(beta * chosen_log_ratio),
                "rewards/rejected": mean(beta * rejected_log_ratio),
                "rewards/margins": mean(beta * margins),
                "rewards/margin_size": mean(beta * jnp.abs(beyond_rounding)),
                "rewards/accuracies": mean((jnp.sign(beyond_rounding) + 1) / 2),
            }
        return {"loss": mean(losses)} | jax.lax.stop_gradient(metrics)


# How far one model's margin of one pair may differ between layouts, in units of rounding. Errors of float32 sums are
# correlated; those of activations are independent per token, so they grow with the root of the tokens only. Measured:
# 2.5 and 3.0.
ROUNDING_OF_SUMS, ROUNDING_OF_ACTIVATIONS = 8.0, 6.0


def margin_rounding(
    logps: Float[Array, "rows slots"], tokens: Float[Array, "rows slots"], dtype: np.dtype
) -> Float[Array, "rows slots"]:
    """Return the size, in nats, up to which a margin may be rounding alone.

    .. math:: (8 \\epsilon_{32} + 6 \\epsilon / \\sqrt n)(S + n)

    Args:
      logps: S, the sum of the absolute values of the pair's four log-probs, in nats.
      tokens: n, scored tokens of both completions; each adds one nat to S, since a likely token's log-prob is the
        small difference of two large numbers.
      dtype: the dtype that the models compute in, whose precision is epsilon; sums are in float32.
    """
    sums, activations = (float(jnp.finfo(kind).eps) for kind in (jnp.float32, dtype))
    units = ROUNDING_OF_SUMS * sums + ROUNDING_OF_ACTIVATIONS * activations / jnp.sqrt(tokens)
    return units * (logps + tokens)


# Nats, and a share of the log-probs' size. Policy and reference run the same arithmetic on the same batch, but in two
# compiled programs: the compiler may fuse, and in bfloat16 round, differently.
FIRST_STEP_TOLERANCE = 1e-3
FIRST_STEP_RELATIVE_TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-3}


def check_margin_at_start(metrics: Mapping[str, Any], *, beta: float, dtype: np.dtype, advice: str) -> None:
    """Check that every pair's margin is 0 at the first update, where policy and reference are still the same model.

    Args:
      metrics: of the first update.
      beta: factor of the log-ratios in its rewards.
      dtype: the dtype that both models compute in.
      advice: what the error adds, such as which cache file to remove.

    Raises:
      SelfCheckError: the two are scored differently, or the reference's log-probs are another model's.
    """
    # The mean absolute margin: signed margins cancel out, which would hide log-probs that belong to other pairs.
    margin = float(metrics["rewards/margin_size"]) / beta
    size = abs(float(metrics["logps/chosen"])) + abs(float(metrics["logps/rejected"]))
    tolerance = FIRST_STEP_TOLERANCE + FIRST_STEP_RELATIVE_TOLERANCE[str(dtype)] * size
    if not margin <= tolerance:
        raise SelfCheckError(
            "self-check failed: policy and reference are the same model before the first update, but their "
            f"log-ratio margins are {margin:.3g} nats on average, not 0 within {tolerance:.1g} "
            f"(loss {float(metrics['loss']):.6f}).{advice}"
        )
