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
      chosen_logps: the policy's summed log-probability of the chosen completion, in nats.
      mean_chosen_length: scored tokens of the chosen completions, the mean over all pairs of the update.
    """

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]
    chosen_logps: Float[Array, "*pairs"]
    mean_chosen_length: Float[Array, ""]


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
      >>> sigmoid(PairScores(zero, zero, zero, 1.0), beta=0.1, label_smoothing=0.0).round(4).tolist()
      [0.6930999755859375]
    """
    margin = beta * (scores.chosen - scores.rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def sft(scores: PairScores) -> Float[Array, "*pairs"]:
    """Negative log-likelihood of the chosen completions, a mean over all chosen tokens of the update.

    .. math:: -\\log \\pi(y_c) / \\bar n_c

    Args:
      scores: log-probabilities in nats and the update's mean chosen length in tokens.

    Returns:
      One loss a pair, whose mean over the update's pairs is the mean over its chosen tokens.

    References:
      Pang et al., Iterative Reasoning Preference Optimization, 2024, eq. 1 (the term that `rpo_alpha` weights).
    """
    return -scores.chosen_logps / scores.mean_chosen_length


LOSSES: dict[str, Callable[..., Array]] = {"sigmoid": sigmoid}


def make_objective(
    loss_type: str, *, beta: float, label_smoothing: float, rpo_alpha: float | None
) -> Callable[[PairScores], Float[Array, "*pairs"]]:
    """The loss of one pair under a configuration: the named objective, plus ``rpo_alpha`` times `sft`."""

    def objective(scores: PairScores) -> Float[Array, "*pairs"]:
        losses = LOSSES[loss_type](scores, beta=beta, label_smoothing=label_smoothing)
        return losses if rpo_alpha is None else losses + rpo_alpha * sft(scores)

    return objective
