"""Attention over rows of trees: a prompt is seen by both of its completions, which never see each other."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from easydel.ops.attention.backends import device_form, over_mesh


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

    The device has a say in how it is computed (`easydel.ops.attention.backends`), not in what.
    """
    return over_mesh(device_form(q))(q, k, v, segment_ids, branch_ids, position_ids, window)
