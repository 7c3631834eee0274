"""Attention over trees by cuDNN's flash attention on NVIDIA GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easydel.ops.attention.mask import tree_mask

DTYPES = (jnp.bfloat16, jnp.float16)
LARGEST_HEAD = 128
# cuDNN 9 on Hopper gives NaN gradients of q under a mask where the length is 64 above a multiple of 128
# (pytorch/pytorch#196678), so lengths are multiples of 128.
LENGTH_UNIT = 128


def cudnn_takes(q: Float[Array, "rows length heads head_dim"]) -> bool:
    """Whether cuDNN has a flash kernel: 16-bit floats, and heads of a multiple of 8 up to 128.

    Hopper takes heads up to 256 as well; they stay with XLA, so that one rule holds on every card.
    """
    return q.dtype in DTYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= LARGEST_HEAD


def tree_attention_cudnn(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    segment_ids: Int[Array, "rows length"],
    branch_ids: Int[Array, "rows length"],
    position_ids: Int[Array, "rows length"],
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "rows length heads head_dim"]:
    """`tree_attention` in one call of cuDNN under the whole mask.

    cuDNN adds the mask as a bias in q's dtype and gives back a gradient for it, so a layer costs
    ``4 * rows * length**2`` bytes for a while: 0.13 GB for 32 rows of 1024. One call and not one a part of the tree:
    parts merged by their log-sum-exp would lose the cotangent of that output and give wrong gradients without a word.
    Every token sees itself, padding too, so no row of the mask is empty (cuDNN would give NaN there).

    Raises:
      ValueError: cuDNN has no kernel for this dtype or head size (`cudnn_takes`).
    """
    if not cudnn_takes(q):
        raise ValueError(
            f"cuDNN's flash attention takes bfloat16 or float16 and heads of a multiple of 8 up to {LARGEST_HEAD}; "
            f"got {q.dtype} and {q.shape[-1]}. Compute in bfloat16, or call tree_attention, which then uses XLA."
        )
    length = q.shape[1]

    def pad(x: Array) -> Array:
        # Zeros are segment 0: what is added is padding like any other.
        return jnp.pad(x, [(0, 0), (0, -length % LENGTH_UNIT)] + [(0, 0)] * (x.ndim - 2))

    mask = tree_mask(pad(segment_ids), pad(branch_ids), pad(position_ids), window)
    out = jax.nn.dot_product_attention(pad(q), pad(k), pad(v), mask=mask[:, None], implementation="cudnn")
    return out[:, :length]
