"""Which key each query of a row of trees may see."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Segment and branch fit in one number, ``segment * BRANCHES + branch``: a power of two above the largest branch id.
BRANCHES = 4
# The score of a key that is not seen. Finite, so that a block in which a query sees nothing gives numbers and not NaN;
# the block in which it sees itself wipes them out.
UNSEEN = -1e30


def tree_mask(
    segment_ids: Int[Array, "rows length"],
    branch_ids: Int[Array, "rows length"],
    position_ids: Int[Array, "rows length"],
    window: int | Int[Array, ""] | None = None,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> Bool[Array, "rows queries keys"]:
    """Which key each query sees.

    Query q sees key k iff they are in the same segment, k is at or before q in the row, and k lies in the prompt
    (branch 0) or in q's own branch. With a sliding `window`, also iff k's position is fewer than `window` tokens back;
    positions and not places in the row count, since both completions continue from the prompt's end.
    """
    place = jnp.arange(segment_ids.shape[1])
    causal = place[keys][None, None, :] <= place[queries][None, :, None]
    same_segment = segment_ids[:, queries, None] == segment_ids[:, None, keys]
    key_branch = branch_ids[:, None, keys]
    own_branch = (key_branch == 0) | (key_branch == branch_ids[:, queries, None])
    visible = causal & same_segment & own_branch
    if window is not None:
        visible &= position_ids[:, queries, None] - position_ids[:, None, keys] < window
    return visible
