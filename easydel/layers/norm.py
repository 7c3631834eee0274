"""Scale activations to unit root mean square."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RMSNorm(eqx.Module):
    """Scale to unit root mean square over the last axis, in float32.

    .. math:: y = (o + w) \\frac{x}{\\sqrt{\\mathrm{mean}(x^2) + \\epsilon}}

    Attributes:
      weight: one factor per feature, kept as the family's files hold it.
      eps: added to the mean of squares, static.
      offset: ``o``, added to the weight; 1 where a family keeps the distance from one (Gemma), static.
      casts_first: round to the dtype of x before the weight is applied, not after, static.

    References:
      Zhang & Sennrich, Root Mean Square Layer Normalization, 2019.

    Example:
      >>> RMSNorm.init(2, eps=0.0)(jnp.array([3.0, 3.0])).tolist()
      [1.0, 1.0]
    """

    weight: Float[Array, " size"]
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True, default=0.0)
    casts_first: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(cls, size: int, eps: float, *, offset: float = 0.0, casts_first: bool = False) -> RMSNorm:
        """A norm whose factors are all 1."""
        return cls(jnp.full(size, 1.0 - offset), eps, offset, casts_first)

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """The normalised activations, in the dtype of `x`."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        weight = self.offset + self.weight if self.offset else self.weight
        if self.casts_first:
            return weight.astype(x.dtype) * normed.astype(x.dtype)
        return (weight * normed).astype(x.dtype)
