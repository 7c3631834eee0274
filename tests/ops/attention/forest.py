"""Rows of random trees, and the gradients of an attention over them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from easydel.ops.attention.inputs import DEFAULT_OPTIONS, AttentionOptions, TokenIds
from easydel.ops.attention.tree_attention import Run
from easydel.ops.attention.xla import tree_attention_xla


def forest(rows: int, length: int, longest: int = 60, seed: int = 0, branches: int = 2) -> TokenIds:
    """Rows full of trees, with padding behind them; trunks and branches have 1 to ``longest - 1`` tokens."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((3, rows, length), np.int32)
    for row in range(rows):
        start, segment = 0, 0
        while True:
            trunk, *others = sizes = rng.integers(1, longest, 1 + branches)
            stop = start + sum(sizes)
            if stop > length:
                break
            segment += 1
            ids[0, row, start:stop] = segment
            ids[1, row, start:stop] = np.repeat(np.arange(1 + branches), sizes)
            ids[2, row, start:stop] = np.concatenate(
                [np.arange(trunk), *(np.arange(trunk, trunk + size) for size in others)]
            )
            start = stop
    return TokenIds(*map(jnp.array, ids))


def values(rows: int, length: int, heads: int, kv_heads: int, size: int, dtype=jnp.float32) -> tuple[Array, ...]:
    """Queries, keys, values and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(
        jax.random.normal(key, (rows, length, count, size)).astype(dtype)
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads))
    )


def with_gradients(run: Callable[..., Array], *, jit: bool = True) -> Callable[..., tuple[Array, ...]]:
    """``(q, k, v, cotangent, ids, options)`` to the attended values and the gradients of q, k and v."""

    def gradients(q, k, v, cotangent, ids, options=DEFAULT_OPTIONS):
        out, pull_back = jax.vjp(lambda q, k, v: run(q, k, v, ids, options), q, k, v)
        return out, *pull_back(cotangent)

    return jax.jit(gradients) if jit else gradients


def assert_agrees_with_xla(
    run: Run,
    arrays: tuple[Array, ...],
    ids: TokenIds,
    options: AttentionOptions = DEFAULT_OPTIONS,
    tolerance: float = 1e-5,
):
    """Outputs and gradients of a backend equal those of XLA, entry by entry."""
    found, expected = (with_gradients(f)(*arrays, ids, options) for f in (run, tree_attention_xla))
    for name, x, y in zip(("out", "q", "k", "v"), found, expected):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)
