"""Weights in 8 bits: how far off, how large, and what adapters beside them do."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easydel import EasyDeLState, LlamaForCausalLM
from easydel.layers.linear import QuantizedWeight
from easydel.layers.surgery import layer_linears
from easydel.weights.fingerprint import fingerprint
from tests.layers.test_lora import IDS, moved


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_no_entry_is_off_by_more_than_half_a_step_of_its_row():
    weight = jax.random.normal(jax.random.key(0), (3, 64, 256)) * jnp.arange(1, 4)[:, None, None]
    weight = weight.at[0, 0].set(0.0)
    quantized = QuantizedWeight.of(weight)
    step = np.abs(weight).max(axis=-1, keepdims=True) / 127
    error = np.abs(quantized.dequantize() - weight)
    assert (error <= step / 2 * (1 + 1e-4)).all() and not error[0, 0].any()
    relative = float(np.sqrt(np.mean(error**2) / np.mean(np.square(weight))))
    print(f"root mean square error of a normal weight: {relative:.4f} of its size")
    assert relative < 0.01
    # An even error of a step has the variance step^2 / 12.
    assert np.sqrt(np.mean(error[1:] ** 2 / step[1:] ** 2)) == pytest.approx(1 / np.sqrt(12), rel=0.02)
    assert int(np.abs(quantized.values).max()) == 127


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_is_that_of_the_weight_it_stands_for(dtype):
    weight, x = (jax.random.normal(jax.random.key(key), (32, 64)) for key in (0, 1))
    quantized = QuantizedWeight.of(weight)
    found = quantized.product(x.astype(dtype))
    assert found.dtype == dtype
    expected = np.asarray(x.astype(dtype), np.float64) @ np.asarray(quantized.dequantize(), np.float64).T
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=20 * tolerance)


def test_the_layers_take_a_quarter_of_their_memory_and_the_rest_is_shared(tiny_model):
    model = tiny_model.quantize()
    assert model.is_quantized and not tiny_model.is_quantized
    weights, rows = (
        sum(f(linear.weight.shape) for linear in layer_linears(tiny_model).values())
        for f in (lambda shape: np.prod(shape), lambda shape: shape[0] * shape[1])
    )
    assert nbytes(tiny_model) - nbytes(model) == 3 * weights - 4 * rows
    print(f"bytes of the layers' matrices: {4 * weights} before, {weights + 4 * rows} after")
    assert model.embed_tokens.weight is tiny_model.embed_tokens.weight
    assert model.layers.input_layernorm.weight is tiny_model.layers.input_layernorm.weight
    assert model.flops_per_token == tiny_model.flops_per_token
    error, size = (float(jnp.sqrt(jnp.mean(x**2))) for x in (model(IDS) - tiny_model(IDS), tiny_model(IDS)))
    print(f"root mean square error of the logits: {error / size:.4f} of their size")
    assert error < 0.03 * size  # fourteen products, each with weights that are off by less than 0.7 %
    some = tiny_model.quantize("mlp")
    assert isinstance(some.layers.mlp.up_proj.weight, QuantizedWeight)
    assert some.layers.self_attn.q_proj.weight is tiny_model.layers.self_attn.q_proj.weight
    with pytest.raises(ValueError, match="matches none of the layers"):
        tiny_model.quantize("lm_head")
    with pytest.raises(ValueError, match="quantised weights already"):
        model.quantize()


def test_adapters_beside_quantised_weights_merge_into_plain_ones(tiny_model, tmp_path):
    model = moved(tiny_model.quantize().apply_lora_to_layers(4, pattern="q_proj"))
    merged = model.merge_lora()
    assert not merged.is_quantized and jax.tree.structure(merged) == jax.tree.structure(tiny_model)
    np.testing.assert_allclose(merged(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model)
    assert half.quantize().merge_lora().layers.mlp.up_proj.weight.dtype == jnp.bfloat16
    assert model.generate([[5, 6, 7]], max_new_tokens=4) == merged.generate([[5, 6, 7]], max_new_tokens=4)
    assert fingerprint(model) != fingerprint(moved(tiny_model.apply_lora_to_layers(4, pattern="q_proj")))


def test_a_quantised_model_is_saved_as_a_plain_one(tmp_path):
    from tests.weights.test_peft import BASE, GOLDEN

    model = LlamaForCausalLM.from_pretrained(BASE).quantize().load_adapter(GOLDEN)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(loaded(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_quantised_weights_alone_cannot_be_trained(tiny_model):
    with pytest.raises(ValueError, match="quantised to 8 bits, which no optimiser can train"):
        EasyDeLState.create(tiny_model.quantize(), optax.adamw(1e-3))
    assert EasyDeLState.create(tiny_model.quantize()).opt_state is None


def test_rows_that_have_no_scale_become_zeros_and_tiny_shapes_work():
    weight = jnp.array([[0.0, 0.0], [1e-44, -1e-44], [1e-30, 2e-30], [3e38, -3e38]])
    quantized = QuantizedWeight.of(weight)
    assert (np.asarray(quantized.scale) > 0).all()
    np.testing.assert_allclose(quantized.dequantize()[2:], weight[2:], rtol=0.01)
    assert not np.any(quantized.dequantize()[0]) and np.abs(quantized.dequantize()[1]).max() <= 1e-44
    np.testing.assert_array_equal(QuantizedWeight.of(jnp.ones((1, 1))).dequantize(), [[1.0]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_quantised(tiny_model, value):
    up = tiny_model.layers.mlp.up_proj
    weight = up.weight.at[1, 2, 3].set(value)
    broken = eqx.tree_at(lambda model: model.layers.mlp.up_proj.weight, tiny_model, weight)
    with pytest.raises(ValueError, match=r"cannot be quantised: layers\.mlp\.up_proj\.$"):
        broken.quantize()
    assert broken.quantize("down_proj").is_quantized


def test_a_pattern_that_matches_nothing_is_refused(tiny_model):
    with pytest.raises(ValueError, match="pattern='embed' matches none of the layers; there are layers.self_attn"):
        tiny_model.quantize("embed")
