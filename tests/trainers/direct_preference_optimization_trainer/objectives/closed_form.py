"""Made-up pairs in float64, and the comparison of an objective with its formula written in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from easydel.trainers.direct_preference_optimization_trainer.objectives.combined import CombinedObjective
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import Objective
from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores

PAIRS = 6
RNG = np.random.default_rng(0)
LOGPS = RNG.normal(-30, 8, (2, PAIRS))
REFERENCE = LOGPS + RNG.normal(0, 3, (2, PAIRS))
LENGTHS = RNG.integers(3, 30, (2, PAIRS)).astype(float)
MARGINS = RNG.uniform(0, 2, PAIRS)


class Pairs(NamedTuple):
    """What a closed form is written in: one number a pair, nats and tokens."""

    chosen: np.ndarray
    rejected: np.ndarray
    reference_chosen: np.ndarray
    reference_rejected: np.ndarray
    chosen_length: np.ndarray
    rejected_length: np.ndarray
    margin: np.ndarray


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def sigma(x):
    return np.exp(log_sigmoid(x))


def scores_of(logps: Any, reference: Any = REFERENCE, margin: Any = MARGINS, extra_slots: int = 0) -> PairScores:
    """The pairs with the policy's log-probs `logps` [2, pairs]; empty slots stand behind them, as in a packed batch."""

    def padded(values: Any, constant: float = 0.0) -> jax.Array:
        values = jnp.asarray(values)
        return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, extra_slots)], constant_values=constant)

    is_pair = jnp.arange(PAIRS + extra_slots) < PAIRS
    return PairScores(
        *padded(logps),
        *padded(reference),
        *padded(LENGTHS, 1),
        is_pair,
        jnp.asarray(LENGTHS[0].mean()),
        padded(margin),
    )


def mean_loss(objective: Objective | CombinedObjective, logps: Any, extra_slots: int = 0) -> jax.Array:
    """The loss of the update."""
    scores = scores_of(logps, extra_slots=extra_slots)
    return jnp.sum(jnp.where(scores.is_pair, objective(scores), 0.0)) / PAIRS


def numerical_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[place] = step
        gradient[place] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


def assert_equals(objective: Objective, form: Callable[[Pairs], np.ndarray], logps: np.ndarray = LOGPS) -> None:
    """That value and gradient of an objective are those of its formula, to 1e-6."""

    def expected(x: np.ndarray) -> float:
        return form(Pairs(*x, *REFERENCE, *LENGTHS, MARGINS)).mean()

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(lambda x: mean_loss(objective, x, extra_slots=2))(jnp.asarray(logps))
        np.testing.assert_allclose(value, expected(logps), rtol=1e-6)
        wanted = numerical_gradient(expected, logps)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-6 * max(1, np.abs(wanted).max()))
