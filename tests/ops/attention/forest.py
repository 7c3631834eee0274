"""Rows of random trees, and the gradients of an attention over them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from easydel.ops.attention.xla import tree_attention_xla


def forest(rows: int, length: int, longest: int = 60, seed: int = 0) -> tuple[Array, Array, Array]:
    """``segment_ids, branch_ids, position_ids`` of rows full of trees, with padding behind them."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((3, rows, length), np.int32)
    for row in range(rows):
        start, segment = 0, 0
        while True:
            prompt, chosen, rejected = rng.integers(1, longest, 3)
            stop = start + prompt + chosen + rejected
            if stop > length:
                break
            segment += 1
            ids[0, row, start:stop] = segment
            ids[1, row, start:stop] = np.repeat([0, 1, 2], [prompt, chosen, rejected])
            after = np.arange(prompt, prompt + max(chosen, rejected))
            ids[2, row, start:stop] = np.concatenate([np.arange(prompt), after[:chosen], after[:rejected]])
            start = stop
    return tuple(jnp.array(x) for x in ids)


def values(rows: int, length: int, heads: int, kv_heads: int, size: int, dtype=jnp.float32) -> tuple[Array, ...]:
    """Queries, keys, values and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(
        jax.random.normal(key, (rows, length, count, size)).astype(dtype)
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads))
    )


def with_gradients(form: Callable[..., Array], *, jit: bool = True) -> Callable[..., tuple[Array, ...]]:
    """``(q, k, v, cotangent, *rest)`` to the attended values and the gradients of q, k and v."""

    def run(q, k, v, cotangent, *rest):
        out, pull_back = jax.vjp(lambda q, k, v: form(q, k, v, *rest), q, k, v)
        return out, *pull_back(cotangent)

    return jax.jit(run) if jit else run


def assert_agrees_with_xla(form: Callable[..., Array], arrays: tuple[Array, ...], *rest, tolerance: float = 1e-5):
    """Outputs and gradients of a form equal those of the XLA form, entry by entry."""
    found, expected = (with_gradients(f)(*arrays, *rest) for f in (form, tree_attention_xla))
    for name, x, y in zip(("out", "q", "k", "v"), found, expected):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)
