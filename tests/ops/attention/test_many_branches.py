"""A tree of many branches attends as its separate sequences do, in every backend, and nothing leaks."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.ops.attention.cached import cached_attention
from easydel.ops.attention.cudnn import tree_attention_cudnn
from easydel.ops.attention.inputs import DEFAULT_OPTIONS, AttentionOptions, TokenIds
from easydel.ops.attention.tpu import tree_attention_tpu
from easydel.ops.attention.xla import tree_attention_xla
from tests.ops.attention.forest import values, with_gradients

HEADS, KV_HEADS, SIZE, TRUNK = 2, 1, 8, 21


def trees(branches: int) -> TokenIds:
    """Two trees of so many branches in one row of several blocks, then padding."""
    sizes = np.array([TRUNK, *(3 + 4 * (np.arange(branches) % 2))])
    branch = np.repeat(np.arange(branches + 1), sizes)
    position = np.concatenate([np.arange(TRUNK), *(TRUNK + np.arange(size) for size in sizes[1:])])
    ids = np.stack([np.ones_like(branch), branch, position])
    other = ids + np.array([[1], [0], [0]])
    return TokenIds(*jnp.array(np.concatenate([ids, other, np.zeros((3, 9), int)], axis=1))[:, None])


def over_the_whole_mask(q, k, v, ids, options):
    return cached_attention(q, k, v, ids, options, jnp.int32(0))


@pytest.fixture
def cudnn(monkeypatch):
    """The call to cuDNN with its name taken out, so that XLA answers it."""
    attend = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation, **rest: attend(*args, **rest))
    return tree_attention_cudnn


@pytest.fixture(params=["xla", "tpu", "cudnn", "cached"])
def run(request):
    if request.param == "cudnn":
        return request.getfixturevalue("cudnn")
    return {
        "xla": tree_attention_xla,
        "tpu": partial(tree_attention_tpu, interpret=True),
        "cached": over_the_whole_mask,
    }[request.param]


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        DEFAULT_OPTIONS,
        AttentionOptions(window=13),
        AttentionOptions(scale=0.5, soft_cap=1.5),
        AttentionOptions(13, 0.5, 1.5),
    ],
    ids=["plain", "window", "soft-cap", "window and soft-cap"],
)


def attention_of_one_sequence(q, k, v, options: AttentionOptions):
    """Causal attention of ``[length, heads, size]``, written out."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * (SIZE**-0.5 if options.scale is None else options.scale)
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    back = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
    scores = jnp.where((back >= 0) & (back < (options.window or len(q))), scores, -jnp.inf)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), v)


def path_by_path(q, k, v, ids: TokenIds, options: AttentionOptions):
    """Each path from trunk to leaf by itself, written back to the row; padding gives zeros."""
    segment, branch, _ = (np.array(x[0]) for x in ids)
    out = jnp.zeros(q.shape[1:])
    for tree in range(1, segment.max() + 1):
        for leaf in range(1, branch.max() + 1):
            path = np.flatnonzero((segment == tree) & ((branch == 0) | (branch == leaf)))
            out = out.at[path].set(attention_of_one_sequence(q[0, path], k[0, path], v[0, path], options))
    return out[None]


def inputs(ids: TokenIds):
    *arrays, cotangent = values(1, ids.segment.shape[1], HEADS, KV_HEADS, SIZE)
    return *arrays, cotangent * (ids.segment > 0)[..., None, None]


@cache
def expected_gradients(branches: int, options: AttentionOptions):
    ids = trees(branches)
    return with_gradients(path_by_path, jit=False)(*inputs(ids), ids, options)


@OPTIONS
@pytest.mark.parametrize("branches", [5, 40])
def test_a_tree_attends_as_its_separate_sequences_do_forward_and_backward(run, branches, options):
    if run is tree_attention_cudnn and options.soft_cap is not None:
        pytest.skip("cuDNN has no soft-cap, and is refused for it")
    ids = trees(branches)
    found = with_gradients(run)(*inputs(ids), ids, options)
    expected = expected_gradients(branches, options)
    is_token = np.array(ids.segment[0] > 0)
    for name, x, y in zip(("out", "q", "k", "v"), found, expected):
        np.testing.assert_allclose(x[:, is_token], y[:, is_token], rtol=1e-5, atol=1e-5, err_msg=name)


@OPTIONS
@pytest.mark.parametrize("branches", [5, 40])
def test_a_changed_token_moves_only_its_own_branch_or_for_a_trunk_its_own_tree(run, branches, options):
    if run is tree_attention_cudnn and options.soft_cap is not None:
        pytest.skip("cuDNN has no soft-cap, and is refused for it")
    ids = trees(branches)
    q, k, v, _ = values(1, ids.segment.shape[1], HEADS, KV_HEADS, SIZE)
    attend = jax.jit(lambda k, v: run(q, k, v, ids, options))
    before = attend(k, v)
    for segment, branch in [(1, 0), (1, 1), (1, branches // 2), (1, branches), (2, 0), (2, 2), (2, branches), (0, 0)]:
        shift = 3.0 * ((ids.segment == segment) & (ids.branch == branch))[..., None, None]
        moved = np.flatnonzero(np.abs(attend(k + shift, v + shift) - before).max(axis=(0, 2, 3)) > 0)
        may_move = (ids.segment == segment) & ((ids.branch == branch) | (branch == 0))
        assert moved.size and set(moved) <= set(np.flatnonzero(may_move[0]))
