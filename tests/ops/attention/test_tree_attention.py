"""`tree_attention` against attention over each path of each tree by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.ops.attention.inputs import AttentionOptions, TokenIds
from easydel.ops.attention.mask import tree_mask
from easydel.ops.attention.tree_attention import tree_attention

HEADS, KV_HEADS, SIZE = 4, 2, 8
# Two trees in one row, then padding: (segment, branch, tokens).
PARTS = [(1, 0, 5), (1, 1, 3), (1, 2, 4), (2, 0, 6), (2, 1, 2), (2, 2, 7), (0, 0, 5)]
STARTS = {(1, 1): 5, (1, 2): 5, (2, 1): 6, (2, 2): 6}


def layout():
    segments = np.concatenate([np.full(n, s) for s, _, n in PARTS])[None]
    branches = np.concatenate([np.full(n, b) for _, b, n in PARTS])[None]
    positions = np.concatenate([np.arange(n) + STARTS.get((s, b), 0) for s, b, n in PARTS])[None]
    return TokenIds(*map(jnp.array, (segments, branches, positions)))


def inputs(length: int):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(jax.random.normal(key, (1, length, h, SIZE)) for key, h in zip(keys, heads))


def attention_of_one_sequence(q, k, v, window):
    """Plain causal attention of [length, heads, size]."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(SIZE)
    back = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
    scores = jnp.where((back >= 0) & (back < (window or len(q))), scores, -jnp.inf)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize("window", [None, 3])
def test_each_path_from_prompt_to_leaf_attends_as_if_it_were_alone(window):
    ids = layout()
    q, k, v = inputs(ids.segment.shape[1])
    out = tree_attention(q, k, v, ids, AttentionOptions(window))
    for segment in (1, 2):
        for branch in (1, 2):
            path = np.flatnonzero((ids.segment[0] == segment) & ((ids.branch[0] == 0) | (ids.branch[0] == branch)))
            expected = attention_of_one_sequence(q[0, path], k[0, path], v[0, path], window)
            np.testing.assert_allclose(out[0, path], expected, rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_the_dense_mask():
    ids = layout()
    q, k, v = inputs(ids.segment.shape[1])
    cotangent = jax.random.normal(jax.random.key(7), q.shape)
    mask = tree_mask(ids)

    def dense(q, k, v):
        return jnp.vdot(jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]), cotangent)

    def tree(q, k, v):
        return jnp.vdot(tree_attention(q, k, v, ids), cotangent)

    for gradient, expected in zip(jax.grad(tree, (0, 1, 2))(q, k, v), jax.grad(dense, (0, 1, 2))(q, k, v)):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_nothing_leaks_between_pairs_or_between_branches():
    """Keys and values of one part change; only queries that may see it move."""
    ids = layout()
    q, k, v = inputs(ids.segment.shape[1])
    before = tree_attention(q, k, v, ids)
    for segment, branch in {(s, b) for s, b, _ in PARTS}:
        part = (ids.segment == segment) & (ids.branch == branch)
        shift = 3.0 * part[..., None, None]
        after = tree_attention(q, k + shift, v + shift, ids)
        moved = np.flatnonzero(np.abs(after - before).max(axis=(0, 2, 3)) > 0)
        may_move = (ids.segment == segment) & ((ids.branch == branch) | (branch == 0))
        assert moved.size and set(moved) <= set(np.flatnonzero(may_move[0]))


def test_rows_longer_than_a_block_give_the_same(monkeypatch):
    ids = layout()
    q, k, v = inputs(ids.segment.shape[1])
    whole = tree_attention(q, k, v, ids, AttentionOptions(4))
    monkeypatch.setattr("easydel.ops.attention.xla.BLOCK", 5)
    np.testing.assert_allclose(tree_attention(q, k, v, ids, AttentionOptions(4)), whole, rtol=1e-5, atol=1e-6)


def test_a_window_may_differ_from_layer_to_layer_under_scan():
    ids = layout()
    q, k, v = inputs(ids.segment.shape[1])
    windows = jnp.array([2, 1000])
    scanned = jax.lax.map(lambda w: tree_attention(q, k, v, ids, AttentionOptions(w)), windows)
    np.testing.assert_allclose(scanned[0], tree_attention(q, k, v, ids, AttentionOptions(2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scanned[1], tree_attention(q, k, v, ids), rtol=1e-5, atol=1e-6)
