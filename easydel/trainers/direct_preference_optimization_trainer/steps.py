"""One update and one evaluation of preference optimisation, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.layers.lora import join, split_trainable, with_dropout
from easydel.trainers.direct_preference_optimization_trainer.objectives.combined import CombinedObjective
from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores
from easydel.trainers.direct_preference_optimization_trainer.scoring import (
    CountMicroBatches,
    DeviceBatch,
    PairLogps,
    ScoringOptions,
    completion_lengths,
    micro_batches_in_use,
    score_in_micro_batches,
    score_pairs,
    split_micro_batches,
)

Metrics = dict[str, Array]


def training_step(
    state: EasyDeLState,
    batch: DeviceBatch,
    *,
    objective: CombinedObjective,
    scoring: ScoringOptions,
    count_micro_batches: CountMicroBatches,
    remat: bool,
    dropout_seed: int = 0,
) -> tuple[EasyDeLState, Metrics]:
    """One optimiser update on one batch that carries reference log-probs.

    The loss is the mean over the batch's pairs whatever the number of micro-batches. A non-finite loss or gradient
    leaves the state as it was and sets ``nonfinite``. Dropout of adapters is drawn from the seed, the state's step and
    the micro-batch, so a run can be repeated from any of its states.
    """
    totals = update_totals(batch)
    trainable, frozen = split_trainable(state.model)
    dropout_key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)

    def loss(trainable: EasyDeLBaseModule, micro: DeviceBatch, number: int | Array) -> tuple[Array, Metrics]:
        model = with_dropout(join(trainable, frozen), jax.random.fold_in(dropout_key, number))
        policy = score_pairs(model, micro, scoring, remat=remat)
        metrics = preference_metrics(policy, micro, objective, totals, state.model.dtype)
        return metrics["loss"], metrics

    micro_batches = split_micro_batches(batch, count_micro_batches(*batch["input_ids"].shape))
    # All micro-batches add to one gradient in place: a second one would be as large as the parameters.
    gradient_refs = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), trainable)

    def loss_of(number: int | Array) -> Callable[[EasyDeLBaseModule], tuple[Array, Metrics]]:
        micro = jax.tree.map(lambda rows: rows[number], micro_batches)
        return lambda trainable: loss(trainable, micro, number)

    def add(number: Array, total: Metrics) -> Metrics:
        pull_back: Any  # annotated by JAX as a mere callable
        value, pull_back, metrics = jax.vjp(loss_of(number), trainable, has_aux=True)
        pull_back.with_refs(gradient_refs)(jnp.ones_like(value))
        return jax.tree.map(jnp.add, total, metrics)

    _, shapes = jax.eval_shape(loss_of(0), trainable)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    metrics = jax.lax.fori_loop(0, micro_batches_in_use(micro_batches), add, nothing)
    gradient = jax.tree.map(jax.ref.freeze, gradient_refs)

    grad_norm = optax.global_norm(gradient)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
    # The step counter moves on either way: it counts batches.
    state = state.apply_gradients(gradient, grad_norm=grad_norm, is_finite=is_finite)
    return state, metrics | {"grad_norm": grad_norm, "nonfinite": ~is_finite}


def evaluation_step(
    state: EasyDeLState,
    batch: DeviceBatch,
    *,
    objective: CombinedObjective,
    scoring: ScoringOptions,
    count_micro_batches: CountMicroBatches,
) -> Metrics:
    """The metrics of one batch that carries reference log-probs, without gradients."""
    policy = score_in_micro_batches(state.model, batch, scoring, count_micro_batches)
    return preference_metrics(policy, batch, objective, update_totals(batch), state.model.dtype)


class UpdateTotals(NamedTuple):
    """Counts over the whole update, so that what a mean is over does not depend on its micro-batches."""

    pairs: Array
    mean_chosen_length: Array


def update_totals(batch: DeviceBatch) -> UpdateTotals:
    """Pairs of an update and their mean number of scored chosen tokens."""
    pairs, slots = jnp.sum(batch["pair_mask"]), batch["target_slots"]
    return UpdateTotals(pairs, jnp.sum((slots >= 0) & (slots % 2 == 0)) / pairs)


# How far the same model's margin of the same pair may lie from layout to layout, in units of rounding: sums err
# together, activations token by token, so that those grow with the root of the tokens only. Measured are 2.5 and 3.0.
ROUNDING_OF_SUMS, ROUNDING_OF_ACTIVATIONS = 8.0, 6.0


def margin_rounding(
    logps: Float[Array, "rows slots"], tokens: Float[Array, "rows slots"], dtype: np.dtype
) -> Float[Array, "rows slots"]:
    """Nats up to which a margin is rounding alone.

    .. math:: (8 \\epsilon_{32} + 6 \\epsilon / \\sqrt n)(S + n)

    Args:
      logps: S, the sizes of the pair's four log-probs together, in nats.
      tokens: n, scored tokens of both completions; one more nat a token, since a likely token's log-prob is the small
        difference of two large numbers.
      dtype: that the models compute in, with the precision epsilon; sums are in float32.
    """
    sums, activations = (float(jnp.finfo(kind).eps) for kind in (jnp.float32, dtype))
    units = ROUNDING_OF_SUMS * sums + ROUNDING_OF_ACTIVATIONS * activations / jnp.sqrt(tokens)
    return units * (logps + tokens)


def preference_metrics(
    policy: PairLogps, batch: DeviceBatch, objective: CombinedObjective, totals: UpdateTotals, dtype: np.dtype
) -> Metrics:
    """This batch's share of the means over the update's pairs; shares of micro-batches add up to the mean.

    Rewards are ``beta`` times the log-ratio, in nats; a tie counts one half as accurate; only the loss is weighted.
    Where the objective reads no reference there are no rewards. `dtype` is what the models compute in.
    """
    chosen_length, rejected_length = (jnp.maximum(length, 1) for length in completion_lengths(batch))
    # An objective that needs no reference sees log-ratios of 0 and looks at none of them.
    reference = (policy.chosen, policy.rejected)
    if objective.needs_reference:
        reference = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
    scores = PairScores(
        chosen_logps=policy.chosen,
        rejected_logps=policy.rejected,
        reference_chosen_logps=reference[0],
        reference_rejected_logps=reference[1],
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        is_pair=batch["pair_mask"],
        mean_chosen_length=totals.mean_chosen_length,
        margin=batch.get("pair_margin"),
        log_weight=policy.log_weight,
    )
    losses = objective(scores) * batch["pair_weight"]

    def mean(values: Float[Array, "rows slots"]) -> Array:
        return jnp.sum(jnp.where(batch["pair_mask"], values, 0.0)) / totals.pairs

    metrics = {"logps/chosen": mean(policy.chosen), "logps/rejected": mean(policy.rejected)}
    if objective.needs_reference:
        beta = objective.beta
        chosen_log_ratio, rejected_log_ratio = scores.chosen_log_ratio, scores.rejected_log_ratio
        margins = chosen_log_ratio - rejected_log_ratio
        size = jnp.sum(jnp.abs(jnp.stack([policy.chosen, policy.rejected, *reference])), axis=0)
        rounding = margin_rounding(size, chosen_length + rejected_length, dtype)
        # Compared this way round, a margin that is not a number stays one.
        beyond_rounding = jnp.where(jnp.abs(margins) <= rounding, 0.0, margins)
        metrics |= {
            "rewards/chosen": mean(beta * chosen_log_ratio),
            "rewards/rejected": mean(beta * rejected_log_ratio),
            "rewards/margins": mean(beta * margins),
            "rewards/margin_size": mean(beta * jnp.abs(beyond_rounding)),
            "rewards/accuracies": mean((jnp.sign(beyond_rounding) + 1) / 2),
        }
    return {"loss": mean(losses)} | jax.lax.stop_gradient(metrics)
