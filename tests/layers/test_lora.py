"""Adapters as mathematics: what they add, what they leave alone."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from easydel.infra.mesh import create_mesh
from easydel.layers.lora import adapters, adapters_are_at_start, split_trainable, with_adapters, with_dropout
from easydel.modules.llama import LlamaForCausalLM
from easydel.trainers.training_arguments import TrainingArguments
from tests.tiny import VOCABULARY, tiny_config

LAYERS = [f"layers.self_attn.{name}_proj" for name in "qkvo"] + [
    f"layers.mlp.{name}_proj" for name in ("gate", "up", "down")
]
IDS = jnp.array(np.random.default_rng(0).integers(1, VOCABULARY, (2, 12)))


def moved(model, seed: int = 1):
    """The same adapters with a second factor that is not zero."""
    new = {}
    for index, (path, adapter) in enumerate(adapters(model).items()):
        noise = 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), adapter.b.shape)
        new[path] = dataclasses.replace(adapter, b=noise)
    return with_adapters(model, new)


def test_fresh_adapters_change_nothing_and_start_as_in_peft(tiny_model):
    model = tiny_model.apply_lora_to_layers(rank=4)
    assert list(adapters(model)) == LAYERS and model.has_lora and not tiny_model.has_lora
    np.testing.assert_array_equal(model(IDS), tiny_model(IDS))
    for adapter in adapters(model).values():
        bound = 1 / math.sqrt(adapter.a.shape[-1])
        assert adapter.a.dtype == adapter.b.dtype == jnp.float32
        assert 0.9 * bound < float(jnp.abs(adapter.a).max()) <= bound
        assert float(jnp.std(adapter.a)) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not np.any(adapter.b)
    assert adapters_are_at_start(model) and not adapters_are_at_start(moved(model))
    first, other = (tiny_model.apply_lora_to_layers(4, seed=seed) for seed in (0, 1))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), first, model))
    assert not np.array_equal(other.layers.mlp.up_proj.lora.a, first.layers.mlp.up_proj.lora.a)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_layer_with_an_adapter_is_the_formula(tiny_model, use_rslora):
    model = moved(tiny_model.apply_lora_to_layers(4, alpha=6, use_rslora=use_rslora))
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    layer = jax.tree.map(lambda leaf: leaf[1], model.layers.self_attn.q_proj)
    weight, a, b = (np.asarray(leaf, np.float64) for leaf in (layer.weight, layer.lora.a, layer.lora.b))
    scale = 6 / math.sqrt(4) if use_rslora else 6 / 4
    np.testing.assert_allclose(layer(jnp.array(x)), x @ weight.T + scale * (x @ a.T) @ b.T, rtol=1e-5, atol=1e-5)


def test_alpha_is_twice_the_rank_where_none_is_given(tiny_model):
    assert {adapter.scale for adapter in adapters(tiny_model.apply_lora_to_layers(3)).values()} == {2.0}


def test_the_pattern_chooses_layers_by_path(tiny_model):
    assert list(adapters(tiny_model.apply_lora_to_layers(2, pattern="q_proj|v_proj"))) == [LAYERS[0], LAYERS[2]]
    assert list(adapters(tiny_model.apply_lora_to_layers(2, pattern=r"mlp\..*_proj"))) == LAYERS[4:]
    with pytest.raises(ValueError, match="pattern='lm_head' matches none of the layers; there are layers.self_attn.q_"):
        tiny_model.apply_lora_to_layers(2, pattern="lm_head")


def test_what_makes_no_adapter_is_refused(tiny_model):
    with pytest.raises(ValueError, match="has adapters already; merge_lora"):
        tiny_model.apply_lora_to_layers(2).apply_lora_to_layers(2)
    nan, inf = math.nan, math.inf
    for options in (
        *({"rank": rank} for rank in (0, -1, 2.0, "2", True)),
        *({"rank": 2, "alpha": alpha} for alpha in (0.0, -1, nan, inf, 1e300)),
        *({"rank": 2, "dropout": dropout} for dropout in (1.0, -0.1, nan)),
    ):
        with pytest.raises(ValueError, match="expected at least 1"):
            tiny_model.apply_lora_to_layers(**options)


def test_a_rank_above_the_smaller_side_of_a_matrix_is_refused_by_name(tiny_model):
    with pytest.raises(ValueError) as error:
        tiny_model.apply_lora_to_layers(17)
    assert "lora_rank=17 is more than the smaller side" in str(error.value)
    assert "layers.self_attn.k_proj is 16 x 32" in str(error.value) and "q_proj" not in str(error.value)
    with pytest.raises(ValueError, match="lora_rank=1099511627776 is more"):
        tiny_model.apply_lora_to_layers(2**40)
    assert tiny_model.apply_lora_to_layers(16).has_lora and tiny_model.apply_lora_to_layers(32, pattern="mlp").has_lora


def test_a_pattern_that_is_no_regular_expression_is_refused(tiny_model):
    for pattern in ("q_proj(", "[", "*", "a{99999999999}"):
        for make in (lambda p: tiny_model.apply_lora_to_layers(2, pattern=p), tiny_model.quantize):
            with pytest.raises(ValueError, match="regular expression"):
                make(pattern)
        with pytest.raises(ValueError, match="lora_pattern: .*regular expression"):
            TrainingArguments(lora_rank=2, lora_pattern=pattern)


@pytest.mark.parametrize("bias", [False, True])
def test_merged_weights_compute_the_same_and_untouched_ones_are_shared(bias):
    config = tiny_config(qkv_bias=bias, attention_output_bias=bias, mlp_bias=bias, tie_word_embeddings=False)
    plain = LlamaForCausalLM.init(config, jax.random.key(0))
    model = moved(plain.apply_lora_to_layers(4, pattern="q_proj|down_proj"))
    merged = model.merge_lora()
    assert float(jnp.abs(merged(IDS) - plain(IDS)).max()) > 0.1
    np.testing.assert_allclose(merged(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    shared = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x, y: x is y, merged, plain))
    changed = {jax.tree_util.keystr(path, simple=True, separator=".") for path, same in shared if not same}
    assert changed == {"layers.self_attn.q_proj.weight", "layers.mlp.down_proj.weight"}
    off = model.without_lora()
    assert all(x is y for x, y in zip(jax.tree.leaves(off), jax.tree.leaves(plain)))
    assert jax.tree.structure(off) == jax.tree.structure(plain)


def test_merging_rounds_once_to_the_dtype_of_the_weights(tiny_model):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model)
    model = moved(half.apply_lora_to_layers(4, pattern="q_proj"))
    layer = model.layers.self_attn.q_proj
    assert layer.lora.a.dtype == jnp.float32
    exact = np.asarray(layer.weight, np.float64) + 2 * np.asarray(layer.lora.b, np.float64) @ np.asarray(layer.lora.a)
    merged = model.merge_lora().layers.self_attn.q_proj.weight
    assert merged.dtype == jnp.bfloat16
    # Half a unit in the last place of eight bits.
    np.testing.assert_allclose(np.asarray(merged, np.float64), exact, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_generation_refuses_token_ids_outside_the_vocabulary(tiny_model, token):
    with pytest.raises(ValueError, match=f"a prompt holds token id {token}; expected ids"):
        tiny_model.generate([[1, 2], [3, token]], max_new_tokens=1)


def test_generation_runs_with_adapters(tiny_model):
    model = moved(tiny_model.apply_lora_to_layers(4))
    assert model.generate([[5, 6, 7]], max_new_tokens=6) == model.merge_lora().generate([[5, 6, 7]], max_new_tokens=6)


def test_parameters_and_arithmetic_are_counted(tiny_model):
    rank, (hidden, inner, keys) = 4, (32, 64, 16)
    model = tiny_model.apply_lora_to_layers(rank, pattern="q_proj|up_proj|k_proj")
    adapted = 2 * rank * ((hidden + hidden) + (hidden + inner) + (hidden + keys))
    assert model.num_trainable_parameters == adapted
    assert model.num_parameters == tiny_model.num_parameters + adapted
    assert tiny_model.num_trainable_parameters == tiny_model.num_parameters
    assert model.flops_per_token == tiny_model.flops_per_token + 2 * adapted
    assert tiny_model.training_flops_per_token == 3 * tiny_model.flops_per_token
    # A frozen weight has a forward pass and the gradient of its input, an adapter also that of its weight.
    assert model.training_flops_per_token == 2 * tiny_model.flops_per_token + 6 * adapted


def test_the_trainable_part_is_the_adapters_alone_or_everything(tiny_model):
    trainable, frozen = split_trainable(tiny_model)
    assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(tiny_model)) and not jax.tree.leaves(frozen)
    model = tiny_model.apply_lora_to_layers(4, pattern="q_proj|v_proj")
    trainable, frozen = split_trainable(model)
    assert len(jax.tree.leaves(trainable)) == 4
    assert [x is y for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(tiny_model))].count(False) == 0


def test_dropout_differs_by_layer_module_and_key_and_keeps_the_mean(tiny_model):
    model = moved(tiny_model.apply_lora_to_layers(4, dropout=0.25, pattern="q_proj|k_proj"))
    dropped = with_dropout(model, jax.random.key(0)).layers.self_attn
    keys = [jax.random.key_data(layer.lora.dropout_key) for layer in (dropped.q_proj, dropped.k_proj)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 4
    layer = jax.tree.map(lambda leaf: leaf[0], dropped.q_proj)
    # A unit input shows what is left of each feature.
    seen = dataclasses.replace(layer.lora, a=jnp.eye(32), b=jnp.eye(32), alpha=32.0)(jnp.ones((500, 32)))
    assert set(np.unique(np.round(seen, 4))) == {0.0, np.float32(1.3333)}
    assert float(seen.mean()) == pytest.approx(1.0, abs=0.02)
    calls = [with_dropout(model, jax.random.key(key))(IDS) for key in (0, 0, 1)]
    np.testing.assert_array_equal(calls[0], calls[1])
    assert float(jnp.abs(calls[0] - calls[2]).max()) > 1e-3
    # Without a key nothing is left out, and without dropout a key changes nothing.
    np.testing.assert_allclose(model(IDS), model.merge_lora()(IDS), rtol=1e-5, atol=1e-5)
    steady = tiny_model.apply_lora_to_layers(4)
    assert jax.tree.structure(with_dropout(steady, jax.random.key(0))) == jax.tree.structure(steady)


@pytest.mark.devices
def test_adapters_lie_on_the_mesh_of_the_model(tiny_model):
    mesh = create_mesh((1, 1, 1, 1, 1), jax.devices()[:1])
    model = tiny_model.shard(mesh).apply_lora_to_layers(2)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(model)} == {mesh}
    assert model.layers.mlp.down_proj.lora.a.sharding.spec == PartitionSpec(None, None, "tp")
    assert model.layers.mlp.up_proj.lora.b.sharding.spec == PartitionSpec(None, "tp", None)
