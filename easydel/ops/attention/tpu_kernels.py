"""Compute one step of the TPU kernels of attention over trees: forward, and the gradients of its inputs.

A step holds a block of queries of all heads that share a key head, ``[1, 1, group, head_dim, queries]``, and a block of
keys and values, ``[1, 1, keys, head_dim]``. The grid is (rows, key heads, outer blocks, inner blocks), and a step whose
inner block has no visible pair does nothing. Scores lie transposed, ``[keys, queries]``: statistics with one value per
query (highest score, normaliser) are rows, and sums over keys run down the sublanes.

References:
  Dao, FlashAttention-2, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from easydel.ops.attention.mask import UNSEEN, Tokens, visible

PLAIN = (((1,), (0,)), ((), ()))
TRANSPOSED_LEFT = (((0,), (0,)), ((), ()))
TRANSPOSED_RIGHT = (((1,), (1,)), ((), ()))


class Scoring(NamedTuple):
    """Scale, soft-cap and windowing of the scores; constants of a kernel."""

    scale: float
    soft_cap: float | None
    is_windowed: bool


def forward_step(
    fetch, window, q, k, v, query_ids, key_ids, out, log_normalizer, highest, normalizer, total, *, scoring
):
    """Compute the attention output and the logarithm of each query's normaliser; keys are the inner blocks."""
    here, heads = _here(fetch), range(q.shape[2])

    @pl.when(here.is_first)
    def _():
        highest[...] = jnp.full_like(highest, UNSEEN)
        normalizer[...] = jnp.zeros_like(normalizer)
        total[...] = jnp.zeros_like(total)

    @pl.when(here.has_own_block)
    def _():
        seen = _seen(here.outer, here.inner, query_ids, key_ids, window, scoring)
        values = v[0, 0]
        for head in heads:
            row = slice(head, head + 1)
            scores = jnp.where(seen, _scores(q[0, 0, head], k[0, 0], scoring), UNSEEN)
            new_highest = jnp.maximum(highest[row], jnp.max(scores, axis=0, keepdims=True))
            shrink = jnp.exp(highest[row] - new_highest)
            weights = jnp.exp(scores - new_highest)
            highest[row] = new_highest
            normalizer[row] = shrink * normalizer[row] + jnp.sum(weights, axis=0, keepdims=True)
            total[head] = shrink * total[head] + _product(values, weights.astype(values.dtype), TRANSPOSED_LEFT)

    @pl.when(here.is_last)
    def _():
        for head in heads:
            row = slice(head, head + 1)
            out[0, 0, head] = (total[head] / normalizer[row]).astype(out.dtype)
            log_normalizer[0, 0, row] = highest[row] + jnp.log(normalizer[row])


def query_gradient_step(fetch, window, *refs, scoring):
    """Compute the gradient of the queries; keys are the inner blocks."""
    *inputs, query_ids, key_ids, q_gradient, total = refs
    here = _here(fetch)

    @pl.when(here.is_first)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(here.has_own_block)
    def _():
        seen = _seen(here.outer, here.inner, query_ids, key_ids, window, scoring)
        keys = inputs[1][0, 0]
        for head in range(q_gradient.shape[2]):
            _, products_gradient = _weights_and_products_gradient(inputs, seen, head, scoring)
            total[head] += _product(keys, products_gradient.astype(keys.dtype), TRANSPOSED_LEFT)

    @pl.when(here.is_last)
    def _():
        q_gradient[0, 0] = total[...].astype(q_gradient.dtype)


def key_value_gradient_step(fetch, window, *refs, scoring):
    """Compute the gradients of keys and values, summed over the heads that share them; queries are the inner blocks."""
    *inputs, query_ids, key_ids, k_gradient, v_gradient, k_total, v_total = refs
    here = _here(fetch)

    @pl.when(here.is_first)
    def _():
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)

    @pl.when(here.has_own_block)
    def _():
        seen = _seen(here.inner, here.outer, query_ids, key_ids, window, scoring)
        q, cotangent = inputs[0], inputs[3]
        for head in range(q.shape[2]):
            weights, products_gradient = _weights_and_products_gradient(inputs, seen, head, scoring)
            v_total[...] += _product(weights.astype(q.dtype), cotangent[0, 0, head], TRANSPOSED_RIGHT)
            k_total[...] += _product(products_gradient.astype(q.dtype), q[0, 0, head], TRANSPOSED_RIGHT)

    @pl.when(here.is_last)
    def _():
        k_gradient[0, 0] = k_total[...].astype(k_gradient.dtype)
        v_gradient[0, 0] = v_total[...].astype(v_gradient.dtype)


class _Here(NamedTuple):
    """The position of a step in the grid, and whether its own block is loaded."""

    outer: Array
    inner: Array
    is_first: Array
    is_last: Array
    has_own_block: Array


def _here(fetch) -> _Here:
    row, outer, inner = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    outer_blocks, inner_blocks = pl.num_programs(2), pl.num_programs(3)
    at_hand = fetch[(row * outer_blocks + outer) * inner_blocks + inner]
    return _Here(outer, inner, inner == 0, inner == inner_blocks - 1, at_hand == inner)


def _seen(query_block, key_block, query_ids, key_ids, window, scoring: Scoring) -> Bool[Array, "keys queries"]:
    """`tree_mask` of one block, transposed."""
    query_rows, key_columns = query_ids[0], key_ids[0].T
    shape = (key_columns.shape[0], query_rows.shape[1])
    query_slot = query_block * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    key_slot = key_block * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    queries = Tokens(*(*(query_rows[i : i + 1] for i in range(3)), query_slot))
    keys = Tokens(*(*(key_columns[:, i : i + 1] for i in range(3)), key_slot))
    return visible(queries, keys, window[0] if scoring.is_windowed else None)


def _product(left: Array, right: Array, dimensions) -> Float[Array, "left right"]:
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, scoring: Scoring) -> Float[Array, "keys queries"]:
    scores = _product(k, q, PLAIN) * scoring.scale
    return scores if scoring.soft_cap is None else scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)


def _weights_and_products_gradient(
    inputs: Sequence[Any], seen: Bool[Array, "keys queries"], head: int, scoring: Scoring
) -> tuple[Float[Array, "keys queries"], Float[Array, "keys queries"]]:
    """The softmax weights of one head's block, and the gradient of the dot products of its queries and keys."""
    q, k, v, cotangent, log_normalizer, mean = inputs
    row = slice(head, head + 1)
    scores = _scores(q[0, 0, head], k[0, 0], scoring)
    weights = jnp.exp(jnp.where(seen, scores, UNSEEN) - log_normalizer[0, 0, row])
    weights_gradient = _product(v[0, 0], cotangent[0, 0, head], PLAIN)
    gradient = weights * (weights_gradient - mean[0, 0, row]) * scoring.scale
    if scoring.soft_cap is not None:
        gradient *= 1 - jnp.square(scores / scoring.soft_cap)  # the derivative of c tanh(s / c)
    return weights, gradient
