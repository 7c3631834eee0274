"""Hold what attention needs beside queries, keys and values: the ids of tokens, and options of the scores."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


class TokenIds(NamedTuple):
    """Tree, branch and position of every token of some rows, int32.

    Attributes:
      segment: tree of each token, from 1; 0 is padding, or an empty slot of a cache.
      branch: branch of each token within its tree: 0 is the trunk, which all branches see; branches count from 1.
      position: position of each token in its own sequence, from 0; a branch continues from the end of the trunk.
    """

    segment: Int[Array, "rows length"]
    branch: Int[Array, "rows length"]
    position: Int[Array, "rows length"]

    @classmethod
    def of_sequences(cls, position: Int[Array, "rows length"]) -> TokenIds:
        """One plain sequence per row; a position of -1 marks an empty slot.

        Example:
          >>> TokenIds.of_sequences(jnp.array([[-1, 0, 1, -1]])).segment.tolist()
          [[0, 1, 1, 0]]
        """
        return cls((position >= 0).astype(jnp.int32), jnp.zeros_like(position), position)


@partial(jax.tree_util.register_dataclass, data_fields=["window"], meta_fields=["scale", "soft_cap"])
@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Window, scale and soft-cap of attention; a pytree whose only leaf is the window.

    Attributes:
      window: a query sees keys fewer than this many positions back; None sees all. It may be traced, so that it can
        differ from layer to layer of a scan.
      scale: factor of the dot product of query and key; None is ``1 / sqrt(head_dim)``.
      soft_cap: ``c`` of ``s -> c tanh(s / c)``, applied to scaled scores; None leaves them as they are.
    """

    window: int | Int[Array, ""] | None = None
    scale: float | None = None
    soft_cap: float | None = None

    def scale_of(self, head_dim: int) -> float:
        """The factor of the dot product for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale


DEFAULT_OPTIONS = AttentionOptions()


def pad_rows(x: Shaped[Array, "rows length *rest"], multiple: int) -> Shaped[Array, "rows padded *rest"]:
    """Pad rows with zeros to a length that is a multiple; zeros are segment 0, so the added tokens are padding too.

    Example:
      >>> pad_rows(jnp.array([[1, 1, 2]]), 4).tolist()
      [[1, 1, 2, 0]]
    """
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))
