"""The name under which attention leaves behind what its backward pass needs, for policies of `jax.checkpoint`."""

from __future__ import annotations

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

RESIDUALS = "tree_attention"


def name_residuals(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, named: a policy that saves `RESIDUALS` saves the backward pass from attending again."""
    return tuple(checkpoint_name(array, RESIDUALS) for array in arrays)
