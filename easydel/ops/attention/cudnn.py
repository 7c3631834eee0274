"""Attend over trees with cuDNN's flash attention on NVIDIA GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from easydel.ops.attention.inputs import AttentionOptions, TokenIds, pad_rows
from easydel.ops.attention.mask import tree_mask

DTYPES = (jnp.bfloat16, jnp.float16)
LARGEST_HEAD = 128
# cuDNN 9 on Hopper gives NaN gradients of q under a mask where the length is 64 above a multiple of 128
# (pytorch/pytorch#196678), so lengths are multiples of 128.
LENGTH_MULTIPLE = 128


def cudnn_unmet(dtype: Any, head_dim: int, options: AttentionOptions) -> list[str]:
    """List in words what cuDNN's flash attention needs and a call does not give; empty where it has a kernel.

    Hopper has kernels for heads up to 256 as well; those heads stay with XLA, so that one rule holds on every GPU.
    """
    unmet = []
    if dtype not in DTYPES:
        unmet.append(f"bfloat16 or float16, got {jnp.dtype(dtype)}")
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        unmet.append(f"heads of a multiple of 8 up to {LARGEST_HEAD}, got {head_dim}")
    if options.soft_cap is not None:
        unmet.append(f"scores without soft-cap, got soft_cap={options.soft_cap}")
    return unmet


def tree_attention_cudnn(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    ids: TokenIds,
    options: AttentionOptions,
) -> Float[Array, "rows length heads head_dim"]:
    """Compute `tree_attention` in one call of cuDNN under the whole mask; only where `cudnn_unmet` is empty.

    cuDNN adds the mask as a bias in q's dtype and returns a gradient for it, so a layer needs ``4 * rows * length**2``
    bytes for a while: 0.13 GB for 32 rows of 1024 tokens. Trunk and branches share one call: merging several calls by
    their log-sum-exp loses the cotangent of that output and gives wrong gradients in silence. Every token sees itself,
    padding too, so no row of the mask is empty: cuDNN gives NaN for an empty one.
    """
    pad = partial(pad_rows, multiple=LENGTH_MULTIPLE)
    mask = tree_mask(TokenIds(*map(pad, ids)), options.window)
    scale = options.scale_of(q.shape[-1])
    out = jax.nn.dot_product_attention(pad(q), pad(k), pad(v), mask=mask[:, None], scale=scale, implementation="cudnn")
    return out[:, : q.shape[1]]
