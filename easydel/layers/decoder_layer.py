"""Put attention, MLP and norms together into a layer; each class has one order of the norms."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, TypeVar

import equinox as eqx
from jaxtyping import Array, Bool, Float

from easydel.infra.language_model import AuxiliarySums
from easydel.layers.attention import Attend, SelfAttention
from easydel.layers.mlp import MLP
from easydel.layers.norm import RMSNorm
from easydel.layers.rotary import Angles

T = TypeVar("T")


class DecoderLayer(eqx.Module):
    """Attention and an MLP with residual connections; norms have the names that Hugging Face's families give them.

    Attributes:
      self_attn: mixes tokens.
      mlp: transforms each token by itself.
    """

    if TYPE_CHECKING:  # every subclass declares these fields in the order in which its norms and they are applied
        self_attn: SelfAttention
        mlp: MLP

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "tokens hidden"], angles: Angles, attend: Attend[T], is_token: Bool[Array, " tokens"]
    ) -> tuple[Float[Array, "tokens hidden"], T, AuxiliarySums]:
        """Run the layer.

        Args:
          x: the layer's input.
          angles: rotary angles of every token's position.
          attend: computes attention from queries, keys and values.
          is_token: False for padding.

        Returns:
          The layer's output, the second value that `attend` returned, and the sums of auxiliary losses.
        """


class PreNormLayer(DecoderLayer):
    """Norms before attention and before the MLP (Llama, Mistral, Qwen).

    .. math:: x' = x + s A(N_1 x), \\qquad y = x' + s M(N_2 x')

    Attributes:
      residual_scale: ``s``, static; 1 in most families.
    """

    input_layernorm: RMSNorm
    self_attn: SelfAttention
    post_attention_layernorm: RMSNorm
    mlp: MLP
    residual_scale: float = eqx.field(static=True, default=1.0)

    def __call__(
        self, x: Float[Array, "tokens hidden"], angles: Angles, attend: Attend[T], is_token: Bool[Array, " tokens"]
    ) -> tuple[Float[Array, "tokens hidden"], T, AuxiliarySums]:
        attended, kept = self.self_attn(self.input_layernorm(x), angles, attend)
        x = x + self._scaled(attended)
        out, auxiliary = self.mlp(self.post_attention_layernorm(x), is_token)
        return x + self._scaled(out), kept, auxiliary

    def _scaled(self, x: Array) -> Array:
        return x if self.residual_scale == 1 else x * self.residual_scale


class PostNormLayer(DecoderLayer):
    """Norms after attention and after the MLP, inside the residual connections (OLMo 2).

    .. math:: x' = x + N_1 A(x), \\qquad y = x' + N_2 M(x')
    """

    self_attn: SelfAttention
    post_attention_layernorm: RMSNorm
    mlp: MLP
    post_feedforward_layernorm: RMSNorm

    def __call__(
        self, x: Float[Array, "tokens hidden"], angles: Angles, attend: Attend[T], is_token: Bool[Array, " tokens"]
    ) -> tuple[Float[Array, "tokens hidden"], T, AuxiliarySums]:
        attended, kept = self.self_attn(x, angles, attend)
        x = x + self.post_attention_layernorm(attended)
        out, auxiliary = self.mlp(x, is_token)
        return x + self.post_feedforward_layernorm(out), kept, auxiliary


class SandwichNormLayer(DecoderLayer):
    """Norms on both sides of attention and of the MLP (Gemma 2 and 3).

    .. math:: x' = x + N_2 A(N_1 x), \\qquad y = x' + N_4 M(N_3 x')
    """

    input_layernorm: RMSNorm
    self_attn: SelfAttention
    post_attention_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm
    mlp: MLP
    post_feedforward_layernorm: RMSNorm

    def __call__(
        self, x: Float[Array, "tokens hidden"], angles: Angles, attend: Attend[T], is_token: Bool[Array, " tokens"]
    ) -> tuple[Float[Array, "tokens hidden"], T, AuxiliarySums]:
        attended, kept = self.self_attn(self.input_layernorm(x), angles, attend)
        x = x + self.post_attention_layernorm(attended)
        out, auxiliary = self.mlp(self.pre_feedforward_layernorm(x), is_token)
        return x + self.post_feedforward_layernorm(out), kept, auxiliary
