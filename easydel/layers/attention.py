"""Project to queries, keys and values and back, around an attention function that the caller passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from easydel.layers.linear import Linear
from easydel.layers.norm import RMSNorm
from easydel.layers.rotary import Angles, rotate

T = TypeVar("T")
# (queries, keys, values), each [tokens, heads, head_dim] -> attention output, and whatever the caller wants back.
Attend = Callable[[Array, Array, Array], tuple[Array, T]]


class SelfAttention(eqx.Module):
    """Self-attention: projections, norms of queries and keys, rotary embedding, and the output projection.

    Attributes:
      q_proj, k_proj, v_proj, o_proj: projections to queries, keys and values, and of the attention output.
      q_norm, k_norm: norms of queries and keys before they are rotated; None where a family has none.
      head_dim: size of a head, static.
      norm_width: whether the norms see each head by itself or the whole projection, static.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    head_dim: int = eqx.field(static=True)
    norm_width: Literal["head", "projection"] = eqx.field(static=True, default="head")

    @classmethod
    def init(
        cls,
        key: PRNGKeyArray,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        std: float,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        norm: Callable[[int], RMSNorm] | None = None,
        norm_width: Literal["head", "projection"] = "head",
    ) -> SelfAttention:
        """A layer with random projections.

        Args:
          key: draws the weights.
          hidden_size: features of a token.
          heads, kv_heads: query heads, and the key and value heads that they share.
          head_dim: size of a head.
          std: standard deviation of the weights.
          qkv_bias, output_bias: whether the projections have biases.
          norm: makes a norm of a given size for queries and keys; None leaves them as they are.
          norm_width: whether a norm sees each head by itself or the whole projection.
        """
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        queries, keys_values = heads * head_dim, kv_heads * head_dim
        is_per_head = norm_width == "head"
        return cls(
            q_proj=Linear.init(q_key, hidden_size, queries, std, qkv_bias),
            k_proj=Linear.init(k_key, hidden_size, keys_values, std, qkv_bias),
            v_proj=Linear.init(v_key, hidden_size, keys_values, std, qkv_bias),
            o_proj=Linear.init(o_key, queries, hidden_size, std, output_bias),
            q_norm=norm(head_dim if is_per_head else queries) if norm else None,
            k_norm=norm(head_dim if is_per_head else keys_values) if norm else None,
            head_dim=head_dim,
            norm_width=norm_width,
        )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.k_proj.weight.shape[-2] // self.head_dim

    def __call__(
        self, x: Float[Array, "tokens hidden"], angles: Angles, attend: Attend[T]
    ) -> tuple[Float[Array, "tokens hidden"], T]:
        """Attend as `attend` does; returns the layer's output, and the second value that `attend` returned.

        Args:
          x: the layer's normalised input.
          angles: of every token's position.
          attend: gets queries, keys and values, ``[tokens, heads, head_dim]``.
        """

        def heads(projected: Array, norm: RMSNorm | None) -> Array:
            if norm is not None and self.norm_width == "projection":
                projected = norm(projected)
            projected = projected.reshape(x.shape[0], -1, self.head_dim)
            return norm(projected) if norm is not None and self.norm_width == "head" else projected

        q, k, v = heads(self.q_proj(x), self.q_norm), heads(self.k_proj(x), self.k_norm), heads(self.v_proj(x), None)
        attended, kept = attend(rotate(q, angles), rotate(k, angles), v)
        return self.o_proj(attended.reshape(x.shape[0], -1)), kept
