"""Multiply by a weight, kept in a float dtype or in 8 bits, and add the low-rank adapter beside it where there is one.

Weights may be stacked over layers and over experts: functions of whole models see ``[*stack, out, in]``, a call sees
``[out, in]``.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, PRNGKeyArray

LARGEST_VALUE = 127  # of a weight in 8 bits


class LoraAdapter(eqx.Module):
    """A trainable product of two thin matrices, added to a weight that stays as it is.

    .. math:: \\Delta W = s B A, \\quad s = \\alpha / r \\text{ or, with rsLoRA, } \\alpha / \\sqrt{r}

    Attributes:
      a: the first factor, float32.
      b: the second factor, float32; initially zero, so that a fresh adapter changes nothing.
      alpha: numerator of the scale, static.
      dropout: share of the input's features that a training step drops, static.
      use_rslora: divide by the square root of the rank, not the rank, static.
      dropout_key: draws the dropped features; None drops none (see `easydel.layers.lora.with_dropout`).

    References:
      Hu et al., LoRA, 2021; Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023.
    """

    a: Float[Array, "*stack rank in"]
    b: Float[Array, "*stack out rank"]
    alpha: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    use_rslora: bool = eqx.field(static=True)
    dropout_key: PRNGKeyArray | None = None

    @property
    def rank(self) -> int:
        """``r``, the rows of the first factor."""
        return self.a.shape[-2]

    @property
    def matrix_size(self) -> int:
        """Entries of both factors."""
        return self.a.size + self.b.size

    @property
    def scale(self) -> float:
        """``s``, the factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def delta(self) -> Float[Array, "*stack out in"]:
        """The matrix that the adapter adds to the weight, float32."""
        return self.scale * jnp.matmul(self.b, self.a, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        """``x @ delta.T`` in the dtype of `x`, after dropout."""
        if self.dropout_key is not None:
            kept = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return (self.scale * (x @ self.a.astype(x.dtype).T)) @ self.b.astype(x.dtype).T


class QuantizedWeight(eqx.Module):
    """A weight as integers from -127 to 127 with one scale per output channel, symmetric around zero.

    .. math:: W_{oi} \\approx s_o q_{oi}, \\quad s_o = \\max_i |W_{oi}| / 127

    No entry is off by more than half its row's scale. One scale per row, rather than per block of a row, can be applied
    after the product: the integers are exact in bfloat16, so no rounded copy of the weight is made.

    Attributes:
      values: the integers.
      scale: their factor, float32.
      dtype: dtype of the weight they were made from, static.

    References:
      Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022, section 2 (row-wise
      absmax quantisation).
    """

    values: Int8[Array, "*stack out in"]
    scale: Float[Array, "*stack out"]
    dtype: np.dtype = eqx.field(static=True)

    @classmethod
    def of(cls, weight: Float[Array, "*stack out in"]) -> QuantizedWeight:
        """The nearest 8-bit weight."""
        largest = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=-1)
        scale = largest / LARGEST_VALUE
        # Rows of zeros, or of numbers so small that their scale underflows, become zeros.
        scale = jnp.where(scale > 0, scale, 1.0)
        values = jnp.round(weight.astype(jnp.float32) / scale[..., None])
        return cls(values.astype(jnp.int8), scale, np.dtype(weight.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    def dequantize(self) -> Float[Array, "*stack out in"]:
        """The weight that integers and scales stand for, float32."""
        return self.values.astype(jnp.float32) * self.scale[..., None]

    def product(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        """``x @ weight.T`` in the dtype of `x`."""
        return (x @ self.values.astype(x.dtype).T) * self.scale.astype(x.dtype)


class Linear(eqx.Module):
    """A linear layer ``x @ weight.T + bias``, with the weight as Hugging Face stores it and an optional adapter.

    Attributes:
      weight: in a float dtype, or in 8 bits.
      bias: None where the family has none.
      lora: adapter whose output is added; None without one.
    """

    weight: Float[Array, "*stack out in"] | QuantizedWeight
    bias: Float[Array, "*stack out"] | None
    lora: LoraAdapter | None = None

    @property
    def matrix_size(self) -> int:
        """Entries of the matrices that an input meets: the weight, and the adapter's factors."""
        return math.prod(self.weight.shape) + (0 if self.lora is None else self.lora.matrix_size)

    @classmethod
    def init(cls, key: PRNGKeyArray, size_in: int, size_out: int, std: float, bias: bool) -> Linear:
        """A layer with a random weight of standard deviation `std`, and a bias of zeros where `bias` is True."""
        return cls(std * jax.random.normal(key, (size_out, size_in)), jnp.zeros(size_out) if bias else None)

    def __call__(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        """The layer's output in the dtype of `x`.

        Example:
          >>> Linear(jnp.array([[1.0, 2.0]]), None)(jnp.array([[3.0, 4.0]])).tolist()
          [[11.0]]
        """
        if isinstance(self.weight, QuantizedWeight):
            y = self.weight.product(x)
        else:
            y = x @ self.weight.astype(x.dtype).T
        if self.bias is not None:
            y = y + self.bias.astype(x.dtype)
        return y if self.lora is None else y + self.lora(x)
