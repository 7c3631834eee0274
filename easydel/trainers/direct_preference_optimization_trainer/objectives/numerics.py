"""Compute the sigmoids and exponentials of objectives, bounded so that no loss or gradient overflows in float32.

Functions import JAX when they are first called: the help and the checks of a config read the objectives' options, and
should not wait seconds for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PerPair

# The square of exp(40) is still finite in float32, so neither a loss nor its gradient can overflow.
LARGEST_EXPONENT = 40.0


def log_sigmoid(x: PerPair) -> PerPair:
    """log(1 / (1 + exp(-x)))."""
    import jax

    return jax.nn.log_sigmoid(x)


def sigmoid(x: PerPair) -> PerPair:
    """1 / (1 + exp(-x))."""
    import jax

    return jax.nn.sigmoid(x)


def smoothed_log_sigmoid(x: PerPair, label_smoothing: float) -> PerPair:
    """log sigma(x), each label flipped at rate `label_smoothing`: (1 - eps) log sigma(x) + eps log sigma(-x)."""
    return (1 - label_smoothing) * log_sigmoid(x) + label_smoothing * log_sigmoid(-x)


def exp(x: PerPair, largest: float = LARGEST_EXPONENT) -> PerPair:
    """exp(x), constant above `largest`."""
    import jax.numpy as jnp

    return jnp.exp(jnp.minimum(x, largest))


def expm1(x: PerPair) -> PerPair:
    """exp(x) - 1, exact near 0, constant above `LARGEST_EXPONENT`."""
    import jax.numpy as jnp

    return jnp.expm1(jnp.minimum(x, LARGEST_EXPONENT))


def relu(x: PerPair) -> PerPair:
    """max(0, x)."""
    import jax

    return jax.nn.relu(x)
