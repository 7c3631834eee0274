"""`linear_log_probs` against log-softmax of the whole logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.ops.linear_log_probs import linear_log_probs

ROWS, TOKENS, HIDDEN, VOCABULARY = 3, 13, 16, 50


def plain(hidden, weight, targets, soft_cap=None, logit_scale=1.0):
    logits = logit_scale * hidden.astype(jnp.float32) @ weight.astype(jnp.float32).T
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, TOKENS, HIDDEN)).astype(dtype)
    weight = jax.random.normal(keys[1], (VOCABULARY, HIDDEN)).astype(dtype)
    return (
        hidden,
        weight,
        jax.random.randint(keys[2], (ROWS, TOKENS), 0, VOCABULARY),
        jax.random.normal(keys[3], (ROWS, TOKENS)),
    )


@pytest.mark.parametrize("soft_cap, logit_scale", [(None, 1.0), (3.0, 1.0), (None, 0.125), (3.0, 2.0)])
@pytest.mark.parametrize("chunk_size", [1, 8, 39, 512])
def test_value_and_gradient_equal_the_plain_form(chunk_size, soft_cap, logit_scale):
    hidden, weight, targets, cotangent = inputs()

    def chunked_sum(h, w):
        return jnp.vdot(linear_log_probs(h, w, targets, None, chunk_size, soft_cap, logit_scale), cotangent)

    def plain_sum(h, w):
        return jnp.vdot(plain(h, w, targets, soft_cap, logit_scale), cotangent)

    value, gradients = jax.value_and_grad(chunked_sum, argnums=(0, 1))(hidden, weight)
    expected, expected_gradients = jax.value_and_grad(plain_sum, argnums=(0, 1))(hidden, weight)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_give_float32_sums_close_to_the_truth():
    hidden, weight, targets, _ = inputs(jnp.bfloat16)
    log_probs = linear_log_probs(hidden, weight, targets)
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, plain(hidden, weight, targets), atol=1e-5)


def test_rounding_over_a_large_vocabulary_does_not_add_up():
    # Summed one after the other, the many small exponentials of a position are lost to rounding, always downwards.
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (1, 64, HIDDEN))
    weight = jax.random.normal(keys[1], (49152, HIDDEN))
    targets = jax.random.randint(keys[2], (1, 64), 0, 49152)
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(weight, np.float64).T
    truth = logits[np.arange(64), np.asarray(targets[0])] - np.log(np.sum(np.exp(logits), axis=-1))
    assert abs(np.mean(linear_log_probs(hidden, weight, targets)[0] - truth)) < 1e-6


def test_extreme_logits_stay_finite():
    hidden, weight, targets, _ = inputs()
    value, gradient = jax.value_and_grad(lambda h: linear_log_probs(h * 1e4, weight, targets).sum())(hidden)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_the_logits_of_all_tokens_never_exist_at_once():
    tokens, vocabulary, chunk = 4096, 8192, 128
    hidden, weight, targets = (
        jnp.zeros((2, tokens // 2, 8)),
        jnp.zeros((vocabulary, 8)),
        jnp.zeros((2, tokens // 2), int),
    )
    step = jax.jit(jax.grad(lambda h, w: linear_log_probs(h, w, targets, None, chunk).sum(), (0, 1)))
    scratch = step.lower(hidden, weight).compile().memory_analysis().temp_size_in_bytes
    assert scratch < 4 * 4 * chunk * vocabulary < 4 * tokens * vocabulary / 4


@pytest.mark.parametrize("count", [0, 1, 5, TOKENS])
def test_columns_behind_the_count_give_nothing_and_cost_nothing(count):
    hidden, weight, targets, cotangent = inputs()
    used = jnp.arange(TOKENS) < count

    def counted(h, w, count):
        return jnp.vdot(jnp.where(used, linear_log_probs(h, w, targets, count, ROWS), 0.0), cotangent)

    def plain_sum(h, w):
        return jnp.vdot(jnp.where(used, plain(h, w, targets), 0.0), cotangent)

    gradients = jax.jit(jax.grad(counted, (0, 1)))(hidden, weight, count)
    for gradient, wanted in zip(gradients, jax.grad(plain_sum, (0, 1))(hidden, weight)):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
    # One column a chunk: what lies behind the count is never computed, so it may be anything.
    spoilt = jnp.where(used[:, None], hidden, jnp.nan)
    assert jnp.isfinite(linear_log_probs(spoilt, weight, targets, count, ROWS)).all()
