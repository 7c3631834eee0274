"""Rotary position embedding and its frequency scalings."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from easydel.infra.rotary_config import RotaryScaling


def rotary_frequencies(head_dim: int, theta: float, scaling: RotaryScaling | None) -> np.ndarray:
    """Angular frequency of each pair of head dimensions, radians a position, float32 ``[head_dim / 2]``."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.rope_type == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (keep * frequencies + (1 - keep) * frequencies / scaling.factor).astype(np.float32)


def rotary_angles(
    position_ids: Int[Array, ...], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "... half"], Float[Array, "... half"]]:
    """Cosine and sine of every position's angles, float32."""
    angles = position_ids[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "tokens heads head_dim"], cos: Float[Array, "tokens half"], sin: Float[Array, "tokens half"]
) -> Float[Array, "tokens heads head_dim"]:
    """Turn queries or keys by their positions' angles; dimension i pairs with i + head_dim / 2 (RoFormer, 2021)."""
    cos, sin = cos[:, None, :].astype(x.dtype), sin[:, None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
