"""A digest tells weights apart and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from easydel.infra.mesh import create_mesh
from easydel.weights.fingerprint import fingerprint


def test_the_same_weights_have_the_same_digest_wherever_they_lie(tiny_model):
    assert fingerprint(tiny_model) == fingerprint(jax.tree.map(lambda leaf: leaf.copy(), tiny_model))
    assert fingerprint(tiny_model) == fingerprint(tiny_model.shard(create_mesh()))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.at[3, 1].add(1e-7),  # one value, by one bit
        lambda x: x.at[jnp.array([0, 5])].set(x[jnp.array([5, 0])]),  # the same values in other places
        lambda x: x.T,
        lambda x: x.astype(jnp.bfloat16),
    ],
)
def test_any_change_of_value_place_shape_or_dtype_changes_it(change):
    x = jax.random.normal(jax.random.key(0), (8, 6))
    assert fingerprint({"w": x}) != fingerprint({"w": change(x)})


def test_names_count():
    x = jnp.ones(3)
    assert fingerprint({"a": x}) != fingerprint({"b": x})
