"""Preference objectives: pure functions of the log-probabilities of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float

# Largest exponent: its square is still finite in float32, so neither a loss nor its gradient can overflow.
LARGEST_EXPONENT = 40.0

PerPair = Float[Array, "*pairs"]


class PairScores(NamedTuple):
    """What an objective sees of every pair of an update.

    Attributes:
      chosen, rejected: scores s = h(r) of the completions: their log-ratios through the f-divergence, in nats.
      chosen_log_ratio, rejected_log_ratio: r = log policy - log reference, in nats.
      chosen_logps, rejected_logps: the policy's summed log-probabilities, in nats.
      chosen_length, rejected_length: scored tokens, at least 1.
      is_pair: False for slots that hold no pair; only losses over the order of pairs need it.
      mean_chosen_length: scored tokens of the chosen completions, the mean over all pairs of the update.
    """

    chosen: PerPair
    rejected: PerPair
    chosen_log_ratio: PerPair
    rejected_log_ratio: PerPair
    chosen_logps: PerPair
    rejected_logps: PerPair
    chosen_length: PerPair
    rejected_length: PerPair
    is_pair: Bool[Array, "*pairs"]
    mean_chosen_length: Float[Array, ""]

    @property
    def delta(self) -> PerPair:
        """Chosen score minus rejected score."""
        return self.chosen - self.rejected


def sigmoid(scores: PairScores, *, beta: float, label_smoothing: float) -> PerPair:
    """Negative log-likelihood of the preference under Bradley-Terry, labels flipped at rate `label_smoothing`.

    .. math:: -(1 - \\epsilon) \\log \\sigma(\\beta\\delta) - \\epsilon \\log \\sigma(-\\beta\\delta),
       \\qquad \\delta = s_c - s_r

    Args:
      scores: scores in nats, one entry a pair.
      beta: strength of the pull towards the reference, > 0.
      label_smoothing: assumed share of flipped labels, 0 to below 1/2.

    Returns:
      One non-negative loss a pair; ln 2 where the policy equals the reference.

    References:
      Rafailov et al., Direct Preference Optimization, 2023, eq. 7; Mitchell, A note on DPO with noisy preferences
      (cDPO), 2023.
    """
    margin = beta * scores.delta
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def hinge(scores: PairScores, *, beta: float) -> PerPair:
    """Linear loss up to a margin of 1.

    .. math:: \\max(0, 1 - \\beta\\delta)

    References:
      Zhao et al., SLiC-HF, 2023, eq. 8, on DPO's margin as in Liu et al., RSO, 2023, eq. 9.
    """
    return jax.nn.relu(1 - beta * scores.delta)


def ipo(scores: PairScores, *, beta: float) -> PerPair:
    """Squared distance of the length-averaged score margin from 1 / (2 beta).

    .. math:: (s_c / n_c - s_r / n_r - 1 / (2\\beta))^2

    Args:
      scores: scores in nats and completion lengths in tokens.
      beta: the regulariser tau of the paper; larger keeps the policy nearer the reference.

    References:
      Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023, eq. 17;
      the average over tokens is the authors' later correction.
    """
    margin = scores.chosen / scores.chosen_length - scores.rejected / scores.rejected_length
    return jnp.square(margin - 1 / (2 * beta))


def sigmoid_norm(scores: PairScores, *, beta: float) -> PerPair:
    """The sigmoid loss on length-averaged scores.

    .. math:: -\\log \\sigma(\\beta (s_c / n_c - s_r / n_r))

    References:
      Lambert et al., Tulu 3, 2024, section 5.1.1 (length-normalised DPO).
    """
    return -log_sigmoid(beta * (scores.chosen / scores.chosen_length - scores.rejected / scores.rejected_length))


def exo_pair(scores: PairScores, *, beta: float, label_smoothing: float) -> PerPair:
    """Reverse KL divergence of the policy's pair preference from the smoothed labels.

    .. math:: q_w (\\log q_w - \\log(1 - \\epsilon)) + q_l (\\log q_l - \\log \\epsilon),
       \\quad q_w = \\sigma(\\beta\\delta), \\; q_l = \\sigma(-\\beta\\delta)

    Args:
      label_smoothing: > 0; the labels' own entropy, without which the divergence is infinite.

    References:
      Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, 2024, eq. 16.
    """
    log_win, log_lose = log_sigmoid(beta * scores.delta), log_sigmoid(-beta * scores.delta)
    win = jnp.exp(log_win) * (log_win - jnp.log1p(-label_smoothing))
    return win + jnp.exp(log_lose) * (log_lose - jnp.log(label_smoothing))


def nca_pair(scores: PairScores, *, beta: float) -> PerPair:
    """Noise-contrastive alignment: the chosen score is to rise by itself, not only against the rejected one.

    .. math:: -\\log \\sigma(\\beta s_c) - \\tfrac12 \\log \\sigma(-\\beta s_c) - \\tfrac12 \\log \\sigma(-\\beta s_r)

    References:
      Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, 2024, eq. 12.
    """
    chosen, rejected = beta * scores.chosen, beta * scores.rejected
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def robust(scores: PairScores, *, beta: float, label_smoothing: float) -> PerPair:
    """An unbiased estimate of the sigmoid loss when a share `label_smoothing` of the labels is flipped.

    .. math:: \\frac{-(1 - \\epsilon) \\log \\sigma(\\beta\\delta)
       + \\epsilon \\log \\sigma(-\\beta\\delta)}{1 - 2\\epsilon}

    References:
      Chowdhury et al., Provably Robust DPO, 2024, eq. 12.
    """
    margin = beta * scores.delta
    estimate = -(1 - label_smoothing) * log_sigmoid(margin) + label_smoothing * log_sigmoid(-margin)
    return estimate / (1 - 2 * label_smoothing)


def bco_pair(scores: PairScores, *, beta: float) -> PerPair:
    """A binary classifier's loss on each completion by itself.

    .. math:: -\\log \\sigma(\\beta s_c) - \\log \\sigma(-\\beta s_r)

    References:
      Jung et al., Binary Classifier Optimization for Large Language Model Alignment, 2024, without the reward shift.
    """
    return -log_sigmoid(beta * scores.chosen) - log_sigmoid(-beta * scores.rejected)


def sppo_hard(scores: PairScores, *, beta: float) -> PerPair:
    """Self-play preference optimisation with hard win rates of 1 and 0.

    .. math:: (s_c - \\tfrac{1}{2\\beta})^2 + (s_r + \\tfrac{1}{2\\beta})^2

    References:
      Wu et al., Self-Play Preference Optimization for Language Model Alignment, 2024, eq. 4.7.
    """
    return jnp.square(scores.chosen - 0.5 / beta) + jnp.square(scores.rejected + 0.5 / beta)


def _over_quantiles(better: PerPair, worse: PerPair, is_pair: Array, beta: float, label_smoothing: float) -> PerPair:
    """The smoothed sigmoid loss between the sorted values of two samples; empty slots sort behind all pairs."""

    def in_order(values: PerPair) -> PerPair:
        return jnp.sort(jnp.where(is_pair, values, jnp.inf).reshape(-1))

    count = jnp.sum(is_pair)
    is_quantile = jnp.arange(is_pair.size) < count
    margin = beta * jnp.where(is_quantile, in_order(better), 0.0) - beta * jnp.where(is_quantile, in_order(worse), 0.0)
    losses = -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)
    # Every pair carries the mean, so that the mean over pairs is the mean over quantiles.
    mean = jnp.sum(jnp.where(is_quantile, losses, 0.0)) / count
    return jnp.broadcast_to(mean, is_pair.shape)


def aot(scores: PairScores, *, beta: float, label_smoothing: float) -> PerPair:
    """Distributional preference: the policy's margins dominate the reference's, quantile by quantile.

    .. math:: \\Delta = \\mathrm{sort}(\\log\\pi_c - \\log\\pi_r)
       - \\mathrm{sort}(\\log\\pi^{ref}_c - \\log\\pi^{ref}_r)

    and the sigmoid loss of :math:`\\beta\\Delta`; sorted over all pairs of the update.

    References:
      Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, 2024, paired.
    """
    policy = scores.chosen_logps - scores.rejected_logps
    reference = policy - (scores.chosen_log_ratio - scores.rejected_log_ratio)
    return _over_quantiles(policy, reference, scores.is_pair, beta, label_smoothing)


def aot_unpaired(scores: PairScores, *, beta: float, label_smoothing: float) -> PerPair:
    """Distributional preference: chosen log-ratios dominate rejected ones, quantile by quantile.

    .. math:: \\Delta = \\mathrm{sort}(r_c) - \\mathrm{sort}(r_r)

    and the sigmoid loss of :math:`\\beta\\Delta`; sorted over all pairs of the update.

    References:
      Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, 2024, unpaired.
    """
    return _over_quantiles(scores.chosen_log_ratio, scores.rejected_log_ratio, scores.is_pair, beta, label_smoothing)


def apo_zero(scores: PairScores, *, beta: float) -> PerPair:
    """Anchored preference: raise the chosen, lower the rejected; for a model worse than the chosen answers.

    .. math:: 1 - \\sigma(\\beta r_c) + \\sigma(\\beta r_r)

    References:
      D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, 2024.
    """
    return 1 - jax.nn.sigmoid(beta * scores.chosen_log_ratio) + jax.nn.sigmoid(beta * scores.rejected_log_ratio)


def apo_down(scores: PairScores, *, beta: float) -> PerPair:
    """Anchored preference: lower both, the rejected more; for a model better than the chosen answers.

    .. math:: \\sigma(\\beta r_c) + 1 - \\sigma(\\beta\\delta)

    References:
      D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, 2024.
    """
    return jax.nn.sigmoid(beta * scores.chosen_log_ratio) + 1 - jax.nn.sigmoid(beta * scores.delta)


def discopop(scores: PairScores, *, beta: float, discopop_tau: float) -> PerPair:
    """Log-ratio modulated loss: logistic where the pair is still wrong, exponential where it is right.

    .. math:: (1 - m)(-\\log \\sigma(l)) + m e^{-l}, \\qquad l = \\beta\\delta, \\; m = \\sigma(l / \\tau)

    Args:
      discopop_tau: temperature of the switch, > 0.

    References:
      Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, 2024, eq. 7.
    """
    margin = beta * scores.delta
    modulation = jax.nn.sigmoid(margin / discopop_tau)
    exponential = jnp.exp(jnp.minimum(-margin, LARGEST_EXPONENT))
    return -(1 - modulation) * log_sigmoid(margin) + modulation * exponential


def sft(scores: PairScores) -> PerPair:
    """Negative log-likelihood of the chosen completions, a mean over all chosen tokens of the update.

    .. math:: -\\log \\pi(y_c) / \\bar n_c

    Returns:
      One loss a pair, whose mean over the update's pairs is the mean over its chosen tokens.

    References:
      Pang et al., Iterative Reasoning Preference Optimization, 2024, eq. 1 (the term that `rpo_alpha` weights).
    """
    return -scores.chosen_logps / scores.mean_chosen_length


LOSSES: dict[str, Callable[..., PerPair]] = {
    function.__name__: function
    for function in (
        sigmoid,
        hinge,
        ipo,
        sigmoid_norm,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sft,
    )
} | {"aot_pair": aot_unpaired}
