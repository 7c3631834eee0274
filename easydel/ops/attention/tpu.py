"""Attention over trees on TPU: flash kernels that make the mask from ids and skip blocks where nobody sees anybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from easydel.ops.attention.blocks import (
    LANES,
    Blocks,
    TreeIds,
    blocks_to_fetch,
    choose_blocks,
    seen_blocks,
    token_codes,
)
from easydel.ops.attention.residuals import name_residuals
from easydel.ops.attention.tpu_kernels import forward_step, key_value_gradient_step, query_gradient_step

QUERIES, KEYS = 0, 1


class TokenAxis(NamedTuple):
    """Along which axis of an array its tokens lie, and whether a kernel takes them as queries or as keys."""

    side: int
    number: int
    has_heads: bool = True


PER_QUERY = TokenAxis(QUERIES, 4)  # [rows, kv_heads, group, head_dim, length]
STATISTIC = TokenAxis(QUERIES, 3)  # [rows, kv_heads, group, length]
PER_KEY = TokenAxis(KEYS, 2)  # [rows, kv_heads, length, head_dim]
CODES_OF_QUERIES = TokenAxis(QUERIES, 2, has_heads=False)  # [rows, 2, length]
CODES_OF_KEYS = TokenAxis(KEYS, 2, has_heads=False)


def tree_attention_tpu(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    segment_ids: Int[Array, "rows length"],
    branch_ids: Int[Array, "rows length"],
    position_ids: Int[Array, "rows length"],
    window: int | Int[Array, ""] | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """`tree_attention` in kernels for TPU; memory grows with the length and not with its square.

    Splash attention, which comes with JAX, takes a mask that depends on the data as a whole square only, or as
    segments without branches; hence kernels of our own. Rows are padded inside to a multiple of 128.

    Args:
      blocks: sizes that divide the padded length; None chooses them by length and heads.
      interpret: run the kernels in JAX's interpreter, on any platform: slow, for tests.
    """
    rows, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    padded = length + -length % LANES
    if blocks is None:
        blocks = choose_blocks(padded, heads // kv_heads)

    def pad(x: Array) -> Array:
        # Zeros are segment 0: what is added is padding like any other.
        return jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))

    window = None if window is None else jnp.int32(window)
    ids = TreeIds(pad(segment_ids), pad(branch_ids), pad(position_ids), window)
    by_group = pad(q).reshape(rows, padded, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 4, 1)
    k, v = (pad(x).transpose(0, 2, 1, 3) for x in (k, v))
    out = _attention(by_group, k, v, ids, blocks, interpret)
    return out.transpose(0, 4, 1, 2, 3).reshape(rows, padded, heads, head_dim)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q: Float[Array, "rows kv_heads group head_dim length"],
    k: Float[Array, "rows kv_heads length head_dim"],
    v: Float[Array, "rows kv_heads length head_dim"],
    ids: TreeIds,
    blocks: Blocks,
    interpret: bool,
) -> Float[Array, "rows kv_heads group head_dim length"]:
    return _forward(q, k, v, ids, blocks, interpret)[0]


def _forward(q, k, v, ids, blocks, interpret):
    group, head_dim, length = q.shape[2:]
    statistic = jax.ShapeDtypeStruct((*q.shape[:3], length), jnp.float32)
    out, log_normalizer = _run(
        forward_step,
        inner=KEYS,
        inputs=[(q, PER_QUERY), (k, PER_KEY), (v, PER_KEY)],
        outputs=[(q, PER_QUERY), (statistic, STATISTIC)],
        scratch=[(group, blocks.queries), (group, blocks.queries), (group, head_dim, blocks.queries)],
        ids=ids,
        blocks=blocks,
        interpret=interpret,
    )
    out, log_normalizer = name_residuals(out, log_normalizer)
    return out, (q, k, v, ids, out, log_normalizer)


def _backward(blocks, interpret, residuals, cotangent):
    q, k, v, ids, out, log_normalizer = residuals
    group, head_dim = q.shape[2:4]
    # The derivative of a soft-max needs the mean, under its weights, of the weights' gradient: out . d(out).
    mean = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=3)
    run = partial(
        _run,
        inputs=[
            (q, PER_QUERY),
            (k, PER_KEY),
            (v, PER_KEY),
            (cotangent, PER_QUERY),
            (log_normalizer, STATISTIC),
            (mean, STATISTIC),
        ],
        ids=ids,
        blocks=blocks,
        interpret=interpret,
    )
    (q_gradient,) = run(
        query_gradient_step, inner=KEYS, outputs=[(q, PER_QUERY)], scratch=[(group, head_dim, blocks.queries)]
    )
    k_gradient, v_gradient = run(
        key_value_gradient_step,
        inner=QUERIES,
        outputs=[(k, PER_KEY), (v, PER_KEY)],
        scratch=[(blocks.keys, head_dim), (blocks.keys, head_dim)],
    )
    return q_gradient, k_gradient, v_gradient, None


_attention.defvjp(_forward, _backward)


def _run(
    step: Callable[..., None],
    *,
    inner: int,
    inputs: Sequence[tuple[Array, TokenAxis]],
    outputs: Sequence[tuple[Any, TokenAxis]],
    scratch: Sequence[tuple[int, ...]],
    ids: TreeIds,
    blocks: Blocks,
    interpret: bool,
) -> list[Array]:
    """Run a kernel over (rows, key heads, outer blocks, inner blocks); `inner` says whose blocks those are."""
    seen = seen_blocks(ids, blocks)
    if inner == QUERIES:
        seen = seen.swapaxes(1, 2)
    rows, outer_blocks, inner_blocks = seen.shape
    fetch = blocks_to_fetch(seen)

    def cut(shape: tuple[int, ...], axis: TokenAxis) -> pl.BlockSpec:
        def place(row, head, outer, own, fetch, _window):
            at_hand = fetch[(row * outer_blocks + outer) * inner_blocks + own] if axis.side == inner else outer
            start = [row, head] if axis.has_heads else [row]
            return *start, *(at_hand if i == axis.number else 0 for i in range(len(start), len(shape)))

        start = [1, 1] if axis.has_heads else [1]
        rest = (blocks[axis.side] if i == axis.number else shape[i] for i in range(len(start), len(shape)))
        return pl.BlockSpec((*start, *rest), place)

    codes = token_codes(ids)
    inputs = [*inputs, (codes, CODES_OF_QUERIES), (codes, CODES_OF_KEYS)]
    window = jnp.zeros(1, jnp.int32) if ids.window is None else ids.window.reshape(1)
    call = pl.pallas_call(
        partial(step, is_windowed=ids.window is not None),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, inputs[0][0].shape[1], outer_blocks, inner_blocks),
            in_specs=[cut(x.shape, axis) for x, axis in inputs],
            out_specs=[cut(x.shape, axis) for x, axis in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=f"tree_attention_{step.__name__}",
    )
    return call(fetch, window, *(x for x, _ in inputs))
