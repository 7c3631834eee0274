"""bfloat16 compute over float32 master weights."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.infra.mesh import put_batch
from easydel.layers.lora import split_trainable

OPTIONS = {"total_batch_size": 4, "save_directory": None, "progress_bar": False, "shuffle_train_dataset": False}


@pytest.fixture
def make(tiny_model, tokenizer, rows):
    def make(dtype=jnp.bfloat16, param_dtype=jnp.float32, **options) -> DPOTrainer:
        model = jax.tree.map(lambda leaf: leaf.astype(param_dtype), tiny_model)
        model = dataclasses.replace(model, dtype=np.dtype(dtype))
        return DPOTrainer(DPOConfig(**(OPTIONS | options)), model, None, tokenizer, Dataset.from_list(rows))

    return make


def products_of(trainer: DPOTrainer) -> dict[str, str]:
    """The operands and the result of every matrix product of the training step, by where the source asks for it."""
    batch = next(iter(trainer.dataloaders.train))
    with jax.set_mesh(trainer.mesh):
        prepared = trainer.prepare_batch(trainer.state, batch, put_batch(batch, trainer.mesh))
        text = trainer.functions.sharded_training_step_function.lower(trainer.state, prepared).as_text()
    return re.findall(
        r"stablehlo\.dot_general.*?: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\) -> tensor<[\dx]*(\w+)>", text
    )


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_products_are_bfloat16_and_what_is_kept_is_float32(make, options):
    trainer = make(**options)
    products = products_of(trainer)
    large = [product for product in products if "bf16" in product]
    # The rest are the sums over a completion's tokens and the rotation's angles, which have no weights.
    print(f"{len(large)} of {len(products)} products in bfloat16; the rest: {set(products) - set(large)}")
    assert len(large) > 20
    assert all(left == right == "bf16" for left, right, _ in large)
    state = trainer.train().state
    assert {leaf.dtype for leaf in jax.tree.leaves(split_trainable(state.model)[0])} == {np.dtype("float32")}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert moments and {leaf.dtype for leaf in moments} == {np.dtype("float32")}


def test_gradients_add_up_in_float32_over_micro_batches(make):
    trainer = make(gradient_accumulation_steps=2)
    batch = next(iter(trainer.dataloaders.train))
    with jax.set_mesh(trainer.mesh):
        prepared = trainer.prepare_batch(trainer.state, batch, put_batch(batch, trainer.mesh))
        jaxpr = jax.make_jaxpr(trainer.make_steps()[0])(trainer.state, prepared)
    shapes = {leaf.shape for leaf in jax.tree.leaves(trainer.model)}
    # The gradients are the references that the program makes.
    made = [value.aval for eqn in jaxpr.eqns for value in eqn.outvars if isinstance(value.aval, jax.ref.AbstractRef)]
    assert shapes <= {ref.shape for ref in made}
    assert {ref.dtype for ref in made} == {np.dtype("float32")}


def test_bfloat16_trains_as_float32_does_within_its_rounding(make):
    half, whole = (
        [line["train/loss"] for line in make(dtype, learning_rate=3e-3, num_train_epochs=3).train().log_history]
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert half[0] == pytest.approx(np.log(2), abs=2e-2)
    assert half[-1] < 0.5 * half[0]
    np.testing.assert_allclose(half, whole, atol=0.05)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_a_small_learning_rate_moves_float32_masters_and_not_bfloat16_weights(make, options):
    """DPO's rates are near 1e-6: a thousandth of the step between two bfloat16 numbers of a weight's size."""

    def share_moved(**dtypes) -> float:
        trainer = make(learning_rate=1e-6, weight_decay=0.0, scheduler="constant", **dtypes, **options)
        before = [np.asarray(leaf) for leaf in jax.tree.leaves(split_trainable(trainer.model)[0])]
        after = jax.tree.leaves(split_trainable(trainer.train().state.model)[0])
        # What has no gradient (tokens that do not occur, factors behind a zero one) does not count.
        moved = [(old != new).mean() for old, new in zip(before, after) if np.any(old)]
        return float(np.mean(moved))

    kept = share_moved()
    print(f"moved by three updates at 1e-6: {kept:.3f} of float32 masters")
    assert kept > 0.9
    if not options:
        rounded = share_moved(param_dtype=jnp.bfloat16)
        print(f"                                {rounded:.3f} of bfloat16 weights")
        assert rounded < 0.1
