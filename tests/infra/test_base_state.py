"""A state is a pytree with an optimiser, and survives a trip to disk bit by bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easydel import EasyDeLState
from easydel.modules.llama import LlamaForCausalLM
from tests.tiny import tiny_config


def test_an_update_moves_the_model_and_counts(tiny_model):
    state = EasyDeLState.create(tiny_model, optax.sgd(0.5))
    updated = state.apply_gradients(jax.tree.map(jnp.ones_like, tiny_model))
    assert int(updated.step) == 1 and int(state.step) == 0
    np.testing.assert_allclose(updated.model.norm.weight, tiny_model.norm.weight - 0.5)
    with pytest.raises(ValueError, match="no optimiser"):
        tiny_model.to_state().apply_gradients(tiny_model)


def test_replace_names_an_unknown_field(tiny_model):
    assert int(tiny_model.to_state().replace(step=jnp.int32(7)).step) == 7
    with pytest.raises(TypeError, match="params"):
        tiny_model.to_state().replace(params=None)


def test_saving_and_loading_changes_no_bit(tiny_model, tmp_path):
    state = EasyDeLState.create(tiny_model, optax.adamw(1e-3))
    state = state.apply_gradients(jax.tree.map(lambda x: x * 0.37, tiny_model))
    state.save_state(tmp_path / "state")
    loaded = EasyDeLState.create(tiny_model, state.tx).load_state(tmp_path / "state")
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), loaded, state))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    with pytest.raises(FileExistsError, match="exists"):
        state.save_state(tmp_path / "state")


def test_the_state_of_another_model_or_optimiser_is_refused(tiny_model, tmp_path):
    EasyDeLState.create(tiny_model, optax.adamw(1e-3)).save_state(tmp_path / "state")
    other = LlamaForCausalLM.init(tiny_config(intermediate_size=48), jax.random.key(0))
    with pytest.raises(ValueError, match=r"up_proj.weight is saved as float32\[2, 64, 32\], this state has"):
        EasyDeLState.create(other, optax.adamw(1e-3)).load_state(tmp_path / "state")
    with pytest.raises(ValueError, match="not part of this state"):
        tiny_model.to_state().load_state(tmp_path / "state")
    with pytest.raises(FileNotFoundError, match="no saved state"):
        tiny_model.to_state().load_state(tmp_path / "nothing")


@pytest.mark.devices
def test_shardings_have_the_structure_of_the_state(tiny_model):
    state = EasyDeLState.create(tiny_model, optax.adamw(1e-3))
    assert len(jax.tree.leaves(state.shardings)) == len(jax.tree.leaves(state))
