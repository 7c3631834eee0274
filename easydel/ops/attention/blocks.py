"""Blocks of an attention square over trees: which of them anybody sees, and the mask within one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from easydel.ops.attention.mask import BRANCHES, tree_mask

LANES = 128
GROUP_QUERIES = 2048


class TreeIds(NamedTuple):
    """Where the tokens of a batch belong, and how far they look back; see `tree_mask`."""

    segment: Int[Array, "rows length"]
    branch: Int[Array, "rows length"]
    position: Int[Array, "rows length"]
    window: Int[Array, ""] | None


class Blocks(NamedTuple):
    """Tokens of a block of queries and of a block of keys, multiples of 128."""

    queries: int
    keys: int


def choose_blocks(length: int, group: int) -> Blocks:
    """The largest blocks that divide a length, a multiple of 128, and fit a TPU's vector memory.

    `group` is the number of query heads that share a key head: a step holds a block of queries of them all.
    """
    sizes = [size for size in (4 * LANES, 2 * LANES, LANES) if length % size == 0]
    return Blocks(next((size for size in sizes if size * group <= GROUP_QUERIES), LANES), sizes[0])


def seen_blocks(ids: TreeIds, blocks: Blocks) -> Bool[Array, "rows query_blocks key_blocks"]:
    """Whether any query of a block sees any key of a block; XLA fuses the mask into the reduction."""
    rows, length = ids.segment.shape
    mask = tree_mask(*ids).reshape(rows, length // blocks.queries, blocks.queries, -1, blocks.keys)
    return mask.any(axis=(2, 4))


def blocks_to_fetch(seen: Bool[Array, "rows outer inner"]) -> Int[Array, " rows_outer_inner"]:
    """The inner block to have at hand in each step: its own where it is seen, else the one that is there already.

    A step computes iff it has its own block. Before the first seen block that block is fetched ahead.
    """
    latest = jax.lax.cummax(jnp.where(seen, jnp.arange(seen.shape[-1]), -1), axis=2)
    first = jnp.argmax(seen, axis=-1, keepdims=True)
    # One dimension: scalar memory pads every other one.
    return jnp.where(latest < 0, first, latest).astype(jnp.int32).reshape(-1)


def token_codes(ids: TreeIds) -> Int[Array, "rows 2 length"]:
    """Segment and branch in one number, and the position: all that `visible_in_block` reads of a token."""
    return jnp.stack([ids.segment * BRANCHES + ids.branch, ids.position], axis=1).astype(jnp.int32)


def visible_in_block(
    query_codes: Int[Array, "2 queries"],
    key_codes: Int[Array, "2 keys"],
    query_start: Int[Array, ""],
    key_start: Int[Array, ""],
    window: Int[Array, ""] | None,
) -> Bool[Array, "keys queries"]:
    """`tree_mask` of one block, transposed; the starts are places in the row."""
    key_columns = key_codes.T
    query_code, key_code = query_codes[0:1], key_columns[:, 0:1]
    shape = (key_codes.shape[1], query_codes.shape[1])
    query_place = query_start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    key_place = key_start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    prompt_code = query_code & -BRANCHES
    visible = (key_place <= query_place) & ((key_code == query_code) | (key_code == prompt_code))
    if window is not None:
        visible &= query_codes[1:2] - key_columns[:, 1:2] < window
    return visible
