"""A linear layer and the low-rank adapter that may sit beside its weight."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from easydel.layers.quantized_weight import QuantizedWeight


class LoraAdapter(eqx.Module):
    """A trainable product of two thin matrices, added to a weight that stays as it is.

    .. math:: \\Delta W = s B A, \\quad s = \\alpha / r \\text{ or, with rsLoRA, } \\alpha / \\sqrt{r}

    Attributes:
      a: the first factor, float32.
      b: the second factor, float32; zeros at the start, so that a fresh adapter changes nothing.
      alpha: numerator of the scale, static.
      dropout: share of the input's features that training leaves out, static.
      use_rslora: divide by the root of the rank, static.
      dropout_key: what the features left out are drawn from; None leaves out none (see `lora.with_dropout`).

    References:
      Hu et al., LoRA, 2021; Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023.
    """

    a: Float[Array, "*layers rank in"]
    b: Float[Array, "*layers out rank"]
    alpha: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    use_rslora: bool = eqx.field(static=True)
    dropout_key: PRNGKeyArray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def delta(self) -> Float[Array, "*layers out in"]:
        """What it adds to the weight, float32."""
        return self.scale * jnp.matmul(self.b, self.a, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        if self.dropout_key is not None:
            kept = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return (self.scale * (x @ self.a.astype(x.dtype).T)) @ self.b.astype(x.dtype).T


class Linear(eqx.Module):
    """``x @ weight.T + bias``, the weight as Hugging Face stores it, plus an adapter where there is one."""

    weight: Float[Array, "*layers out in"] | QuantizedWeight
    bias: Float[Array, "*layers out"] | None
    lora: LoraAdapter | None = None

    @classmethod
    def init(cls, key: PRNGKeyArray, size_in: int, size_out: int, std: float, bias: bool) -> Linear:
        return cls(std * jax.random.normal(key, (size_out, size_in)), jnp.zeros(size_out) if bias else None)

    def __call__(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        if isinstance(self.weight, QuantizedWeight):
            y = self.weight.product(x)
        else:
            y = x @ self.weight.astype(x.dtype).T
        if self.bias is not None:
            y = y + self.bias.astype(x.dtype)
        return y if self.lora is None else y + self.lora(x)
