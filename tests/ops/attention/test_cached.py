"""Queries of the newest tokens against a cache give what the whole row gives."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from easydel.ops.attention.inputs import DEFAULT_OPTIONS, AttentionOptions, TokenIds
from easydel.ops.attention.tree_attention import tree_attention
from tests.ops.attention.forest import forest, values

OPTIONS = pytest.mark.parametrize("options", [DEFAULT_OPTIONS, AttentionOptions(jnp.int32(5), 0.5, 2.0)], ids=str)


@OPTIONS
@pytest.mark.parametrize(("start", "new"), [(0, 7), (7, 1), (11, 3)])
def test_newest_tokens_see_what_they_see_in_the_whole_row(options, start, new):
    """Two prompts of different length with padding before them, and empty slots behind what is there so far."""
    position = jnp.array([[-1, -1, -1, *range(11)], [-1, *range(13)]])
    q, k, v, _ = values(2, 14, 4, 2, 8)
    whole = tree_attention(q, k, v, TokenIds.of_sequences(position), options)
    stop = start + new
    ids = TokenIds.of_sequences(jnp.where(jnp.arange(14) < stop, position, -1))
    behind = (jnp.arange(14) >= stop)[None, :, None, None]
    k, v = (jnp.where(behind, 1e4, x) for x in (k, v))
    found = tree_attention(q[:, start:stop], k, v, ids, options, query_start=jnp.int32(start))
    is_token = np.array(position[:, start:stop] >= 0)
    np.testing.assert_allclose(found[is_token], whole[:, start:stop][is_token], rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(found).all()


def test_a_row_of_the_cache_may_hold_trees():
    ids = forest(2, 100, 12)
    q, k, v, _ = values(2, 100, 4, 2, 8)
    whole = tree_attention(q, k, v, ids)
    found = tree_attention(q[:, 40:70], k, v, ids, query_start=jnp.int32(40))
    np.testing.assert_allclose(found, whole[:, 40:70], rtol=1e-5, atol=1e-6)
