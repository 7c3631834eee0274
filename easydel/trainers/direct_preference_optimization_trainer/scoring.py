"""Sum the log-probabilities of completions: one function scores policy and reference alike.

`score_trees` gives one sum per branch, for trees of any number of branches; `score_pairs` is the case of two, with what
the objectives of DPO read besides.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.mesh import constrain
from easydel.ops.attention.inputs import TokenIds
from easydel.ops.mesh_axes import DATA_AXES
from easydel.trainers.step import map_micro_batches
from easydel.trainers.trainer_protocol import CountMicroBatches, DeviceBatch

# What scoring reads of a batch; the objective and the log read the rest.
SCORED_KEYS = (
    "input_ids",
    "position_ids",
    "segment_ids",
    "branch_ids",
    "target_positions",
    "target_ids",
    "target_slots",
    "pair_mask",
)


class PairLogps(NamedTuple):
    """Summed log-probabilities in nats of every slot's completions, float32, 0 where a slot is empty.

    Attributes:
      chosen, rejected: sums over each completion, tokens beyond the shorter one weighted by ``ld_alpha``.
      split_logps: for chosen and rejected, the sum over as many tokens as the shorter completion has and the sum over
        those beyond it; `whole_completions` makes the two others of it for any ``ld_alpha``.
      log_weight: log-weight of each pair (`ScoringOptions.with_weight`), without gradient; None if not asked for.
    """

    chosen: Float[Array, "rows slots"]
    rejected: Float[Array, "rows slots"]
    split_logps: Float[Array, "rows slots 2 2"]
    log_weight: Float[Array, "rows slots"] | None = None


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """Options of scoring the completions of pairs.

    Attributes:
      ld_alpha: weight of the tokens beyond the shorter completion's length (LD-DPO, Liu et al. 2024); None is 1.
      with_weight: also give each pair's log-weight of WPO: the mean over its chosen tokens of
        ``log p - log sum_v p_v^2``, plus the same over its rejected tokens (Zhou et al. 2024).
    """

    ld_alpha: float | None = None
    with_weight: bool = False


def score_trees(
    model: EasyDeLBaseModule, batch: DeviceBatch, *, remat: bool = False
) -> Float[Array, "rows slots branches"]:
    """Sum the log-probabilities of every branch's scored tokens, given its prompt, under `model`.

    .. math:: \\sum_i m_i \\log p(y_i \\mid x, y_{<i})

    Args:
      model: policy or reference.
      batch: arrays of trees of any number of branches (`easydel.data.batching.packing.pack_trees`).
      remat: rebuild each layer in the backward pass instead of keeping its activations.

    Returns:
      Nats, float32; 0 where there is no branch (``branch_mask``).

    Example:
      >>> from easydel.data.batching.packing import PackingLayout, pack_trees
      >>> score_trees(model, pack_trees([pairs[0].tree], PackingLayout(0, packing=False))).shape
      (1, 1, 2)
    """
    slots, branches = batch["branch_mask"].shape[1:]
    logps, _ = _score_targets(model, batch, remat=remat)
    return _sum_by_branch(logps[..., None], batch["target_slots"], slots, branches)[..., 0]


def score_pairs(
    model: EasyDeLBaseModule, batch: DeviceBatch, options: ScoringOptions, *, remat: bool = False
) -> PairLogps:
    """Sum the log-probabilities of every pair's two completions under `model`.

    Args:
      model: policy or reference.
      batch: arrays of pairs (`easydel.data.batching.packing.pack`).
      options: discounts and weights.
      remat: rebuild each layer in the backward pass instead of keeping its activations.

    Returns:
      Nats, float32, per slot.

    References:
      Liu et al., Length Desensitization in Direct Preference Optimization, 2024 (``ld_alpha``).
      Zhou et al., WPO: Enhancing RLHF with Weighted Preference Optimization, 2024 (``with_weight``).

    Example:
      >>> from easydel.data.batching.packing import PackingLayout, pack
      >>> scored = score_pairs(model, pack(pairs[:1], PackingLayout(0, packing=False)), ScoringOptions())
      >>> scored.chosen.shape, bool(scored.chosen[0, 0] < 0)
      ((1, 1), True)
    """
    slots, targets = batch["pair_mask"].shape[1], batch["target_slots"]
    logps, excess = _score_targets(model, batch, with_excess=options.with_weight, remat=remat)
    lengths = branch_lengths(targets, slots, 2)
    log_weight = None
    if excess is not None:
        sums = _sum_by_branch(excess[..., None], targets, slots, 2)[..., 0]
        log_weight = jax.lax.stop_gradient(jnp.sum(sums / jnp.maximum(lengths, 1), axis=-1))
    shorter = jnp.take_along_axis(jnp.min(lengths, axis=-1), jnp.maximum(targets, 0) // 2, axis=1)
    is_beyond = _number_in_branch(targets, lengths) >= shorter
    split = jnp.stack([jnp.where(is_beyond, 0.0, logps), jnp.where(is_beyond, logps, 0.0)], axis=-1)
    split_logps = _sum_by_branch(split, targets, slots, 2)
    chosen, rejected = whole_completions(split_logps, options.ld_alpha)
    return PairLogps(chosen, rejected, split_logps, log_weight)


def whole_completions(
    split_logps: Float[Array, "rows slots 2 2"], ld_alpha: float | None
) -> tuple[Float[Array, "rows slots"], Float[Array, "rows slots"]]:
    """Sum each completion over both halves of its split log-probs.

    .. math:: \\sum_{i \\le n} \\log p_i + \\alpha \\sum_{i > n} \\log p_i

    with n the scored tokens of the shorter completion.

    Args:
      split_logps: `PairLogps.split_logps`, in nats.
      ld_alpha: weight α of the tokens beyond the shorter completion's length; None is 1.

    Returns:
      ``(chosen, rejected)``, in nats.
    """
    sums = split_logps[..., 0] + (1.0 if ld_alpha is None else ld_alpha) * split_logps[..., 1]
    return sums[..., 0], sums[..., 1]


def completion_lengths(batch: DeviceBatch) -> tuple[Int[Array, "rows slots"], Int[Array, "rows slots"]]:
    """Count the scored tokens of each slot's chosen and rejected completion; 0 where a slot is empty."""
    lengths = branch_lengths(batch["target_slots"], batch["pair_mask"].shape[1], 2)
    return lengths[..., 0], lengths[..., 1]


