"""Attend over trees in XLA's own operations, tile by tile, and only in tiles with a visible pair."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easydel.ops.attention.blocks import BlockSizes, blocks_to_visit, seen_blocks
from easydel.ops.attention.inputs import AttentionOptions, TokenIds, pad_rows
from easydel.ops.attention.mask import UNSEEN, Tokens, visible
from easydel.ops.attention.residuals import name_residuals

# Queries, and keys, of a tile: small enough that the scores of all heads stay in a core's cache and few are masked.
BLOCK = 64


class Tiles(NamedTuple):
    """The tiles to compute, and the ids of each block: all that does not depend on queries, keys and values."""

    tokens: Tokens  # [blocks, block] each
    keys: Int[Array, "blocks most"]  # key blocks of each query block, the seen ones first
    number: Int[Array, " blocks"]  # and how many of them are seen
    window: Int[Array, ""] | None


def tree_attention_xla(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    ids: TokenIds,
    options: AttentionOptions,
) -> Float[Array, "rows length heads head_dim"]:
    """Compute `tree_attention` on any device; the other backends are tested against this one.

    Tiles of ``BLOCK x BLOCK`` scores are computed one after the other with a running softmax, forward and backward.
    Memory is that of the inputs; time is that of the tiles in which any query may see any key.

    Args and result are those of `tree_attention`.

    References:
      Dao et al., FlashAttention, 2022.
    """
    rows, length = q.shape[:2]
    pad = partial(pad_rows, multiple=BLOCK)
    tiles = _tiles(TokenIds(*map(pad, ids)), options.window)
    query_blocks = _query_blocks(pad(q) * options.scale_of(q.shape[-1]), k.shape[2])
    out = _attend(query_blocks, _key_blocks(pad(k)), _key_blocks(pad(v)), tiles, options.soft_cap)
    return _tokens(out, rows, q.shape[2])[:, :length].astype(q.dtype)


def _query_blocks(q: Array, kv_heads: int) -> Float[Array, "blocks kv_heads group_block head_dim"]:
    """Put the queries of all heads that share a key head into one block, so that a tile's scores are one product."""
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


def _tiles(ids: TokenIds, window: int | Int[Array, ""] | None) -> Tiles:
    keys, number = blocks_to_visit(seen_blocks(ids, window, BlockSizes(BLOCK, BLOCK)))
    rows, blocks_of_row = number.shape
    slots = jnp.broadcast_to(jnp.arange(ids.segment.shape[1]), ids.segment.shape)
    tokens = Tokens(*(x.reshape(-1, BLOCK) for x in (*ids, slots)))
    keys = (keys + blocks_of_row * jnp.arange(rows)[:, None, None]).reshape(-1, blocks_of_row)
    return Tiles(tokens, keys, number.reshape(-1), None if window is None else jnp.int32(window))


def _visible(tiles: Tiles, queries: Int[Array, ""], keys: Int[Array, ""]) -> Bool[Array, "block block"]:
    """`tree_mask` of one tile."""
    query_tokens = Tokens(*(x[queries][:, None] for x in tiles.tokens))
    key_tokens = Tokens(*(x[keys][None, :] for x in tiles.tokens))
    return visible(query_tokens, key_tokens, tiles.window)


def _where_visible(seen: Bool[Array, "block block"], scores: Array, otherwise: float) -> Array:
    by_head = scores.reshape(scores.shape[0], -1, *seen.shape)
    return jnp.where(seen, by_head, otherwise).reshape(scores.shape)


def _product(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _sums(weights: Float[Array, "heads queries block"]) -> Float[Array, "heads queries"]:
    # As a product, which on CPU takes a third of the time of a reduction.
    return jnp.einsum("hqk,k->hq", weights, jnp.ones(BLOCK), precision=jax.lax.Precision.HIGHEST)


def _scores(q: Array, k: Array, soft_cap: float | None) -> Float[Array, "kv_heads group_block block"]:
    scores = _product("hqd,hkd->hqk", q, k)
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: Float[Array, "blocks kv_heads group_block size"],
    k: Float[Array, "blocks kv_heads block size"],
    v: Float[Array, "blocks kv_heads block size"],
    tiles: Tiles,
    soft_cap: float | None,
) -> Float[Array, "blocks kv_heads group_block size"]:
    """The attention output, float32, for queries that are scaled already."""
    return _forward(q, k, v, tiles, soft_cap)[0]


def _forward(q: Array, k: Array, v: Array, tiles: Tiles, soft_cap: float | None) -> tuple[Array, Any]:
    def one_block(queries: Array) -> tuple[Array, Array]:
        def one_tile(nth: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, out = running
            keys = tiles.keys[queries, nth]
            scores = _where_visible(_visible(tiles, queries, keys), _scores(q[queries], k[keys], soft_cap), UNSEEN)
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
    return out, (q, k, v, tiles, out, normalizer)


def _backward(soft_cap: float | None, residuals: Any, cotangent: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, tiles, out, normalizer = residuals
    cotangent = cotangent.astype(q.dtype)
    shift = jnp.sum(out * cotangent, axis=-1)

    def one_block(gradients: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        queries, query, grad, log_z, mean = block
        # Accumulate the gradients of keys and values transposed: otherwise the products would transpose whole tiles.
        query_t, grad_t = query.swapaxes(1, 2), grad.swapaxes(1, 2)

        def one_tile(nth: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            q_sum, k_sum, v_sum = sums
            keys = tiles.keys[queries, nth]
            scores = _scores(query, k[keys], soft_cap)
            weights = _where_visible(_visible(tiles, queries, keys), jnp.exp(scores - log_z[..., None]), 0.0)
            score_grads = weights * (_product("hqd,hkd->hqk", grad, v[keys]) - mean[..., None])
            if soft_cap is not None:
                score_grads *= 1 - jnp.square(scores / soft_cap)  # the derivative of c tanh(s / c)
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
    return q_grad.astype(q.dtype), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
