"""Attention over rows of trees: a prompt is seen by both of its completions, which never see each other."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Queries go in blocks of this many rows of the score square. A block needs no keys behind its own end, which halves
# the work, and its scores stay in cache.
QUERY_BLOCK = 256


def tree_mask(
    segment_ids: Int[Array, "rows length"],
    branch_ids: Int[Array, "rows length"],
    position_ids: Int[Array, "rows length"],
    window: int | Int[Array, ""] | None = None,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> Bool[Array, "rows queries keys"]:
    """Which key each query sees.

    Query q sees key k iff they are in the same segment, k is at or before q in the row, and k lies in the prompt
    (branch 0) or in q's own branch. With a sliding `window`, also iff k's position is fewer than `window` tokens back;
    positions and not places in the row count, since both completions continue from the prompt's end.
    """
    place = jnp.arange(segment_ids.shape[1])
    causal = place[keys][None, None, :] <= place[queries][None, :, None]
    same_segment = segment_ids[:, queries, None] == segment_ids[:, None, keys]
    key_branch = branch_ids[:, None, keys]
    own_branch = (key_branch == 0) | (key_branch == branch_ids[:, queries, None])
    visible = causal & same_segment & own_branch
    if window is not None:
        visible &= position_ids[:, queries, None] - position_ids[:, None, keys] < window
    return visible


def tree_attention(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    segment_ids: Int[Array, "rows length"],
    branch_ids: Int[Array, "rows length"],
    position_ids: Int[Array, "rows length"],
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "rows length heads head_dim"]:
    """Soft-max attention under `tree_mask`, scaled by ``1 / sqrt(head_dim)``.

    Args:
      q, k, v: queries, keys and values; `heads` is a multiple of `kv_heads` (grouped-query attention).
      segment_ids: pair of each token, from 1; 0 is padding, which attends to padding only.
      branch_ids: 0 prompt, 1 chosen, 2 rejected.
      position_ids: position of each token in its own sequence.
      window: tokens a query looks back, or None for all.

    Returns:
      The attended values in q's dtype; soft-max is in float32.

    The device has a say in how it is computed (`easydel.ops.tree_attention_form`), not in what.
    """
    # Here, because the forms read the mask above.
    from easydel.ops.tree_attention_form import device_form, over_mesh

    form = device_form(q)
    attend = tree_attention_xla if form is None else over_mesh(form)
    return attend(q, k, v, segment_ids, branch_ids, position_ids, window)


def tree_attention_xla(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    segment_ids: Int[Array, "rows length"],
    branch_ids: Int[Array, "rows length"],
    position_ids: Int[Array, "rows length"],
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "rows length heads head_dim"]:
    """`tree_attention` in XLA's own operations: on CPU, and the one the others are tested against."""
    heads, kv_heads = q.shape[2], k.shape[2]
    k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])

    @jax.checkpoint  # the backward pass rebuilds a block's scores: cheaper than keeping squares of the length
    def one_block(q, k, v, visible):
        scores = jnp.einsum("rhqd,rhkd->rhqk", q, k, preferred_element_type=jnp.float32) * scale
        # -1e30 and not -inf: a row of padding must give numbers, not NaN.
        scores = jnp.where(visible[:, None], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("rhqk,rhkd->rhqd", weights, v)

    outputs = []
    length = q.shape[2]
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        visible = tree_mask(segment_ids, branch_ids, position_ids, window, slice(start, stop), slice(0, stop))
        outputs.append(one_block(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], visible))
    return jnp.concatenate(outputs, axis=2).transpose(0, 2, 1, 3)
