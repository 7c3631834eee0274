"""Attend from the newest tokens of each row to a cache of the keys and values of all its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easydel.ops.attention.inputs import AttentionOptions, TokenIds
from easydel.ops.attention.mask import UNSEEN, tree_mask


def cached_attention(
    q: Float[Array, "rows new heads head_dim"],
    k: Float[Array, "rows slots kv_heads head_dim"],
    v: Float[Array, "rows slots kv_heads head_dim"],
    ids: TokenIds,
    options: AttentionOptions,
    query_start: Int[Array, ""],
) -> Float[Array, "rows new heads head_dim"]:
    """Compute `tree_attention` for queries in the slots from `query_start` on, under the whole mask.

    All scores exist at once, in float32: a new token has one row of them, and only the prompt has many.

    Args:
      q: queries of the newest tokens.
      k, v: the cache, with the keys and values of the newest tokens already in it.
      ids: of every slot of the cache.
      options: window, scale and soft-cap.
      query_start: slot of the first query.

    Returns:
      The attention output, in q's dtype.
    """
    rows, new, heads, head_dim = q.shape
    query_ids = TokenIds(*(jax.lax.dynamic_slice_in_dim(x, query_start, new, axis=1) for x in ids))
    mask = tree_mask(ids, options.window, query_ids, query_start)
    by_group = q.reshape(rows, new, k.shape[2], -1, head_dim)
    scores = jnp.einsum("rqhgd,rkhd->rhgqk", by_group, k, preferred_element_type=jnp.float32)
    scores *= options.scale_of(head_dim)
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, UNSEEN), axis=-1)
    out = jnp.einsum("rhgqk,rkhd->rqhgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(rows, new, heads, head_dim).astype(q.dtype)
