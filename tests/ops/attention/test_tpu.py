"""The TPU kernels, in JAX's interpreter, against XLA."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.ops.attention.blocks import BlockSizes
from easydel.ops.attention.inputs import DEFAULT_OPTIONS, AttentionOptions, TokenIds
from easydel.ops.attention.tpu import choose_sizes, tree_attention_tpu
from easydel.ops.attention.xla import tree_attention_xla
from tests.ops.attention.forest import assert_agrees_with_xla, forest, values, with_gradients

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 2, 300, 4, 2, 16
interpreted = partial(tree_attention_tpu, interpret=True, sizes=BlockSizes(128, 128))


@pytest.fixture
def ids():
    return forest(ROWS, LENGTH)


@pytest.fixture
def arrays():
    return values(ROWS, LENGTH, HEADS, KV_HEADS, SIZE)


def test_outputs_and_gradients_equal_those_of_xla(ids, arrays):
    assert_agrees_with_xla(interpreted, arrays, ids)


def test_a_window_may_be_a_number_or_an_array_that_is_traced(ids, arrays):
    assert_agrees_with_xla(interpreted, arrays, ids, AttentionOptions(jnp.int32(20)))
    traced = with_gradients(interpreted)(*arrays, ids, AttentionOptions(jnp.int32(20)))
    static = with_gradients(interpreted, jit=False)(*arrays, ids, AttentionOptions(20))
    for x, y in zip(traced, static):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("sizes", [BlockSizes(128, 384), BlockSizes(384, 128)], ids=str)
def test_blocks_of_queries_and_of_keys_may_differ(ids, arrays, sizes):
    assert_agrees_with_xla(partial(interpreted, sizes=sizes), arrays, ids)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (3, 1)])
def test_heads_may_share_keys_or_not(ids, heads, kv_heads):
    one_row = TokenIds(*(x[:1] for x in ids))
    assert_agrees_with_xla(interpreted, values(1, LENGTH, heads, kv_heads, SIZE), one_row)


def test_bfloat16_is_about_as_near_to_float32_as_xla_is(ids):
    """Weights are rounded before they are normalised, and XLA on CPU does not round them at all."""
    arrays = values(ROWS, LENGTH, HEADS, KV_HEADS, SIZE, jnp.bfloat16)
    exact = with_gradients(tree_attention_xla)(*(x.astype(jnp.float32) for x in arrays), ids)
    ours, xla = (with_gradients(run)(*arrays, ids) for run in (interpreted, tree_attention_xla))
    for x, y, truth in zip(ours, xla, exact):
        assert x.dtype == jnp.bfloat16
        error, expected = (float(jnp.linalg.norm(z.astype(jnp.float32) - truth)) for z in (x, y))
        assert error < 2 * expected


def test_nothing_leaks_between_pairs_or_between_branches(ids, arrays):
    ids = TokenIds(*(x[:1] for x in ids))
    q, k, v, _ = (x[:1] for x in arrays)
    attend = jax.jit(lambda k, v: interpreted(q, k, v, ids, DEFAULT_OPTIONS))
    before = attend(k, v)
    for segment, branch in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (0, 0)]:
        part = (ids.segment == segment) & (ids.branch == branch)
        shift = 3.0 * part[..., None, None]
        moved = np.flatnonzero(np.abs(attend(k + shift, v + shift) - before).max(axis=(0, 2, 3)) > 0)
        may_move = (ids.segment == segment) & ((ids.branch == branch) | (branch == 0))
        assert moved.size and set(moved) <= set(np.flatnonzero(may_move[0]))


def test_a_block_that_nobody_sees_is_not_computed():
    """NaN in the keys and queries of the first pair, which fills a block, would poison whatever touches them."""
    segments = jnp.repeat(jnp.array([[1, 2]]), 128, axis=1)
    positions = jnp.tile(jnp.arange(128), 2)[None]
    q, k, v, cotangent = (x.at[:, :128].set(jnp.nan) for x in values(1, 256, 1, 1, 8))
    results = with_gradients(interpreted)(q, k, v, cotangent, TokenIds(segments, 0 * segments, positions))
    for result in results:
        assert jnp.isnan(result[:, :128]).all() and jnp.isfinite(result[:, 128:]).all()


def test_rows_of_padding_give_numbers(arrays):
    nothing = jnp.zeros((ROWS, LENGTH), jnp.int32)
    padding = TokenIds(nothing, nothing, nothing)
    for result in with_gradients(interpreted)(*arrays, padding, AttentionOptions(jnp.int32(5))):
        assert jnp.isfinite(result).all()


def test_blocks_divide_the_length_and_shrink_where_many_heads_share_keys():
    assert choose_sizes(1024, 1) == (512, 512)
    assert choose_sizes(1024, 7) == (256, 512)
    assert choose_sizes(1280, 32) == (128, 256)
    assert choose_sizes(1152, 1) == (128, 128)


def abstract(rows, length, heads, kv_heads, size, dtype, sharding=None):
    shapes = [(rows, length, count, size) for count in (heads, kv_heads, kv_heads, heads)]
    like = partial(jax.ShapeDtypeStruct, sharding=sharding)
    return *(like(shape, dtype) for shape in shapes), TokenIds(*(like((rows, length), jnp.int32) for _ in range(3)))


@pytest.mark.parametrize(("dtype", "soft_cap"), [(jnp.bfloat16, None), (jnp.float32, None), (jnp.bfloat16, 50.0)])
def test_the_kernels_are_lowered_for_tpu_without_one(dtype, soft_cap):
    arrays = abstract(2, 1000, 14, 2, 64, dtype)
    traced = with_gradients(tree_attention_tpu).trace(
        *arrays, AttentionOptions(jax.ShapeDtypeStruct((), jnp.int32), soft_cap=soft_cap)
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for step in ("forward", "query_gradient", "key_value_gradient"):
        assert text.count(f'kernel_name = "tree_attention_{step}_step"') == 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "soft_cap"),
    [(14, 2, 64, None), (12, 2, 128, None), (32, 1, 80, None), (8, 4, 256, 50.0)],
)
def test_the_tpu_compiler_takes_the_kernels(heads, kv_heads, size, soft_cap):
    """With `pip install libtpu` the whole compiler runs, without a TPU."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with libtpu, which is not installed")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    arrays = abstract(2, 2048, heads, kv_heads, size, jnp.bfloat16, sharding)
    window = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    options = AttentionOptions(window, soft_cap=soft_cap)
    compiled = with_gradients(tree_attention_tpu).lower(*arrays, options).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU")
def test_a_tpu_gives_the_numbers_of_xla():
    arrays, ids = values(2, 1000, 14, 2, 64, jnp.bfloat16), forest(2, 1000, 300)
    assert_agrees_with_xla(tree_attention_tpu, arrays, ids, tolerance=5e-2)
