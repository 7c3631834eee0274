"""Save the attention output and its softmax statistics when the backward pass recomputes layers.

Both are as small as the layer input and expensive to recompute.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

RESIDUALS = "tree_attention"
# JAX gives no names to the outputs of its cuDNN call, so the call itself is recognised.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
_keep_named = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


def keep_attention(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """Tell `jax.checkpoint` to save what attention needs for its backward pass, whichever backend runs."""
    return primitive.name == CUDNN_FORWARD or _keep_named(primitive, *inputs, **parameters)


def name_residuals(*arrays: Array) -> tuple[Array, ...]:
    """Name arrays so that `keep_attention` saves them and the backward pass does not attend again."""
    return tuple(checkpoint_name(array, RESIDUALS) for array in arrays)
