"""A weight matrix in 8 bits, for layers that are not trained themselves."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

LARGEST = 127


class QuantizedWeight(eqx.Module):
    """Whole numbers of -127 to 127 and one scale an output channel, symmetric around zero.

    .. math:: W_{oi} \\approx s_o q_{oi}, \\quad s_o = \\max_i |W_{oi}| / 127

    No entry is off by more than half its row's scale. A scale a row, rather than a block of it, can be applied after
    the product, so that no copy of the weight in the compute dtype has to be rounded: 127 is exact in bfloat16.

    Attributes:
      values: the whole numbers.
      scale: what they are multiplied by, float32.
      dtype: dtype of the weight they were made from, static.

    References:
      Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022, section 2 (row-wise
      absmax quantisation).
    """

    values: Int8[Array, "*layers out in"]
    scale: Float[Array, "*layers out"]
    dtype: np.dtype = eqx.field(static=True)

    @classmethod
    def of(cls, weight: Float[Array, "*layers out in"]) -> QuantizedWeight:
        """The nearest 8-bit weight."""
        largest = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=-1)
        scale = largest / LARGEST
        # Rows of zeros, or of numbers so small that their scale is none, become zeros.
        scale = jnp.where(scale > 0, scale, 1.0)
        values = jnp.round(weight.astype(jnp.float32) / scale[..., None])
        return cls(values.astype(jnp.int8), scale, np.dtype(weight.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> Float[Array, "*layers out in"]:
        """The weight it stands for, float32."""
        return self.values.astype(jnp.float32) * self.scale[..., None]

    def product(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        """``x @ weight.T`` in the dtype of `x`."""
        return (x @ self.values.astype(x.dtype).T) * self.scale.astype(x.dtype)
