"""What one step of the TPU kernels of attention over trees does: forward, and the gradients of its inputs.

A step holds a block of queries of all heads that share a key head, ``[1, 1, group, head_dim, queries]``, and a block of
keys and values, ``[1, 1, keys, head_dim]``. The grid is (rows, key heads, outer blocks, inner blocks), and a step whose
inner block nobody sees does nothing. Scores lie transposed, ``[keys, queries]``: what there is one of a query (highest
score, normaliser) is a row, and sums over keys run down the sublanes.

References:
  Dao, FlashAttention-2, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from easydel.ops.attention.blocks import visible_in_block
from easydel.ops.attention.mask import UNSEEN

PLAIN = (((1,), (0,)), ((), ()))
TRANSPOSED_LEFT = (((0,), (0,)), ((), ()))
TRANSPOSED_RIGHT = (((1,), (1,)), ((), ()))


def forward_step(
    fetch, window, q, k, v, query_codes, key_codes, out, log_normalizer, highest, normalizer, total, *, is_windowed
):
    """Attended values and the logarithm of each query's normaliser; keys are the inner blocks."""
    place, heads = _place(fetch), range(q.shape[2])

    @pl.when(place.is_first)
    def _():
        highest[...] = jnp.full_like(highest, UNSEEN)
        normalizer[...] = jnp.zeros_like(normalizer)
        total[...] = jnp.zeros_like(total)

    @pl.when(place.has_own_block)
    def _():
        visible = _visible(place.outer, place.inner, query_codes, key_codes, window, is_windowed)
        values = v[0, 0]
        for head in heads:
            row = slice(head, head + 1)
            scores = _scores(q[0, 0, head], k[0, 0], visible)
            new_highest = jnp.maximum(highest[row], jnp.max(scores, axis=0, keepdims=True))
            shrink = jnp.exp(highest[row] - new_highest)
            weights = jnp.exp(scores - new_highest)
            highest[row] = new_highest
            normalizer[row] = shrink * normalizer[row] + jnp.sum(weights, axis=0, keepdims=True)
            total[head] = shrink * total[head] + _product(values, weights.astype(values.dtype), TRANSPOSED_LEFT)

    @pl.when(place.is_last)
    def _():
        for head in heads:
            row = slice(head, head + 1)
            out[0, 0, head] = (total[head] / normalizer[row]).astype(out.dtype)
            log_normalizer[0, 0, row] = highest[row] + jnp.log(normalizer[row])


def query_gradient_step(fetch, window, *refs, is_windowed):
    """The gradient of the queries; keys are the inner blocks."""
    *inputs, query_codes, key_codes, q_gradient, total = refs
    place = _place(fetch)

    @pl.when(place.is_first)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(place.has_own_block)
    def _():
        visible = _visible(place.outer, place.inner, query_codes, key_codes, window, is_windowed)
        keys = inputs[1][0, 0]
        for head in range(q_gradient.shape[2]):
            _, scores_gradient = _weights_and_scores_gradient(inputs, visible, head)
            total[head] += _product(keys, scores_gradient.astype(keys.dtype), TRANSPOSED_LEFT)

    @pl.when(place.is_last)
    def _():
        q_gradient[0, 0] = total[...].astype(q_gradient.dtype)


def key_value_gradient_step(fetch, window, *refs, is_windowed):
    """The gradients of keys and values, summed over the heads that share them; queries are the inner blocks."""
    *inputs, query_codes, key_codes, k_gradient, v_gradient, k_total, v_total = refs
    place = _place(fetch)

    @pl.when(place.is_first)
    def _():
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)

    @pl.when(place.has_own_block)
    def _():
        visible = _visible(place.inner, place.outer, query_codes, key_codes, window, is_windowed)
        q, cotangent = inputs[0], inputs[3]
        for head in range(q.shape[2]):
            weights, scores_gradient = _weights_and_scores_gradient(inputs, visible, head)
            v_total[...] += _product(weights.astype(q.dtype), cotangent[0, 0, head], TRANSPOSED_RIGHT)
            k_total[...] += _product(scores_gradient.astype(q.dtype), q[0, 0, head], TRANSPOSED_RIGHT)

    @pl.when(place.is_last)
    def _():
        k_gradient[0, 0] = k_total[...].astype(k_gradient.dtype)
        v_gradient[0, 0] = v_total[...].astype(v_gradient.dtype)


class _Place(NamedTuple):
    """Where in the grid a step is."""

    outer: Array
    inner: Array
    is_first: Array
    is_last: Array
    has_own_block: Array


def _place(fetch) -> _Place:
    row, outer, inner = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    outer_blocks, inner_blocks = pl.num_programs(2), pl.num_programs(3)
    at_hand = fetch[(row * outer_blocks + outer) * inner_blocks + inner]
    return _Place(outer, inner, inner == 0, inner == inner_blocks - 1, at_hand == inner)


def _visible(query_block, key_block, query_codes, key_codes, window, is_windowed: bool) -> Bool[Array, "keys queries"]:
    return visible_in_block(
        query_codes[0],
        key_codes[0],
        query_block * query_codes.shape[2],
        key_block * key_codes.shape[2],
        window[0] if is_windowed else None,
    )


def _product(left: Array, right: Array, dimensions) -> Float[Array, "left right"]:
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, visible: Array) -> Float[Array, "keys queries"]:
    return jnp.where(visible, _product(k, q, PLAIN) / math.sqrt(k.shape[1]), UNSEEN)


def _weights_and_scores_gradient(
    inputs: Sequence[Any], visible: Bool[Array, "keys queries"], head: int
) -> tuple[Float[Array, "keys queries"], Float[Array, "keys queries"]]:
    """Soft-max weights of one head's block, and the gradient of its scores before they are scaled."""
    q, k, v, cotangent, log_normalizer, mean = inputs
    row = slice(head, head + 1)
    weights = jnp.exp(_scores(q[0, 0, head], k[0, 0], visible) - log_normalizer[0, 0, row])
    weights_gradient = _product(v[0, 0], cotangent[0, 0, head], PLAIN)
    return weights, weights * (weights_gradient - mean[0, 0, row]) / math.sqrt(k.shape[3])
