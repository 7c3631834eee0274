"""Attend over trees on TPU with flash kernels that compute the mask from ids and skip blocks without a visible pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from easydel.ops.attention.blocks import BlockSizes, blocks_to_fetch, seen_blocks
from easydel.ops.attention.inputs import AttentionOptions, TokenIds, pad_rows
from easydel.ops.attention.residuals import name_residuals
from easydel.ops.attention.tpu_kernels import Scoring, forward_step, key_value_gradient_step, query_gradient_step

QUERIES, KEYS = 0, 1
# Blocks are multiples of the length of a TPU's vector register.
VECTOR_LANES = 128
# Most queries of a block, over all heads that share a key head: more do not fit the vector memory.
GROUP_QUERIES = 2048


class TokenAxis(NamedTuple):
    """The axis of an array that its tokens lie along, and whether a kernel reads them as queries or as keys."""

    side: int
    number: int
    has_heads: bool = True


PER_QUERY = TokenAxis(QUERIES, 4)  # [rows, kv_heads, group, head_dim, length]
STATISTIC = TokenAxis(QUERIES, 3)  # [rows, kv_heads, group, length]
PER_KEY = TokenAxis(KEYS, 2)  # [rows, kv_heads, length, head_dim]
IDS_OF_QUERIES = TokenAxis(QUERIES, 2, has_heads=False)  # [rows, 3, length]
IDS_OF_KEYS = TokenAxis(KEYS, 2, has_heads=False)


class Statics(NamedTuple):
    """The settings that the kernels are compiled for."""

    scale: float
    soft_cap: float | None
    sizes: BlockSizes
    interpret: bool


def choose_sizes(length: int, group: int) -> BlockSizes:
    """The largest blocks that divide a length, a multiple of 128, and fit a TPU's vector memory.

    `group` is the number of query heads that share a key head: a step holds a block of queries of them all.
    """
    sizes = [count * VECTOR_LANES for count in (4, 2, 1) if length % (count * VECTOR_LANES) == 0]
    return BlockSizes(next((size for size in sizes if size * group <= GROUP_QUERIES), VECTOR_LANES), sizes[0])


def tree_attention_tpu(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    ids: TokenIds,
    options: AttentionOptions,
    *,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """Compute `tree_attention` in kernels for TPU; memory grows with the length and not with its square.

    JAX's splash attention takes a mask that depends on the data only as a whole square, or as segments without
    branches; hence kernels of our own. Rows are padded inside to a multiple of 128.

    Args:
      q, k, v, ids, options: as in `tree_attention`.
      sizes: block lengths, multiples of 128 that divide the padded length; None chooses them by length and heads.
      interpret: run the kernels in JAX's interpreter, on any platform: slow, for tests.

    Returns:
      The attention output, in q's dtype.
    """
    rows, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    padded = length + -length % VECTOR_LANES
    if sizes is None:
        sizes = choose_sizes(padded, heads // kv_heads)
    pad = partial(pad_rows, multiple=VECTOR_LANES)
    window = None if options.window is None else jnp.int32(options.window)
    statics = Statics(options.scale_of(head_dim), options.soft_cap, sizes, interpret)
    by_group = pad(q).reshape(rows, padded, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 4, 1)
    k, v = (pad(x).transpose(0, 2, 1, 3) for x in (k, v))
    out = _attention(by_group, k, v, TokenIds(*map(pad, ids)), window, statics)
    return out.transpose(0, 4, 1, 2, 3).reshape(rows, padded, heads, head_dim)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: Float[Array, "rows kv_heads group head_dim length"],
    k: Float[Array, "rows kv_heads length head_dim"],
    v: Float[Array, "rows kv_heads length head_dim"],
    ids: TokenIds,
    window: Int[Array, ""] | None,
    statics: Statics,
) -> Float[Array, "rows kv_heads group head_dim length"]:
    return _forward(q, k, v, ids, window, statics)[0]


def _forward(q, k, v, ids, window, statics):
    group, head_dim, length = q.shape[2:]
    queries = statics.sizes.queries
    statistic = jax.ShapeDtypeStruct((*q.shape[:3], length), jnp.float32)
    out, log_normalizer = _run(
        forward_step,
        inner=KEYS,
        inputs=[(q, PER_QUERY), (k, PER_KEY), (v, PER_KEY)],
        outputs=[(q, PER_QUERY), (statistic, STATISTIC)],
        scratch=[(group, queries), (group, queries), (group, head_dim, queries)],
        ids=ids,
        window=window,
        statics=statics,
    )
    out, log_normalizer = name_residuals(out, log_normalizer)
    return out, (q, k, v, ids, window, out, log_normalizer)


def _backward(statics, residuals, cotangent):
    q, k, v, ids, window, out, log_normalizer = residuals
    queries, keys = statics.sizes
    group, head_dim = q.shape[2:4]
    # The derivative of a softmax needs the mean of the weights' gradient under the weights: out . d(out).
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
        window=window,
        statics=statics,
    )
    (q_gradient,) = run(query_gradient_step, inner=KEYS, outputs=[(q, PER_QUERY)], scratch=[(group, head_dim, queries)])
    k_gradient, v_gradient = run(
        key_value_gradient_step,
        inner=QUERIES,
        outputs=[(k, PER_KEY), (v, PER_KEY)],
        scratch=[(keys, head_dim), (keys, head_dim)],
    )
    return q_gradient, k_gradient, v_gradient, None, None


_attention.defvjp(_forward, _backward)


def _run(
    step: Callable[..., None],
    *,
    inner: int,
    inputs: Sequence[tuple[Array, TokenAxis]],
    outputs: Sequence[tuple[Any, TokenAxis]],
    scratch: Sequence[tuple[int, ...]],
    ids: TokenIds,
    window: Int[Array, ""] | None,
    statics: Statics,
) -> list[Array]:
    """Run a kernel over (rows, key heads, outer blocks, inner blocks); `inner` is QUERIES or KEYS."""
    seen = seen_blocks(ids, window, statics.sizes)
    if inner == QUERIES:
        seen = seen.swapaxes(1, 2)
    rows, outer_blocks, inner_blocks = seen.shape
    fetch = blocks_to_fetch(seen)

    def cut(shape: tuple[int, ...], axis: TokenAxis) -> pl.BlockSpec:
        def index(row, head, outer, own, fetch, _window):
            at_hand = fetch[(row * outer_blocks + outer) * inner_blocks + own] if axis.side == inner else outer
            start = [row, head] if axis.has_heads else [row]
            return *start, *(at_hand if i == axis.number else 0 for i in range(len(start), len(shape)))

        start = [1, 1] if axis.has_heads else [1]
        rest = (statics.sizes[axis.side] if i == axis.number else shape[i] for i in range(len(start), len(shape)))
        return pl.BlockSpec((*start, *rest), index)

    stacked = jnp.stack(ids, axis=1).astype(jnp.int32)
    inputs = [*inputs, (stacked, IDS_OF_QUERIES), (stacked, IDS_OF_KEYS)]
    call = pl.pallas_call(
        partial(step, scoring=Scoring(statics.scale, statics.soft_cap, window is not None)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, inputs[0][0].shape[1], outer_blocks, inner_blocks),
            in_specs=[cut(x.shape, axis) for x, axis in inputs],
            out_specs=[cut(x.shape, axis) for x, axis in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=statics.interpret,
        name=f"tree_attention_{step.__name__}",
    )
    return call(fetch, jnp.zeros(1, jnp.int32) if window is None else window.reshape(1), *(x for x, _ in inputs))
