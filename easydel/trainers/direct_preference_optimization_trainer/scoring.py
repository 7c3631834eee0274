"""Log-probabilities of completions: the one function by which policy and reference are both scored."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.mesh import DATA_AXES, constrain
from easydel.ops.linear_log_probs import linear_log_probs

DeviceBatch = dict[str, Array]

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
    """Summed log-probabilities in nats of every slot's completions, float32, 0 where a slot is empty."""

    chosen: Float[Array, "rows slots"]
    rejected: Float[Array, "rows slots"]


def completion_lengths(batch: DeviceBatch) -> tuple[Int[Array, "rows slots"], Int[Array, "rows slots"]]:
    """Scored tokens of each slot's chosen and rejected completion."""
    counts = _sum_by_side(jnp.ones_like(batch["target_slots"], dtype=jnp.float32), batch).astype(jnp.int32)
    return counts[..., 0], counts[..., 1]


def score_pairs(model: EasyDeLBaseModule, batch: DeviceBatch, *, remat: bool = False) -> PairLogps:
    """Score every completion of a batch under `model`.

    Args:
      model: policy or reference.
      batch: arrays of SPEC-shaped trees (`easydel.data.packing.pack`).
      remat: rebuild each layer in the backward pass instead of keeping its activations.
    """
    hidden = model.hidden_states(
        batch["input_ids"], batch["position_ids"], batch["segment_ids"], batch["branch_ids"], remat=remat
    )
    predicting = constrain(jnp.take_along_axis(hidden, batch["target_positions"][..., None], axis=1), DATA_AXES)
    # Targets fill each row from the left, so the fullest row says how many columns need the vocabulary.
    count = jnp.max(jnp.sum(batch["target_slots"] >= 0, axis=1))
    sums = _sum_by_side(linear_log_probs(predicting, model.output_embedding, batch["target_ids"], count), batch)
    return PairLogps(chosen=sums[..., 0], rejected=sums[..., 1])


def _sum_by_side(values: Float[Array, "rows targets"], batch: DeviceBatch) -> Float[Array, "rows slots 2"]:
    slots = batch["pair_mask"].shape[1]
    # A product with a 0/1 matrix: deterministic, and its derivative is a gather.
    belongs = batch["target_slots"][..., None] == jnp.arange(2 * slots)
    sums = jnp.einsum("rt,rts->rs", values, belongs.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(-1, slots, 2)


def split_micro_batches(batch: DeviceBatch, count: int) -> DeviceBatch:
    """``[rows, ...] -> [count, rows / count, ...]``; each takes every count-th row, so no row changes its device."""
    return {
        key: constrain(value.reshape(-1, count, *value.shape[1:]).swapaxes(0, 1), None, DATA_AXES)
        for key, value in batch.items()
    }


def join_micro_batches(value: Float[Array, "count rows slots"]) -> Float[Array, "all_rows slots"]:
    """Undo `split_micro_batches`."""
    return value.swapaxes(0, 1).reshape(-1, value.shape[-1])


def score_in_micro_batches(model: EasyDeLBaseModule, batch: DeviceBatch, micro_batches: int) -> PairLogps:
    """`score_pairs` without gradients, as many rows at a time as a training step holds."""
    batch = {key: batch[key] for key in SCORED_KEYS}
    if micro_batches == 1:
        return score_pairs(model, batch)
    logps = jax.lax.map(lambda micro: score_pairs(model, micro), split_micro_batches(batch, micro_batches))
    return PairLogps(*(join_micro_batches(side) for side in logps))
