"""A family written in one file follows everywhere: logits over trees, generation, files, adapters, 8 bits, devices."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from easydel import AutoEasyDeLModelForCausalLM
from easydel.infra.mesh import create_mesh
from easydel.layers.lora import adapters, with_adapters
from easydel.modules import FAMILIES, register_family
from easydel.ops.attention.inputs import TokenIds
from tests.modules.gemma_like import GemmaLikeForCausalLM

RAW = {
    "model_type": "gemma_like",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_local_base_freq": 20.0,
    "query_pre_attn_scalar": 11.0,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
LONGEST = 28


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma_like", GemmaLikeForCausalLM)


@pytest.fixture(scope="module")
def model() -> GemmaLikeForCausalLM:
    """A model whose norms are random too, so that none can be forgotten unseen; its greedy answers vary."""
    made = GemmaLikeForCausalLM.init(GemmaLikeForCausalLM.read_config(RAW), jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.array(rng.normal(0, 1.2, leaf.shape), leaf.dtype) if "norm" in jax.tree_util.keystr(path) else leaf
        ),
        made,
    )


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gemma_like")
    model.save_pretrained(path)
    return path


def reference_logits(tensors: dict[str, np.ndarray], raw: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits of one plain sequence in float64, written from the family's description and the names of its files."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    heads, size, eps = raw["num_attention_heads"], raw["head_dim"], raw["rms_norm_eps"]
    positions = np.arange(len(tokens))

    def norm(name, x):
        return (1 + tensors[f"{name}.weight"]) * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)

    def cap(x, limit):
        return limit * np.tanh(x / limit)

    def turn(x, theta):
        angles = positions[:, None] / theta ** (np.arange(0, size, 2) / size)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = tensors["decoder.tokens.weight"][tokens] * np.float32(np.sqrt(raw["hidden_size"]))
    for layer in range(raw["num_hidden_layers"]):
        block = f"decoder.blocks.{layer}"
        is_global = (layer + 1) % raw["sliding_window_pattern"] == 0
        theta = raw["rope_theta"] if is_global else raw["rope_local_base_freq"]
        back = positions[:, None] - positions[None]
        seen = (back >= 0) & (is_global | (back < raw["sliding_window"]))
        h = norm(f"{block}.norm_before_mixing", x)
        q, k, v = (
            (h @ tensors[f"{block}.mixing.{name}.weight"].T).reshape(len(tokens), -1, size) for name in ("q", "k", "v")
        )
        q, k = turn(norm(f"{block}.mixing.q_norm", q), theta), turn(norm(f"{block}.mixing.k_norm", k), theta)
        k, v = (np.repeat(y, heads // y.shape[1], axis=1) for y in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(raw["query_pre_attn_scalar"])
        scores = np.where(seen, cap(scores, raw["attn_logit_softcapping"]), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v).reshape(len(tokens), -1)
        x = x + norm(f"{block}.norm_after_mixing", mixed @ tensors[f"{block}.mixing.o.weight"].T)
        h = norm(f"{block}.norm_before_mlp", x)
        gate, up = (h @ tensors[f"{block}.mlp.{name}.weight"].T for name in ("gate", "up"))
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + norm(f"{block}.norm_after_mlp", (gate * up) @ tensors[f"{block}.mlp.down.weight"].T)
    return cap(norm("decoder.last_norm", x) @ tensors["decoder.tokens.weight"].T, raw["final_logit_softcapping"])


def two_trees(rng: np.random.Generator) -> tuple[np.ndarray, TokenIds, list[np.ndarray]]:
    """A row of two trees with three and two branches and padding, and the slots of each of their five sequences."""
    segment, branch, position, sequences = [], [], [], []
    for tree, (trunk, *branches) in enumerate([(9, 7, 4, 11), (6, 8, 3)], start=1):
        slots = np.arange(len(segment), len(segment) + trunk)
        segment += [tree] * trunk
        branch += [0] * trunk
        position += range(trunk)
        for number, size in enumerate(branches, start=1):
            sequences.append(np.concatenate([slots, np.arange(len(segment), len(segment) + size)]))
            segment += [tree] * size
            branch += [number] * size
            position += range(trunk, trunk + size)
    ids = TokenIds(*(jnp.array([[*values, 0, 0]]) for values in (segment, branch, position)))
    return rng.integers(1, 64, ids.segment.shape), ids, sequences


def test_logits_over_trees_are_those_of_the_reference_for_each_sequence(model, folder):
    tokens, ids, sequences = two_trees(np.random.default_rng(2))
    logits = np.asarray(jax.jit(lambda model: model.logits(model.hidden_states(tokens, ids).hidden))(model))
    tensors = load_file(folder / "model.safetensors")
    expected = [reference_logits(tensors, RAW, tokens[0, slots]) for slots in sequences]
    errors = [np.abs(logits[0, slots] - theirs).max() for slots, theirs in zip(sequences, expected)]
    print(
        f"largest logit error {max(errors):.1e}, largest logit {max(np.abs(theirs).max() for theirs in expected):.1f}"
    )
    assert max(errors) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"rope_local_base_freq": 500.0},
        {"rope_theta": 20.0},
        {"sliding_window": 6},
        {"sliding_window_pattern": 4},
        {"query_pre_attn_scalar": 16.0},
        {"attn_logit_softcapping": 4.0},
        {"final_logit_softcapping": 6.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_comparison_sees_each_of_the_familys_settings(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tokens = np.random.default_rng(2).integers(1, 64, 20)
    assert np.abs(reference_logits(tensors, RAW, tokens) - reference_logits(tensors, RAW | change, tokens)).max() > 1e-3


def test_log_probs_and_their_gradient_are_those_of_the_capped_logits(model):
    tokens, ids, _ = two_trees(np.random.default_rng(3))
    targets = np.roll(tokens, -1, axis=1)

    def straight(model):
        return jnp.sum(model.log_probs(model.hidden_states(tokens, ids, remat=True).hidden, targets))

    def by_logits(model):
        log_probs = jax.nn.log_softmax(model.logits(model.hidden_states(tokens, ids).hidden))
        return jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1))

    (ours, gradient), (theirs, expected) = (jax.jit(jax.value_and_grad(f))(model) for f in (straight, by_logits))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected)
    hidden = model.hidden_states(tokens, ids).hidden
    collision = jax.nn.logsumexp(2 * jax.nn.log_softmax(model.logits(hidden)), axis=-1)
    np.testing.assert_allclose(model.log_collision(hidden), collision, rtol=1e-5)


def test_greedy_generation_with_the_cache_is_the_argmax_of_whole_forward_passes_beyond_the_window(model):
    prompts = [np.random.default_rng(seed).integers(1, 64, size).tolist() for seed, size in ((4, 9), (5, 3))]
    logits = jax.jit(lambda model, tokens: model(tokens))
    expected = []
    for prompt in prompts:
        sequence = list(prompt)
        while len(sequence) < len(prompt) + 14:
            padded = jnp.array([sequence + [0] * (LONGEST - len(sequence))])
            sequence.append(int(jnp.argmax(logits(model, padded)[0, len(sequence) - 1])))
        expected.append(sequence[len(prompt) :])
    assert len(set(expected[0])) > 4
    assert model.generate(prompts, max_new_tokens=14) == expected


def test_saving_and_loading_changes_nothing(model, folder):
    names = set(load_file(folder / "model.safetensors"))
    assert {"decoder.tokens.weight", "decoder.blocks.3.mixing.q.weight"} < names and len(names) == 2 + 4 * 13
    again = AutoEasyDeLModelForCausalLM.from_pretrained(folder)
    assert type(again) is GemmaLikeForCausalLM and again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, again))
    written = json.loads((folder / "config.json").read_text())
    assert {name: written[name] for name in RAW} == RAW


def test_adapters_are_put_on_merged_saved_and_loaded(model, tmp_path):
    tokens = jnp.array(np.random.default_rng(6).integers(1, 64, (2, 12)))
    adapted = model.apply_lora_to_layers(rank=4, pattern="q_proj|down_proj")
    keys = jax.random.split(jax.random.key(7), 2)
    moved = with_adapters(
        adapted,
        {
            path: type(adapter)(adapter.a, 0.1 * jax.random.normal(key, adapter.b.shape), 8.0, 0.0, False)
            for key, (path, adapter) in zip(keys, adapters(adapted).items())
        },
    )
    logits = moved(tokens)
    assert np.abs(logits - model(tokens)).max() > 1e-2
    np.testing.assert_allclose(moved.merge_lora()(tokens), logits, atol=1e-5)
    moved.save_adapter(tmp_path)
    assert "base_model.model.decoder.blocks.0.mixing.q.lora_A.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )
    np.testing.assert_array_equal(model.load_adapter(tmp_path)(tokens), logits)


def test_weights_in_8_bits_compute_what_they_stand_for(model):
    tokens = jnp.array(np.random.default_rng(8).integers(1, 64, (2, 12)))
    quantised = model.quantize()
    assert quantised.is_quantized
    np.testing.assert_allclose(quantised(tokens), quantised.merge_lora()(tokens), atol=2e-5)
    assert 0 < np.abs(quantised(tokens) - model(tokens)).mean() < 0.1


@pytest.mark.devices
@pytest.mark.parametrize("dims", [(1, -1, 1, 1, 1), (1, 1, 1, -1, 1)], ids=["fsdp", "tp"])
def test_a_model_spread_over_devices_computes_the_same(model, dims):
    tokens = jnp.array(np.random.default_rng(9).integers(1, 64, (8, 16)))
    mesh = create_mesh(dims)
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda model: model(tokens))(model.shard(mesh))
    np.testing.assert_allclose(logits, jax.jit(lambda model: model(tokens))(model), atol=1e-5)


def test_a_layer_whose_rotary_table_is_missing_is_refused(model):
    class OneTable(type(model.config)):
        rotary_tables = (None,)

    fields = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)}
    with pytest.raises(ValueError, match=r"layer_rotary=\(1, 0, 1, 0\) names more than the 1 of rotary_tables"):
        OneTable(**fields)


def test_a_second_class_of_a_model_type_is_refused():
    assert register_family(GemmaLikeForCausalLM) is GemmaLikeForCausalLM
    other = type("Other", (GemmaLikeForCausalLM,), {})
    with pytest.raises(ValueError, match='Other has model_type "gemma_like", which GemmaLikeForCausalLM reads'):
        register_family(other)
