"""Transform each token by itself: the MLP of a layer."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from easydel.infra.language_model import AuxiliarySums
from easydel.layers.linear import Linear

Activation = Literal["silu", "gelu_pytorch_tanh"]
ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(eqx.Module):
    """The sublayer after attention: a dense MLP, or a mixture of experts."""

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "tokens hidden"], is_token: Bool[Array, " tokens"]
    ) -> tuple[Float[Array, "tokens hidden"], AuxiliarySums]:
        """The output, and the sums of auxiliary losses over the tokens where `is_token` is True: all but padding."""


class GatedMLP(MLP):
    """A dense MLP with a gate.

    .. math:: y = W_d (a(W_g x) \\odot W_u x)

    Attributes:
      activation: ``a``, static.

    References:
      Shazeer, GLU Variants Improve Transformer, 2020.
    """

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    activation: Activation = eqx.field(static=True, default="silu")

    @classmethod
    def init(
        cls,
        key: PRNGKeyArray,
        hidden_size: int,
        intermediate_size: int,
        std: float,
        *,
        bias: bool = False,
        activation: Activation = "silu",
    ) -> GatedMLP:
        """Random weights with standard deviation `std`, and biases of zeros where `bias` is True."""
        gate, up, down = jax.random.split(key, 3)
        return cls(
            gate_proj=Linear.init(gate, hidden_size, intermediate_size, std, bias),
            up_proj=Linear.init(up, hidden_size, intermediate_size, std, bias),
            down_proj=Linear.init(down, intermediate_size, hidden_size, std, bias),
            activation=activation,
        )

    def __call__(
        self, x: Float[Array, "tokens hidden"], is_token: Bool[Array, " tokens"]
    ) -> tuple[Float[Array, "tokens hidden"], AuxiliarySums]:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)), {}
