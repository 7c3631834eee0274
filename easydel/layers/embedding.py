"""Look up the vectors of token ids."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Embedding(eqx.Module):
    """One vector per token id."""

    weight: Float[Array, "vocab hidden"]

    @classmethod
    def init(cls, key: PRNGKeyArray, vocab_size: int, hidden_size: int, std: float) -> Embedding:
        """Random vectors with standard deviation `std`."""
        return cls(std * jax.random.normal(key, (vocab_size, hidden_size)))

    def __call__(self, ids: Int[Array, " tokens"], dtype: Any, scale: float = 1.0) -> Float[Array, "tokens hidden"]:
        """The vectors of `ids` in `dtype`, times `scale`.

        Example:
          >>> Embedding(jnp.eye(2))(jnp.array([1]), jnp.float32, scale=3.0).tolist()
          [[0.0, 3.0]]
        """
        x = self.weight[ids].astype(dtype)
        # Round the scale to the compute dtype first: families with a scale were trained so.
        return x if scale == 1 else x * jnp.asarray(scale, dtype)
