"""Blocks that are skipped, and the order of the others."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from easydel.ops.attention.blocks import BlockSizes, blocks_to_fetch, blocks_to_visit, seen_blocks
from easydel.ops.attention.inputs import TokenIds
from easydel.ops.attention.mask import tree_mask
from tests.ops.attention.forest import forest

WINDOWS = pytest.mark.parametrize("window", [None, 7])


def blocks_with_an_entry(ids: TokenIds, window: int | None, sizes: BlockSizes) -> np.ndarray:
    rows, length = ids.segment.shape
    mask = np.array(tree_mask(ids, window))
    return mask.reshape(rows, length // sizes.queries, sizes.queries, -1, sizes.keys).any(axis=(2, 4))


@WINDOWS
@pytest.mark.parametrize("branches", [2, 5, 40])
@pytest.mark.parametrize("sizes", [BlockSizes(64, 64), BlockSizes(128, 96)], ids=str)
def test_in_packed_rows_a_block_is_seen_if_its_mask_has_an_entry_and_seldom_else(branches, sizes, window):
    ids = forest(4, 1152, 2400 // (branches + 1) ** 2 + 8, branches=branches)
    seen, expected = np.array(seen_blocks(ids, window, sizes)), blocks_with_an_entry(ids, window, sizes)
    assert not (expected & ~seen).any()
    assert seen.sum() <= expected.sum() if window is None else seen.sum() <= 1.1 * expected.sum()


@WINDOWS
def test_whatever_the_order_of_the_tokens_no_block_is_missed(window):
    order = np.random.default_rng(1).permutation(384)
    ids = TokenIds(*(x[:, order] for x in forest(3, 384, 20, branches=5)))
    for sizes in (BlockSizes(4, 4), BlockSizes(8, 16)):
        assert not (blocks_with_an_entry(ids, window, sizes) & ~np.array(seen_blocks(ids, window, sizes))).any()


def test_a_step_has_its_own_block_at_hand_iff_it_is_seen_and_none_is_fetched_twice():
    seen = jnp.array([[[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]]], bool)
    assert blocks_to_fetch(seen).tolist() == [2, 2, 2, 2, 4, 4, 0, 0, 0, 0, 0, 0]


def test_seen_blocks_are_visited_first_and_in_order():
    order, number = blocks_to_visit(jnp.array([[[0, 1, 0, 1], [0, 0, 0, 1]]], bool))
    assert order[0, :, :2].tolist() == [[1, 3], [3, 0]] and number.tolist() == [[2, 1]]
