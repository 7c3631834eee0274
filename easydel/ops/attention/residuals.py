"""What attention leaves behind for its backward pass, and the policy of `jax.checkpoint` that keeps it."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

RESIDUALS = "tree_attention"
# cuDNN's call in JAX names nothing.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
_keep_named = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


def keep_attention(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """Policy of `jax.checkpoint`: keep what attention leaves, in whichever form it runs, and nothing else."""
    return primitive.name == CUDNN_FORWARD or _keep_named(primitive, *inputs, **parameters)


def name_residuals(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, named for `keep_attention`, which saves the backward pass from attending again."""
    return tuple(checkpoint_name(array, RESIDUALS) for array in arrays)
