"""Preference objectives: pure functions of log-ratios, and the table of what each honours."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float


class PairScores(NamedTuple):
    """What an objective sees of every pair.

    Attributes:
      chosen, rejected: log-ratios log policy - log reference of the completions, in nats.
    """

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]


def sigmoid(scores: PairScores, *, beta: float, label_smoothing: float) -> Float[Array, "*pairs"]:
    """Negative log-likelihood of the preference under Bradley-Terry, with flipped labels at rate `label_smoothing`.

    .. math:: -(1 - \\epsilon) \\log \\sigma(\\beta\\delta) - \\epsilon \\log \\sigma(-\\beta\\delta),
       \\qquad \\delta = s_c - s_r

    Args:
      scores: log-ratios in nats, one entry a pair.
      beta: strength of the pull towards the reference, > 0.
      label_smoothing: assumed share of flipped labels, 0 to below 1/2.

    Returns:
      One non-negative loss a pair; ln 2 where the policy equals the reference.

    References:
      Rafailov et al., Direct Preference Optimization, 2023, eq. 7; Mitchell, A note on DPO with noisy preferences
      (cDPO), 2023.

    Example:
      >>> zero = jax.numpy.zeros(1)
      >>> sigmoid(PairScores(zero, zero), beta=0.1, label_smoothing=0.0).round(4).tolist()
      [0.6930999755859375]
    """
    margin = beta * (scores.chosen - scores.rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


LOSSES: dict[str, Callable[..., Array]] = {"sigmoid": sigmoid}