def branch_lengths(
    target_slots: Int[Array, "rows targets"], slots: int, branches: int
) -> Int[Array, "rows slots branches"]:
    """Count the scored tokens of every branch, 0 where there is none.

    Args:
      target_slots: ``slot * branches + branch`` of each target, -1 for padding.
      slots: slots per row.
      branches: branches per slot.
    """

    def count(of_row: Int[Array, " targets"]) -> Int[Array, " branches"]:
        # Padding (-1) counts for a branch out of range, which mode="drop" ignores.
        out_of_range = slots * branches
        return jnp.zeros(out_of_range, jnp.int32).at[jnp.where(of_row < 0, out_of_range, of_row)].add(1, mode="drop")

    return jax.vmap(count)(target_slots).reshape(-1, slots, branches)


def _score_targets(
    model: EasyDeLBaseModule, batch: DeviceBatch, *, remat: bool, with_excess: bool = False
) -> tuple[Float[Array, "rows targets"], Float[Array, "rows targets"] | None]:
    """The log-prob of every target and, if asked for, its excess over ``log sum_v p_v^2``."""
    ids = TokenIds(batch["segment_ids"], batch["branch_ids"], batch["position_ids"])
    hidden = model.hidden_states(batch["input_ids"], ids, remat=remat).hidden
    predicting = constrain(jnp.take_along_axis(hidden, batch["target_positions"][..., None], axis=1), DATA_AXES)
    # Targets fill each row from the left, so the fullest row says how many columns need the vocabulary.
    count = jnp.max(jnp.sum(batch["target_slots"] >= 0, axis=1))
    logps = model.log_probs(predicting, batch["target_ids"], count)
    if not with_excess:
        return logps, None
    return logps, logps - model.log_collision(predicting, count)


def _number_in_branch(
    target_slots: Int[Array, "rows targets"], lengths: Int[Array, "rows slots branches"]
) -> Int[Array, "rows targets"]:
    """The number of targets of the same branch before each target; targets are sorted by slot, then by branch."""
    of_branch = lengths.reshape(lengths.shape[0], -1)
    starts = jnp.cumsum(of_branch, axis=1) - of_branch
    return jnp.arange(target_slots.shape[1]) - jnp.take_along_axis(starts, jnp.maximum(target_slots, 0), axis=1)


def _sum_by_branch(
    values: Float[Array, "rows targets kinds"], target_slots: Int[Array, "rows targets"], slots: int, branches: int
) -> Float[Array, "rows slots branches kinds"]:
    """Sum values of targets over each branch."""
    # A product with a 0/1 matrix: deterministic, and its derivative is a gather.
    belongs = target_slots[..., None] == jnp.arange(slots * branches)
    sums = jnp.einsum("rtk,rts->rsk", values, belongs.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(-1, slots, branches, values.shape[-1])


def score_in_micro_batches(
    model: EasyDeLBaseModule, batch: DeviceBatch, options: ScoringOptions, count_micro_batches: CountMicroBatches
) -> PairLogps:
    """Apply `score_pairs` without gradients, in the micro-batches of a training step.

    Args:
      model: policy or reference.
      batch: arrays of pairs (`easydel.data.batching.packing.pack`).
      options: discounts and weights.
      count_micro_batches: the number of micro-batches, from the shape ``(rows, length)`` of ``input_ids``.
    """
    return map_micro_batches(
        lambda rows: score_pairs(model, rows, options),
        {key: batch[key] for key in SCORED_KEYS},
        count_micro_batches(*batch["input_ids"].shape),
    )
