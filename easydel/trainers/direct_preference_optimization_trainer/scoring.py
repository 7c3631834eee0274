"""Log-probabilities of completions: the one function by which policy and reference are both scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.mesh import constrain
from easydel.ops.linear_log_probs import linear_log_collision, linear_log_probs
from easydel.ops.mesh_axes import DATA_AXES

DeviceBatch = dict[str, Array]
# (rows, length) of a batch to the number of micro-batches in which it goes through the model.
CountMicroBatches = Callable[[int, int], int]

# What the model reads of a batch; the rest is for the objective and for people.
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

    ``parts`` holds, for chosen and rejected, the sum over as many tokens as the shorter completion has and the sum
    over those beyond: what the two others are made of, whatever ``ld_alpha`` is (`whole_completions`).
    """

    chosen: Float[Array, "rows slots"]
    rejected: Float[Array, "rows slots"]
    parts: Float[Array, "rows slots 2 2"]
    log_weight: Float[Array, "rows slots"] | None = None


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """What changes how completions are scored.

    Attributes:
      ld_alpha: weight of the tokens beyond the shorter completion's length (LD-DPO, Liu et al. 2024); None is 1.
      with_weight: also give each pair's log-weight of WPO: the mean over its chosen tokens of
        ``log p - log sum_v p_v^2``, plus the same over its rejected tokens (Zhou et al. 2024).
    """

    ld_alpha: float | None = None
    with_weight: bool = False


def completion_lengths(batch: DeviceBatch) -> tuple[Int[Array, "rows slots"], Int[Array, "rows slots"]]:
    """Scored tokens of each slot's chosen and rejected completion."""
    sides = 2 * batch["pair_mask"].shape[1]

    def count(slots: Int[Array, " targets"]) -> Int[Array, " sides"]:
        # What is no target counts for a side that is not there.
        return jnp.zeros(sides, jnp.int32).at[jnp.where(slots < 0, sides, slots)].add(1, mode="drop")

    counts = jax.vmap(count)(batch["target_slots"])
    return counts[:, 0::2], counts[:, 1::2]


def whole_completions(
    parts: Float[Array, "rows slots 2 2"], ld_alpha: float | None
) -> tuple[Float[Array, "rows slots"], Float[Array, "rows slots"]]:
    """``(chosen, rejected)``, each the part that both completions reach plus ``ld_alpha`` times what lies beyond."""
    sums = parts[..., 0] + (1.0 if ld_alpha is None else ld_alpha) * parts[..., 1]
    return sums[..., 0], sums[..., 1]


def score_pairs(
    model: EasyDeLBaseModule, batch: DeviceBatch, options: ScoringOptions, *, remat: bool = False
) -> PairLogps:
    """Score every completion of a batch under `model`.

    Args:
      model: policy or reference.
      batch: arrays of trees (`easydel.data.batching.packing.pack`).
      options: discounts and weights.
      remat: rebuild each layer in the backward pass instead of keeping its activations.
    """
    hidden = model.hidden_states(
        batch["input_ids"], batch["position_ids"], batch["segment_ids"], batch["branch_ids"], remat=remat
    )
    predicting = constrain(jnp.take_along_axis(hidden, batch["target_positions"][..., None], axis=1), DATA_AXES)
    # Targets fill each row from the left, so the fullest row says how many columns need the vocabulary.
    count = jnp.max(jnp.sum(batch["target_slots"] >= 0, axis=1))
    logps = linear_log_probs(predicting, model.output_embedding, batch["target_ids"], count)
    log_weight = None
    if options.with_weight:
        collision = linear_log_collision(predicting, model.output_embedding, count)
        lengths = jnp.stack(completion_lengths(batch), axis=-1)
        excess = _sum_by_side((logps - collision)[..., None], batch)[..., 0]
        log_weight = jax.lax.stop_gradient(jnp.sum(excess / jnp.maximum(lengths, 1), axis=-1))
    beyond = _beyond_the_shorter(batch)
    parts = _sum_by_side(jnp.stack([jnp.where(beyond, 0.0, logps), jnp.where(beyond, logps, 0.0)], axis=-1), batch)
    chosen, rejected = whole_completions(parts, options.ld_alpha)
    return PairLogps(chosen, rejected, parts, log_weight)


def _beyond_the_shorter(batch: DeviceBatch) -> Bool[Array, "rows targets"]:
    """Whether a target stands behind the place where the shorter completion of its pair has ended."""
    lengths = jnp.stack(completion_lengths(batch), axis=-1)
    # Targets stand in the order of slots, chosen before rejected.
    ends = jnp.cumsum(lengths.reshape(lengths.shape[0], -1), axis=1)
    side = jnp.maximum(batch["target_slots"], 0)
    starts = ends - lengths.reshape(ends.shape)
    place = jnp.arange(side.shape[1]) - jnp.take_along_axis(starts, side, axis=1)
    return place >= jnp.take_along_axis(jnp.min(lengths, axis=-1), side // 2, axis=1)


def _sum_by_side(values: Float[Array, "rows targets kinds"], batch: DeviceBatch) -> Float[Array, "rows slots 2 kinds"]:
    slots = batch["pair_mask"].shape[1]
    # A product with a 0/1 matrix: deterministic, and its derivative is a gather.
    belongs = batch["target_slots"][..., None] == jnp.arange(2 * slots)
    sums = jnp.einsum("rtk,rts->rsk", values, belongs.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(-1, slots, 2, values.shape[-1])


def split_micro_batches(batch: DeviceBatch, count: int) -> DeviceBatch:
    """``[rows, ...] -> [count, rows / count, ...]``; each takes every count-th row, so no row changes its device."""
    return {
        key: constrain(value.reshape(-1, count, *value.shape[1:]).swapaxes(0, 1), None, DATA_AXES)
        for key, value in batch.items()
    }


def micro_batches_in_use(micro_batches: DeviceBatch) -> Int[Array, ""]:
    """How many of the micro-batches hold a pair: the first ones do, and the rest need not be looked at."""
    holds_pair = jnp.any(micro_batches["pair_mask"], axis=(1, 2))
    return jnp.max(jnp.where(holds_pair, jnp.arange(1, holds_pair.size + 1), 0))


def join_micro_batches(value: Float[Array, "count rows slots *rest"]) -> Float[Array, "all_rows slots *rest"]:
    """Undo `split_micro_batches`."""
    return value.swapaxes(0, 1).reshape(-1, *value.shape[2:])


def score_in_micro_batches(
    model: EasyDeLBaseModule, batch: DeviceBatch, options: ScoringOptions, count_micro_batches: CountMicroBatches
) -> PairLogps:
    """`score_pairs` without gradients, as many rows at a time as a training step holds."""
    batch = {key: batch[key] for key in SCORED_KEYS}
    count = count_micro_batches(*batch["input_ids"].shape)
    if count == 1:
        return score_pairs(model, batch, options)
    micro_batches = split_micro_batches(batch, count)

    def score(number: int | Array) -> PairLogps:
        return score_pairs(model, jax.tree.map(lambda rows: rows[number], micro_batches), options)

    def put(number: Array, scored: PairLogps) -> PairLogps:
        return jax.tree.map(lambda whole, part: whole.at[number].set(part), scored, score(number))

    nothing = jax.tree.map(lambda part: jnp.zeros((count, *part.shape), part.dtype), jax.eval_shape(score, 0))
    return jax.tree.map(join_micro_batches, jax.lax.fori_loop(0, micro_batches_in_use(micro_batches), put, nothing))
