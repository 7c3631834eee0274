"""Divergences that hold the policy near the reference, as transforms of the log-ratio."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from easydel.trainers.direct_preference_optimization_trainer.objectives.losses import LARGEST_EXPONENT

LogRatio = Float[Array, "*pairs"]


def reverse_kl(log_ratio: LogRatio, coefficient: float) -> LogRatio:
    """DPO's own: h(r) = r."""
    del coefficient
    return log_ratio


def forward_kl(log_ratio: LogRatio, coefficient: float) -> LogRatio:
    """h(r) = 1 - exp(-r)."""
    del coefficient
    return 1 - jnp.exp(jnp.minimum(-log_ratio, LARGEST_EXPONENT))


def js_divergence(log_ratio: LogRatio, coefficient: float) -> LogRatio:
    """Jensen-Shannon: h(r) = ln 2 + log sigma(r)."""
    del coefficient
    return jnp.log(2.0) + log_sigmoid(log_ratio)


def alpha_divergence(log_ratio: LogRatio, coefficient: float) -> LogRatio:
    """h(r) = (exp((alpha - 1) r) - 1) / (alpha - 1), which is r at alpha = 1."""
    if coefficient == 1.0:
        return log_ratio
    return jnp.expm1(jnp.minimum((coefficient - 1) * log_ratio, LARGEST_EXPONENT)) / (coefficient - 1)


# Wang et al., Beyond Reverse KL, 2024, up to constants, chosen so that h(0) = 0: a policy that equals its reference
# scores 0 under every divergence. In a difference of scores they cancel; where a loss averages over tokens they do not.
F_DIVERGENCES: dict[str, Callable[[LogRatio, float], LogRatio]] = {
    function.__name__: function for function in (reverse_kl, forward_kl, js_divergence, alpha_divergence)
}
