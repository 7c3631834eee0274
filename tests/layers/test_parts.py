"""The parts of a layer, each against its formula."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.infra.rotary_config import RotaryTable
from easydel.layers.attention import SelfAttention
from easydel.layers.decoder_layer import PostNormLayer, PreNormLayer, SandwichNormLayer
from easydel.layers.embedding import Embedding
from easydel.layers.mlp import GatedMLP
from easydel.layers.norm import RMSNorm
from easydel.layers.rotary import table_angles

HIDDEN, TOKENS = 12, 5
X = jax.random.normal(jax.random.key(0), (TOKENS, HIDDEN))
POSITIONS = jnp.arange(TOKENS)
IS_TOKEN = jnp.ones(TOKENS, bool)


def random_norm(size: int, seed: int = 0, **options) -> RMSNorm:
    weight = jax.random.normal(jax.random.fold_in(jax.random.key(seed), size), (size,))
    return RMSNorm(weight, 1e-3, **options)


def scaled(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_multiplies_by_offset_and_weight(offset):
    norm = random_norm(HIDDEN, offset=offset)
    np.testing.assert_allclose(norm(X), (offset + norm.weight) * scaled(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(RMSNorm.init(HIDDEN, 1e-3, offset=offset)(X), scaled(X), rtol=1e-5, atol=1e-6)


def test_a_norm_rounds_before_or_after_its_weight():
    x = X.astype(jnp.bfloat16)
    after, before = (random_norm(HIDDEN, casts_first=first) for first in (False, True))
    exact = jnp.array(scaled(x), jnp.float32)
    np.testing.assert_array_equal(after(x), (after.weight * exact).astype(jnp.bfloat16))
    np.testing.assert_array_equal(before(x), before.weight.astype(jnp.bfloat16) * exact.astype(jnp.bfloat16))
    assert (after(x) != before(x)).any()


@pytest.mark.parametrize("width", ["head", "projection"])
def test_queries_and_keys_are_normalised_by_head_or_by_whole_projection(width):
    attention = SelfAttention.init(
        jax.random.key(1), HIDDEN, 4, 2, 6, 0.3, norm=functools.partial(random_norm, seed=2), norm_width=width
    )
    seen = {}

    def attend(q, k, v):
        seen.update(q=q, k=k, v=v)
        return q, "kept"

    _, kept = attention(X, table_angles(None, POSITIONS, 6), attend)
    assert kept == "kept" and attention.kv_heads == 2
    for name, norm, heads in (("q", attention.q_norm, 4), ("k", attention.k_norm, 2)):
        projected = np.asarray(X @ getattr(attention, f"{name}_proj").weight.T)
        per_head = projected.reshape(TOKENS, heads, 6)
        expected = scaled(per_head if width == "head" else projected).reshape(TOKENS, heads, 6)
        expected = expected * np.reshape(norm.weight, (-1, 6))
        np.testing.assert_allclose(seen[name], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["v"].reshape(TOKENS, -1), X @ attention.v_proj.weight.T, rtol=1e-5)


def test_rotary_tables_turn_by_their_own_base_and_none_not_at_all():
    q = jax.random.normal(jax.random.key(3), (TOKENS, 2, 6))
    attention = SelfAttention.init(jax.random.key(1), 12, 2, 2, 6, 0.3)
    turned = {}
    for theta in (None, 10.0, 1000.0):
        table = None if theta is None else RotaryTable(theta)
        attention(
            q.reshape(TOKENS, -1),
            table_angles(table, POSITIONS, 6),
            lambda q, k, v, t=theta: (turned.setdefault(t, q), None),
        )
    plain = turned[None].reshape(TOKENS, 2, 2, 3)
    for theta in (10.0, 1000.0):
        angles = np.arange(TOKENS)[:, None, None] / theta ** (np.arange(3) / 3)
        expected = (plain[:, :, 0] + 1j * plain[:, :, 1]) * np.exp(1j * angles)
        np.testing.assert_allclose(turned[theta][..., :3], expected.real, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(turned[theta][..., 3:], expected.imag, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_a_gated_mlp_is_its_formula(activation):
    mlp = GatedMLP.init(jax.random.key(4), HIDDEN, 20, 0.3, activation=activation)
    gate, up = (np.asarray(X @ linear.weight.T, np.float64) for linear in (mlp.gate_proj, mlp.up_proj))
    tanh = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    expected = (gate / (1 + np.exp(-gate)) if activation == "silu" else tanh) * up @ np.asarray(mlp.down_proj.weight).T
    out, auxiliary = mlp(X, IS_TOKEN)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert auxiliary == {}


def test_norms_stand_where_the_layers_class_says():
    attention = SelfAttention.init(jax.random.key(5), HIDDEN, 2, 2, 6, 0.3)
    mlp = GatedMLP.init(jax.random.key(6), HIDDEN, 20, 0.3)
    n1, n2, n3, n4 = (random_norm(HIDDEN, seed) for seed in range(4))
    angles = table_angles(RotaryTable(100.0), POSITIONS, 6)

    def attend(q, k, v):
        return q + k + v, None

    def a(x):
        return attention(x, angles, attend)[0]

    def m(x):
        return mlp(x, IS_TOKEN)[0]

    x = X + 0.5 * a(n1(X))
    pre = x + 0.5 * m(n2(x))
    x = X + n1(a(X))
    post = x + n2(m(x))
    x = X + n2(a(n1(X)))
    sandwich = x + n4(m(n3(x)))
    for layer, expected in (
        (PreNormLayer(n1, attention, n2, mlp, residual_scale=0.5), pre),
        (PostNormLayer(attention, n1, mlp, n2), post),
        (SandwichNormLayer(n1, attention, n2, n3, mlp, n4), sandwich),
    ):
        np.testing.assert_allclose(layer(X, angles, attend, IS_TOKEN)[0], expected, rtol=1e-5, atol=1e-6)


def test_embeddings_are_scaled_in_the_compute_dtype():
    embedding = Embedding.init(jax.random.key(7), 8, HIDDEN, 1.0)
    ids = jnp.array([3, 0])
    scale = 5.656854
    expected = embedding.weight[ids].astype(jnp.bfloat16) * jnp.bfloat16(scale)
    np.testing.assert_array_equal(embedding(ids, jnp.bfloat16, scale), expected)
    np.testing.assert_array_equal(embedding(ids, jnp.float32), embedding.weight[ids])
