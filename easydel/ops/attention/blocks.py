"""Find the blocks of the score square in which a query sees a key, for the backends that skip the others."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from easydel.ops.attention.inputs import TokenIds

LARGEST = jnp.iinfo(jnp.int32).max


class BlockSizes(NamedTuple):
    """Block lengths in tokens, one for queries and one for keys."""

    queries: int
    keys: int


class _Edge(NamedTuple):
    """Ranges of the ids that the mask reads, over the tokens of each block that belong to its first or last segment."""

    segment: Int[Array, "rows blocks"]
    has_trunk: Bool[Array, "rows blocks"]
    first_branch: Int[Array, "rows blocks"]  # trunk aside; above last_branch where there is only trunk
    last_branch: Int[Array, "rows blocks"]
    first_position: Int[Array, "rows blocks"]
    last_position: Int[Array, "rows blocks"]


def seen_blocks(
    ids: TokenIds, window: int | Int[Array, ""] | None, sizes: BlockSizes
) -> Bool[Array, "rows query_blocks key_blocks"]:
    """Whether any query of a block may see any key of a block; `sizes` divide the length.

    The answer comes from ranges of ids, in time that grows with the square of the number of blocks, not of tokens. No
    visible pair is missed. Few blocks are marked in vain where rows are as packing makes them: ascending segments, then
    padding, and in each segment the trunk and then ascending branches.

    Blocks that share several segments count as seen: in packed rows, only a block and itself share more than one. Where
    they share one, it is the last of the keys and the first of the queries; there the keys must hold trunk, or a branch
    that the queries hold, near enough for the window.
    """
    # Padding becomes the last segment, so that a block at its border has a narrow range.
    ordered = ids._replace(segment=jnp.where(ids.segment == 0, LARGEST, ids.segment))
    queries = TokenIds(*(x.reshape(x.shape[0], -1, sizes.queries) for x in ordered))
    keys = TokenIds(*(x.reshape(x.shape[0], -1, sizes.keys) for x in ordered))
    query_edge = _edge(queries, queries.segment.min(-1))
    key_edge = _edge(keys, keys.segment.max(-1))

    query_ends = jnp.arange(sizes.queries, ids.segment.shape[1] + 1, sizes.queries)
    key_starts = jnp.arange(0, ids.segment.shape[1], sizes.keys)
    seen = key_starts < query_ends[:, None]
    q, k = _Edge(*(x[:, :, None] for x in query_edge)), _Edge(*(x[:, None, :] for x in key_edge))
    seen = seen & (keys.segment.min(-1)[:, None, :] <= queries.segment.max(-1)[:, :, None])
    seen &= k.segment >= q.segment
    is_near = k.has_trunk | ((k.first_branch <= q.last_branch) & (q.first_branch <= k.last_branch))
    if window is not None:
        is_near &= q.first_position - k.last_position < window
    return seen & ((k.segment > q.segment) | is_near)


def _edge(blocks: TokenIds, segment: Int[Array, "rows blocks"]) -> _Edge:
    """The ranges of the tokens of each block that lie in the block's `segment`."""
    is_in = blocks.segment == segment[..., None]
    in_branch = is_in & (blocks.branch > 0)
    return _Edge(
        segment,
        jnp.any(is_in & (blocks.branch == 0), axis=-1),
        jnp.min(jnp.where(in_branch, blocks.branch, LARGEST), axis=-1),
        jnp.max(jnp.where(in_branch, blocks.branch, 0), axis=-1),
        jnp.min(jnp.where(is_in, blocks.position, LARGEST), axis=-1),
        jnp.max(jnp.where(is_in, blocks.position, -1), axis=-1),
    )


def blocks_to_fetch(seen: Bool[Array, "rows outer inner"]) -> Int[Array, " rows_outer_inner"]:
    """The inner block that each step of a kernel loads: its own where that is seen, else the one loaded last.

    A step computes iff its own block is loaded. Steps before the first seen block load that block ahead.
    """
    latest = jax.lax.cummax(jnp.where(seen, jnp.arange(seen.shape[-1]), -1), axis=2)
    first = jnp.argmax(seen, axis=-1, keepdims=True)
    # One dimension: scalar memory pads every other one.
    return jnp.where(latest < 0, first, latest).astype(jnp.int32).reshape(-1)


def blocks_to_visit(
    seen: Bool[Array, "rows query_blocks key_blocks"],
) -> tuple[Int[Array, "rows query_blocks key_blocks"], Int[Array, "rows query_blocks"]]:
    """Key blocks in the order to visit them, the seen ones first, and how many of them are seen."""
    return jnp.argsort(~seen, axis=-1, stable=True), seen.sum(-1)
