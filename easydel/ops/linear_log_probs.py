"""Compute log-probabilities of given tokens from hidden states, without ever holding all logits."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easydel.ops.mesh_axes import data_parallel_size

SUMMED_AT_ONCE = 256


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_log_probs(
    hidden: Float[Array, "rows tokens hidden"],
    weight: Float[Array, "vocab hidden"],
    targets: Int[Array, "rows tokens"],
    count: int | Int[Array, ""] | None = None,
    chunk_size: int = 256,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
) -> Float[Array, "rows tokens"]:
    """Log-probability of one target token per position under the softmax of `linear_logits`, in nats, float32.

    .. math:: z_i = c \\tanh(s W h_i / c), \\qquad \\log p_i = z_{i,t_i} - \\log \\textstyle\\sum_v e^{z_{i,v}}

    Positions are computed in chunks of whole columns, so peak memory is ``chunk_size * vocab`` instead of
    ``rows * tokens * vocab``; the backward pass recomputes each chunk's logits. Products accumulate in float32 whatever
    the inputs' dtype: DPO compares sums over hundreds of tokens, and bf16 logits are off by 0.07 nats on a sum of 512.

    Args:
      hidden: final hidden states that predict the targets.
      weight: output embedding (the language-model head).
      targets: token ids, ``0 <= id < vocab``.
      count: columns in use; later columns cost nothing, give 0 and pass no gradient. None uses all.
      chunk_size: about how many positions' logits exist at the same time on each device.
      soft_cap: ``c``, where the model caps its logits; None does not cap them.
      logit_scale: ``s``.

    Returns:
      float32 log-probabilities, one per position.

    Example:
      >>> h, w = jnp.eye(2)[None], jnp.eye(2)
      >>> [round(logp, 4) for logp in linear_log_probs(h, w, jnp.array([[0, 0]]))[0].tolist()]
      [-0.3133, -1.3133]
    """
    return _forward(hidden, weight, targets, count, chunk_size, soft_cap, logit_scale)[0]


def linear_logits(
    hidden: Float[Array, "rows tokens hidden"],
    weight: Float[Array, "vocab hidden"],
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
) -> Float[Array, "rows tokens vocab"]:
    """Logits ``c tanh(s W h / c)``, accumulated in float32; `soft_cap` is ``c``, `logit_scale` is ``s``.

    Example:
      >>> linear_logits(jnp.ones((1, 1, 2)), jnp.eye(2), logit_scale=0.5).tolist()
      [[[0.5, 0.5]]]
    """
    logits = jnp.einsum("rth,vh->rtv", hidden, weight, preferred_element_type=jnp.float32)
    if logit_scale != 1:
        logits *= logit_scale
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _log_sum_exp(logits: Float[Array, "rows tokens vocab"]) -> Float[Array, "rows tokens"]:
    largest = jnp.max(logits, axis=-1)
    # Sum by products, block by block: on CPU a reduction that also computes the exponentials takes a fifth to a third
    # longer, and one product over the whole vocabulary loses a hundred times as much to rounding.
    block = math.gcd(logits.shape[-1], SUMMED_AT_ONCE)
    exponentials = jnp.exp(logits - largest[..., None]).reshape(*largest.shape, -1, block)
    ones = jnp.ones(block, logits.dtype)
    sums = jnp.einsum("rtbv,v->rtb", exponentials, ones, precision=jax.lax.Precision.HIGHEST)
    return largest + jnp.log(jnp.sum(sums, axis=-1))


def _chunking(shape: tuple[int, ...], count: int | Array | None, chunk_size: int) -> tuple[int, int, int | Array]:
    """Columns per chunk, columns after padding to whole chunks, and chunks in use."""
    rows, tokens = shape
    columns = min(tokens, max(1, chunk_size // -(-rows // data_parallel_size())))
    chunks = -(-tokens // columns)
    in_use = chunks if count is None else jnp.minimum(chunks, (count + columns - 1) // columns)
    return columns, chunks * columns, in_use


def _pad(array: Array, tokens: int) -> Array:
    return jnp.pad(array, [(0, 0), (0, tokens - array.shape[1])] + [(0, 0)] * (array.ndim - 2))


def _forward(hidden, weight, targets, count, chunk_size, soft_cap, logit_scale):
    columns, padded, chunks = _chunking(targets.shape, count, chunk_size)
    padded_hidden, padded_targets = _pad(hidden, padded), _pad(targets, padded)

    def one_chunk(index, outputs):
        start = index * columns
        h, t = (jax.lax.dynamic_slice_in_dim(x, start, columns, axis=1) for x in (padded_hidden, padded_targets))
        logits = linear_logits(h, weight, soft_cap, logit_scale)
        # A masked sum, not a gather: it fuses with the softmax and works on a vocabulary that is split over devices.
        target = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == t[..., None], logits, 0.0), axis=-1)
        normalizer = _log_sum_exp(logits)
        values = (target - normalizer, normalizer)
        return tuple(jax.lax.dynamic_update_slice_in_dim(o, v, start, axis=1) for o, v in zip(outputs, values))

    zeros = jnp.zeros((targets.shape[0], padded), jnp.float32)
    log_probs, normalizer = jax.lax.fori_loop(0, chunks, one_chunk, (zeros, zeros))
    return log_probs[:, : targets.shape[1]], (hidden, weight, targets, count, normalizer)


def _backward(chunk_size, soft_cap, logit_scale, residuals, cotangent):
    hidden, weight, targets, count, normalizer = residuals
    tokens = targets.shape[1]
    columns, padded, chunks = _chunking(targets.shape, count, chunk_size)
    inputs = (*tuple(_pad(x, padded) for x in (hidden, targets, cotangent)), normalizer)

    def one_chunk(index, gradients):
        hidden_gradient, weight_gradient = gradients
        start = index * columns
        h, t, g, log_z = (jax.lax.dynamic_slice_in_dim(x, start, columns, axis=1) for x in inputs)
        logits = linear_logits(h, weight, soft_cap, logit_scale)
        one_hot = jnp.arange(logits.shape[-1]) == t[..., None]
        logits_gradient = g[..., None] * (one_hot - jnp.exp(logits - log_z[..., None]))
        if soft_cap is not None:
            logits_gradient *= 1 - jnp.square(logits / soft_cap)
        if logit_scale != 1:
            logits_gradient *= logit_scale
        logits_gradient = logits_gradient.astype(hidden.dtype)
        h_gradient = jnp.einsum("rtv,vh->rth", logits_gradient, weight, preferred_element_type=jnp.float32)
        weight_gradient += jnp.einsum("rtv,rth->vh", logits_gradient, h, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(hidden_gradient, h_gradient, start, axis=1), weight_gradient

    zeros = jnp.zeros((*inputs[0].shape[:2], hidden.shape[2]), jnp.float32), jnp.zeros(weight.shape, jnp.float32)
    hidden_gradient, weight_gradient = jax.lax.fori_loop(0, chunks, one_chunk, zeros)
    return hidden_gradient[:, :tokens].astype(hidden.dtype), weight_gradient.astype(weight.dtype), None, None


linear_log_probs.defvjp(_forward, _backward)


def linear_log_collision(
    hidden: Float[Array, "rows tokens hidden"],
    weight: Float[Array, "vocab hidden"],
    count: int | Int[Array, ""] | None = None,
    chunk_size: int = 256,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
) -> Float[Array, "rows tokens"]:
    """Log-probability that two draws from ``p``, the softmax of `linear_logits`, are the same token, in nats, float32.

    .. math:: \\log \\textstyle\\sum_v p_{i,v}^2

    Args and chunks are those of `linear_log_probs`; no gradient flows to the inputs.

    Example:
      >>> h, w = jnp.zeros((1, 1, 2)), jnp.eye(2)
      >>> round(float(linear_log_collision(h, w)[0, 0]), 4)
      -0.6931
    """
    hidden, weight = jax.lax.stop_gradient((hidden, weight))
    columns, padded, chunks = _chunking(hidden.shape[:2], count, chunk_size)
    padded_hidden = _pad(hidden, padded)

    def one_chunk(index, output):
        start = index * columns
        h = jax.lax.dynamic_slice_in_dim(padded_hidden, start, columns, axis=1)
        logits = linear_logits(h, weight, soft_cap, logit_scale)
        values = _log_sum_exp(2 * logits) - 2 * _log_sum_exp(logits)
        return jax.lax.dynamic_update_slice_in_dim(output, values, start, axis=1)

    zeros = jnp.zeros((hidden.shape[0], padded), jnp.float32)
    return jax.lax.fori_loop(0, chunks, one_chunk, zeros)[:, : hidden.shape[1]]
