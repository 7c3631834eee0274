"""ORPO against its formula, and the log odds near certainty."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.trainers.direct_preference_optimization_trainer.objectives.orpo import ORPO, log_odds
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import (
    LENGTHS,
    LOGPS,
    assert_equals,
    log_sigmoid,
)

BETA = 0.3
LIKELY = -np.random.default_rng(1).uniform(0.05, 0.5, LOGPS.shape) * LENGTHS


@pytest.mark.parametrize("logps", [LOGPS, LIKELY], ids=["unlikely", "likely"])
def test_it_equals_its_formula(logps):
    """In the paper's form: odds of the geometric mean of the tokens' probabilities."""

    def odds(logp, length):
        p = np.exp(logp / length)
        return p / (1 - p)

    def form(pairs):
        ratio = odds(pairs.chosen, pairs.chosen_length) / odds(pairs.rejected, pairs.rejected_length)
        return -pairs.chosen / pairs.chosen_length.mean() - BETA * log_sigmoid(np.log(ratio))

    assert_equals(ORPO(beta=BETA), form, logps)


@pytest.mark.parametrize("logp", [-1e-5, -1e-3, -0.1, -0.6931, -0.6932, -3.0, -50.0])
def test_log_odds_are_those_of_float64(logp):
    expected = logp - np.log(-np.expm1(np.float64(np.float32(logp))))
    value, slope = jax.value_and_grad(log_odds)(jnp.float32(logp))
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(slope) == pytest.approx(-1 / np.expm1(np.float64(np.float32(logp))), rel=1e-4)


@pytest.mark.parametrize("logp", [0.0, -1e-30, -1e4])
def test_log_odds_of_certainty_are_finite(logp):
    value, slope = jax.value_and_grad(log_odds)(jnp.float32(logp))
    assert np.isfinite(value) and np.isfinite(slope)
