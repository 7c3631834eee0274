"""Compute a digest of all that decides what a model computes; that of the weights is computed on the devices."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

from easydel.infra.language_model import LanguageModel
from easydel.infra.mesh import parameter_path
from easydel.layers.lora import adapters

LANES = 4
GOLDEN = 0x9E3779B9


def model_digest(model: LanguageModel) -> dict[str, Any]:
    """Describe all that decides what a model computes, in JSON types: family, shape, dtype, adapters, weights."""
    every_field = dataclasses.asdict(model.config)
    shape = {name: every_field[name] for name in model.config.compared_fields}
    settings = {path: [adapter.alpha, adapter.use_rslora, adapter.dropout] for path, adapter in adapters(model).items()}
    return {
        "family": model.model_type,
        "shape": shape,
        "dtype": str(model.dtype),
        "adapters": settings,
        "weights": fingerprint(model),
    }


def fingerprint(tree: PyTree) -> str:
    """Hex digest of every array of a pytree: paths, shapes, dtypes and each bit of the values.

    Hashes of the values are summed on the devices in wrapping 32-bit integers, so the digest is the same on any mesh
    and only a few bytes leave a device. It tells weights apart; it does not protect against somebody who forges them.

    Example:
      >>> fingerprint({"w": jnp.array([1.0, 2.0])}) == fingerprint({"w": jnp.array([2.0, 1.0])})
      False
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    digest = hashlib.sha256()
    for (path, leaf), lanes in zip(leaves, sums):
        digest.update(json.dumps([parameter_path(path), list(leaf.shape), str(leaf.dtype)]).encode())
        digest.update(np.asarray(lanes, "<u4").tobytes())
    return digest.hexdigest()


@jax.jit
def _sums(leaves: list[Array]) -> list[UInt32[Array, " lanes"]]:
    return [_sum_of(leaf) for leaf in leaves]


def _sum_of(leaf: Array) -> UInt32[Array, " lanes"]:
    """The sum over all elements of a hash of value and position, one for each of several seeds."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * min(4, leaf.dtype.itemsize)}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    hashed = _mix(position + jnp.uint32(GOLDEN)) ^ bits
    lanes = [_mix(hashed + jnp.uint32(seed * GOLDEN & 0xFFFFFFFF)) for seed in range(LANES)]
    # One reduction, not four: four would each read `hashed` from memory, of which it takes as much as the weights.
    sums = jax.lax.reduce(lanes, [jnp.uint32(0)] * LANES, _add, tuple(range(bits.ndim)))
    return jnp.stack(sums)


def _add(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
    return [x + y for x, y in zip(left, right)]


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Spread every bit over the whole word, by the last steps of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
