"""Compute which keys each query of a row of trees sees."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from easydel.ops.attention.inputs import TokenIds

# The score of a key that is not seen. It is finite, so that a block in which a query sees nothing gives numbers and not
# NaN; the block in which the query sees itself outweighs them.
UNSEEN = -1e30


class Tokens(NamedTuple):
    """The ids that the mask reads of queries or of keys: `TokenIds`, and the slot in the row."""

    segment: Int[Array, "*tokens"]
    branch: Int[Array, "*tokens"]
    position: Int[Array, "*tokens"]
    slot: Int[Array, "*tokens"]


def visible(queries: Tokens, keys: Tokens, window: int | Int[Array, ""] | None) -> Bool[Array, "*pairs"]:
    """The rule of `tree_mask`, for queries and keys that broadcast against each other."""
    seen = (keys.slot <= queries.slot) & (keys.segment == queries.segment)
    seen &= (keys.branch == 0) | (keys.branch == queries.branch)
    if window is not None:
        seen &= queries.position - keys.position < window
    return seen


def tree_mask(
    ids: TokenIds,
    window: int | Int[Array, ""] | None = None,
    query_ids: TokenIds | None = None,
    query_start: int | Int[Array, ""] = 0,
) -> Bool[Array, "rows queries length"]:
    """True where a query sees a key.

    Query q sees key k iff both are in one segment, k's slot in the row is at or before q's, and k lies in the trunk
    (branch 0) or in q's own branch. With a sliding `window`, k's position must also be fewer than `window` back:
    positions count and not slots, since every branch continues from the end of the trunk.

    Args:
      ids: of the keys, which are the tokens of whole rows.
      window: tokens a query looks back, or None for all.
      query_ids: of the queries, if they are not all tokens of the rows.
      query_start: slot of the first query.

    Example:
      >>> ids = TokenIds(*(jnp.array([x]) for x in ([1, 1, 1, 1], [0, 1, 2, 2], [0, 1, 1, 2])))
      >>> tree_mask(ids).astype(int)[0].tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    """
    query_ids = ids if query_ids is None else query_ids
    query_slots = query_start + jnp.arange(query_ids.segment.shape[1])
    key_slots = jnp.arange(ids.segment.shape[1])
    queries = Tokens(*(x[:, :, None] for x in (*query_ids, query_slots[None])))
    keys = Tokens(*(x[:, None, :] for x in (*ids, key_slots[None])))
    return visible(queries, keys, window)
