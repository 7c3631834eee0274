"""Attention over trees in XLA's own operations, a tile of the score square at a time and only tiles that are seen."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easydel.ops.attention.mask import BRANCHES, UNSEEN
from easydel.ops.attention.residuals import name_residuals

# Queries and keys of a tile. Its scores for all heads stay in a core's cache, and few of them are masked out.
BLOCK = 64


class Ids(NamedTuple):
    """Blocks of tokens: what a mask reads of them. ``code`` is segment and branch in one number."""

    code: Int[Array, "blocks block"]
    place: Int[Array, "blocks block"]
    position: Int[Array, "blocks block"]
    window: Int[Array, ""] | None


class Tiles(NamedTuple):
    """Key blocks that each query block sees, the seen ones first, and their number."""

    keys: Int[Array, "blocks most"]
    number: Int[Array, " blocks"]


def tree_attention_xla(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    segment_ids: Int[Array, "rows length"],
    branch_ids: Int[Array, "rows length"],
    position_ids: Int[Array, "rows length"],
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "rows length heads head_dim"]:
    """`tree_attention` on CPU, and the form that the others are tested against.

    Tiles of ``BLOCK x BLOCK`` scores go through one after the other with a running soft-max, forward and backward, so
    memory is that of the inputs and time that of the tiles in which any query may see any key.

    References:
      Dao et al., FlashAttention, 2022.
    """
    rows, length = q.shape[:2]
    padding = -length % BLOCK

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    code, position = pad(segment_ids * BRANCHES + branch_ids), pad(position_ids)
    blocks_of_row = (length + padding) // BLOCK
    place = jnp.broadcast_to(jnp.arange(length + padding), code.shape)
    code, place, position = (x.reshape(-1, BLOCK) for x in (code, place, position))
    ids = Ids(code, place, position, None if window is None else jnp.int32(window))
    tiles = _tiles(ids, blocks_of_row)
    query_blocks = _query_blocks(pad(q) / math.sqrt(q.shape[-1]), k.shape[2])
    out = _attend(query_blocks, _key_blocks(pad(k)), _key_blocks(pad(v)), ids, tiles)
    return _tokens(out, rows, q.shape[2])[:, :length].astype(q.dtype)


def _query_blocks(q: Array, kv_heads: int) -> Float[Array, "blocks kv_heads group_block head_dim"]:
    """The queries of all heads that share a key head as one block, so that a tile's scores are one product."""
    *_, heads, size = q.shape
    q = q.reshape(-1, BLOCK, kv_heads, heads // kv_heads, size)
    return q.transpose(0, 2, 3, 1, 4).reshape(q.shape[0], kv_heads, -1, size)


def _tokens(blocks: Float[Array, "blocks kv_heads group_block head_dim"], rows: int, heads: int) -> Array:
    """Undo `_query_blocks`."""
    count, kv_heads, _, size = blocks.shape
    x = blocks.reshape(count, kv_heads, heads // kv_heads, BLOCK, size).transpose(0, 3, 1, 2, 4)
    return x.reshape(rows, -1, heads, size)


def _key_blocks(x: Array) -> Float[Array, "blocks kv_heads block head_dim"]:
    return x.reshape(-1, BLOCK, *x.shape[2:]).transpose(0, 2, 1, 3)


def _tiles(ids: Ids, blocks_of_row: int) -> Tiles:
    """The tiles that may hold a visible pair, found from each block's extremes: never too few, seldom too many."""
    code, place, position = (x.reshape(-1, blocks_of_row, BLOCK) for x in (ids.code, ids.place, ids.position))
    segment = code // BRANCHES
    first, last = segment.min(-1), segment.max(-1)
    seen = (place[:, None, :, 0] <= place[:, :, None, -1]) & (first[:, None, :] <= last[:, :, None])
    seen &= last[:, None, :] >= first[:, :, None]
    # Within one segment a block of one branch sees nothing of a block that holds only the other.
    branches = jax.lax.reduce_or(1 << (code % BRANCHES), axes=(2,))
    is_one = first == last
    in_one = is_one[:, :, None] & is_one[:, None, :]
    seen &= ~in_one | ((branches[:, None, :] & (1 | branches[:, :, None])) > 0)
    if ids.window is not None:
        seen &= position.min(-1)[:, :, None] - position.max(-1)[:, None, :] < ids.window
    keys = jnp.argsort(~seen, axis=-1, stable=True) + blocks_of_row * jnp.arange(seen.shape[0])[:, None, None]
    return Tiles(keys.reshape(-1, blocks_of_row), seen.sum(-1).reshape(-1))


def _visible(ids: Ids, queries: Int[Array, ""], keys: Int[Array, ""]) -> Bool[Array, "block block"]:
    """`tree_mask` of one tile."""
    query_code, key_code = ids.code[queries][:, None], ids.code[keys][None, :]
    visible = (key_code == query_code) | (key_code == query_code & -BRANCHES)
    visible &= ids.place[keys][None, :] <= ids.place[queries][:, None]
    if ids.window is not None:
        visible &= ids.position[queries][:, None] - ids.position[keys][None, :] < ids.window
    return visible


def _where_visible(visible: Bool[Array, "block block"], scores: Array, otherwise: float) -> Array:
    by_head = scores.reshape(scores.shape[0], -1, *visible.shape)
    return jnp.where(visible, by_head, otherwise).reshape(scores.shape)


def _product(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _sums(weights: Float[Array, "heads queries block"]) -> Float[Array, "heads queries"]:
    # As a product, which on CPU takes a third of the time of a reduction.
    return jnp.einsum("hqk,k->hq", weights, jnp.ones(BLOCK), precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, ids: Ids, tiles: Tiles) -> Float[Array, "blocks kv_heads group_block size"]:
    return _forward(q, k, v, ids, tiles)[0]


def _forward(q: Array, k: Array, v: Array, ids: Ids, tiles: Tiles) -> tuple[Array, Any]:
    def one_block(queries: Array) -> tuple[Array, Array]:
        def one_tile(nth: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, out = running
            keys = tiles.keys[queries, nth]
            scores = _where_visible(_visible(ids, queries, keys), _product("hqd,hkd->hqk", q[queries], k[keys]), UNSEEN)
            larger = jnp.maximum(largest, scores.max(-1))
            weights = jnp.exp(scores - larger[..., None])
            shrink = jnp.exp(largest - larger)
            out = out * shrink[..., None] + _product("hqk,hkd->hqd", weights.astype(v.dtype), v[keys])
            return larger, total * shrink + _sums(weights), out

        zeros = jnp.zeros(q.shape[1:], jnp.float32)
        start = jnp.full(q.shape[1:3], UNSEEN), jnp.zeros(q.shape[1:3]), zeros
        largest, total, out = jax.lax.fori_loop(0, tiles.number[queries], one_tile, start)
        return out / total[..., None], largest + jnp.log(total)

    out, normalizer = jax.lax.map(one_block, jnp.arange(q.shape[0]))
    out, normalizer = name_residuals(out, normalizer)
    return out, (q, k, v, ids, tiles, out, normalizer)


def _backward(residuals: Any, cotangent: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, ids, tiles, out, normalizer = residuals
    cotangent = cotangent.astype(q.dtype)
    shift = jnp.sum(out * cotangent, axis=-1)

    def one_block(gradients: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        queries, query, grad, log_z, mean = block
        # Keys' gradients are gathered transposed: the other way round the products would transpose whole tiles.
        query_t, grad_t = query.swapaxes(1, 2), grad.swapaxes(1, 2)

        def one_tile(nth: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            q_sum, k_sum, v_sum = sums
            keys = tiles.keys[queries, nth]
            scores = _product("hqd,hkd->hqk", query, k[keys])
            weights = _where_visible(_visible(ids, queries, keys), jnp.exp(scores - log_z[..., None]), 0.0)
            score_grads = weights * (_product("hqd,hkd->hqk", grad, v[keys]) - mean[..., None])
            weights, score_grads = weights.astype(q.dtype), score_grads.astype(q.dtype)
            v_sum = v_sum.at[keys].add(_product("hdq,hqk->hdk", grad_t, weights))
            k_sum = k_sum.at[keys].add(_product("hdq,hqk->hdk", query_t, score_grads))
            return q_sum + _product("hqk,hkd->hqd", score_grads, k[keys]), k_sum, v_sum

        start = jnp.zeros(query.shape, jnp.float32), *gradients
        q_sum, k_sum, v_sum = jax.lax.fori_loop(0, tiles.number[queries], one_tile, start)
        return (k_sum, v_sum), q_sum

    zeros = jnp.zeros((k.shape[0], k.shape[1], k.shape[3], k.shape[2]), jnp.float32)
    blocks = jnp.arange(q.shape[0]), q, cotangent, normalizer, shift
    (k_grad, v_grad), q_grad = jax.lax.scan(one_block, (zeros, zeros), blocks)
    k_grad, v_grad = (x.swapaxes(2, 3) for x in (k_grad, v_grad))
    return q_grad.astype(q.dtype), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)
