"""Optimisers: what their state costs, how clipping and skipping act, and that the numbers are right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easydel import EasyDeLState, TrainingArguments
from easydel.modules.llama import LlamaForCausalLM
from easydel.trainers.optimizers import clip_by_global_norm, make_optimizer, make_schedule
from tests.tiny import tiny_config

# The shape of SmolLM2-135M; nothing of this size is ever made here.
SMOLLM2 = tiny_config(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    layer_windows=(None,) * 30,
)
BYTES = {
    "adamw": ({"optimizer": "adamw"}, 8.0),
    "adamw, first moments in bfloat16": (
        {"optimizer": "adamw", "extra_optimizer_kwargs": {"mu_dtype": "bfloat16"}},
        6.0,
    ),
    "lion": ({"optimizer": "lion"}, 4.0),
    "lion, first moments in bfloat16": ({"optimizer": "lion", "extra_optimizer_kwargs": {"mu_dtype": "bfloat16"}}, 2.0),
    "adafactor": ({"optimizer": "adafactor"}, 0.01),
    "adafactor with momentum in bfloat16": (
        {"optimizer": "adafactor", "extra_optimizer_kwargs": {"momentum": 0.9, "dtype_momentum": "bfloat16"}},
        2.01,
    ),
}


def optimizer_of(**options) -> optax.GradientTransformation:
    arguments = TrainingArguments(**options)
    return make_optimizer(arguments, make_schedule(arguments, total_steps=10))


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_state_a_parameter(name):
    options, expected = BYTES[name]
    model = jax.eval_shape(lambda: LlamaForCausalLM.init(SMOLLM2, jax.random.key(0)))
    state = jax.eval_shape(optimizer_of(**options).init, model)
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / model.num_parameters
    print(f"{name:40} {found:.3f} bytes a parameter")
    assert found == pytest.approx(expected, abs=0.02)


def test_adafactor_is_its_paper_with_a_decay_that_the_learning_rate_scales():
    """Two updates of one matrix, written out in float64."""
    rate, decay, weight = 0.1, 0.5, np.random.default_rng(0).normal(size=(4, 6))
    gradients = np.random.default_rng(1).normal(size=(2, 4, 6))
    tx = optimizer_of(
        optimizer="adafactor",
        learning_rate=rate,
        scheduler="constant",
        weight_decay=decay,
        clip_grad=None,
        extra_optimizer_kwargs={"min_dim_size_to_factor": 2},
    )
    params, expected = {"q_proj.weight": jnp.float32(weight)}, weight
    state, rows, columns = tx.init(params), 0.0, 0.0
    for number, gradient in enumerate(gradients):
        updates, state = tx.update({"q_proj.weight": jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        kept = 1 - (number + 1) ** -0.8
        rows = kept * rows + (1 - kept) * np.mean(gradient**2, axis=1)
        columns = kept * columns + (1 - kept) * np.mean(gradient**2, axis=0)
        scaled = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
        scaled /= max(1.0, np.sqrt(np.mean(scaled**2)))
        expected = expected - rate * scaled - rate * decay * expected
    np.testing.assert_allclose(params["q_proj.weight"], expected, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_norms_and_biases_do_not_decay_and_the_rate_follows_the_schedule(tiny_model, optimizer):
    still = jax.tree.map(jnp.zeros_like, tiny_model)
    options = {"optimizer": optimizer, "learning_rate": 0.1, "weight_decay": 0.5}
    state = EasyDeLState.create(tiny_model, optimizer_of(scheduler="linear", **options))
    after = state.apply_gradients(still).apply_gradients(still).model
    np.testing.assert_array_equal(after.norm.weight, tiny_model.norm.weight)
    # Of ten updates the first takes the whole rate, the second nine tenths of it.
    kept = (1 - 0.1 * 0.5) * (1 - 0.09 * 0.5)
    np.testing.assert_allclose(after.embed_tokens.weight, kept * tiny_model.embed_tokens.weight, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_clipping_with_a_norm_that_is_known_is_that_of_optax(size):
    gradient = {"a": size * jnp.arange(5.0), "b": size * jnp.ones((2, 3))}
    expected, _ = optax.clip_by_global_norm(1.0).update(gradient, optax.EmptyState())
    tx = clip_by_global_norm(1.0)
    for found in (tx.update(gradient, ()), tx.update(gradient, (), grad_norm=optax.global_norm(gradient))):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found[0], expected)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_a_skipped_update_changes_no_bit_and_one_that_is_made_is_the_plain_one(tiny_model, optimizer):
    gradient = jax.tree.map(lambda leaf: 0.1 * leaf, tiny_model)
    norm = optax.global_norm(gradient)
    start = EasyDeLState.create(tiny_model, optimizer_of(optimizer=optimizer, learning_rate=1e-2))
    start = start.apply_gradients(gradient)

    @jax.jit
    def step(state: EasyDeLState, is_finite: bool) -> EasyDeLState:
        return state.apply_gradients(gradient, grad_norm=norm, is_finite=is_finite)

    skipped, made, plain = step(start, False), step(start, True), start.apply_gradients(gradient)
    assert int(skipped.step) == int(made.step) == 2
    for before, after in zip(
        jax.tree.leaves((start.model, start.opt_state)), jax.tree.leaves((skipped.model, skipped.opt_state))
    ):
        np.testing.assert_array_equal(after, before)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), made, plain)
    assert not np.array_equal(made.model.embed_tokens.weight, start.model.embed_tokens.weight)


def test_an_update_with_its_guard_passes_over_the_state_once():
    """Bytes that the compiled update touches, a parameter: 4 for the norm, 12 for each moment, 16 for the weight."""
    model = jax.eval_shape(lambda: LlamaForCausalLM.init(SMOLLM2, jax.random.key(0)))
    tx = optimizer_of(optimizer="adamw")
    state = jax.eval_shape(lambda model: EasyDeLState(jnp.int32(0), model, tx.init(model), tx), model)

    def step(state: EasyDeLState, gradient: LlamaForCausalLM, loss: float) -> EasyDeLState:
        norm = optax.global_norm(gradient)
        return state.apply_gradients(gradient, grad_norm=norm, is_finite=jnp.isfinite(norm) & jnp.isfinite(loss))

    compiled = jax.jit(step, donate_argnums=0).lower(state, model, 1.0).compile()
    memory, parameters = compiled.memory_analysis(), model.num_parameters
    touched = compiled.cost_analysis()["bytes accessed"] / parameters
    print(f"{touched:.1f} bytes a parameter; {memory.temp_size_in_bytes / parameters:.2f} in memory besides")
    assert touched < 45
    assert memory.temp_size_in_bytes < 0.01 * parameters
    assert memory.alias_size_in_bytes >= 12 * parameters


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra_optimizer_kwargs": {"mu_dtype": "int8"}}, "mu_dtype='int8', expected 'float32' or 'bfloat16'"),
        ({"extra_optimizer_kwargs": {"mu_dtype": 16}}, "mu_dtype=16, expected"),
        ({"extra_optimizer_kwargs": {"b1": "bfloat16"}}, "b1='bfloat16', expected a number"),
        (
            {"optimizer": "adafactor", "extra_optimizer_kwargs": {"dtype_momentum": "bfloat16"}},
            "no effect without momentum",
        ),
        ({"optimizer": "adafactor", "extra_optimizer_kwargs": {"b1": 0.9}}, "b1, which adafactor does not take"),
        ({"optimizer": "adafactor", "extra_optimizer_kwargs": {"weight_decay": 0.9}}, "does not take here"),
    ],
)
def test_what_an_optimiser_does_not_take_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TrainingArguments(**options)
