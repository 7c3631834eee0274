"""Rotate queries and keys by their positions, at frequencies that a config may scale."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from easydel.infra.rotary_config import RotaryScaling, RotaryTable


class Angles(NamedTuple):
    """Cosine and sine of every token's rotary angles, float32, on a leading axis of tables where layers choose one."""

    cos: Float[Array, "*tables tokens half"]
    sin: Float[Array, "*tables tokens half"]


def rotary_frequencies(head_dim: int, theta: float, scaling: RotaryScaling | None) -> np.ndarray:
    """Angular frequency of each pair of head dimensions, in radians per position, float32 ``[head_dim / 2]``.

    .. math:: \\omega_i = \\theta^{-2i / d}, \\qquad i = 0, \\dots, d/2 - 1

    Frequencies are then scaled as `RotaryScaling` says.

    References:
      Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, eq. 15.

    Example:
      >>> rotary_frequencies(4, 10000.0, None).tolist()
      [1.0, 0.009999999776482582]
    """
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.rope_type == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (keep * frequencies + (1 - keep) * frequencies / scaling.factor).astype(np.float32)


def rotary_angles(position_ids: Int[Array, " tokens"], frequencies: Float[np.ndarray, " half"]) -> Angles:
    """Cosine and sine of every position's angles, float32."""
    angles = position_ids[..., None].astype(jnp.float32) * frequencies
    return Angles(jnp.cos(angles), jnp.sin(angles))


def table_angles(table: RotaryTable | None, position_ids: Int[Array, " tokens"], head_dim: int) -> Angles:
    """The angles that a table gives to positions; a table of None rotates nothing: all angles are zero.

    Example:
      >>> table_angles(None, jnp.array([0, 5]), head_dim=4).cos.tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    if table is None:
        return rotary_angles(position_ids, np.zeros(head_dim // 2, np.float32))
    return rotary_angles(position_ids, rotary_frequencies(head_dim, table.theta, table.scaling))


def rotate(x: Float[Array, "tokens heads head_dim"], angles: Angles) -> Float[Array, "tokens heads head_dim"]:
    """Rotate queries or keys by their positions' angles; dimension i pairs with i + head_dim / 2 (RoFormer, 2021)."""
    cos, sin = (part[:, None, :].astype(x.dtype) for part in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
