"""Hold what an objective reads of the pairs of an update: log-probs, lengths, margins and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    # Options and their help are read without JAX, which jaxtyping would import.
    from jaxtyping import Array, Bool, Float

    PerPair = Float[Array, "*pairs"]


class PairScores(NamedTuple):
    """Log-probabilities and lengths of every pair of an update.

    Attributes:
      chosen_logps, rejected_logps: the policy's summed log-probabilities, in nats.
      reference_chosen_logps, reference_rejected_logps: the reference's; the policy's own if no objective needs one.
      chosen_length, rejected_length: scored tokens, at least 1.
      is_pair: False for slots that hold no pair; only losses that sort pairs need it.
      mean_chosen_length: scored tokens of the chosen completions, the mean over all pairs of the update.
      margin: the rows' column "margin", in nats; None if no objective needs it.
      log_weight: log-weight of each pair (Zhou et al., WPO, 2024), None without weighting.
    """

    chosen_logps: PerPair
    rejected_logps: PerPair
    reference_chosen_logps: PerPair
    reference_rejected_logps: PerPair
    chosen_length: PerPair
    rejected_length: PerPair
    is_pair: Bool[Array, "*pairs"]
    mean_chosen_length: Float[Array, ""]
    margin: PerPair | None = None
    log_weight: PerPair | None = None

    @property
    def chosen_log_ratio(self) -> PerPair:
        """r_c = log policy - log reference of the chosen completions, in nats."""
        return self.chosen_logps - self.reference_chosen_logps

    @property
    def rejected_log_ratio(self) -> PerPair:
        """r_r = log policy - log reference of the rejected completions, in nats."""
        return self.rejected_logps - self.reference_rejected_logps

    @property
    def policy_delta(self) -> PerPair:
        """Chosen minus rejected log-probability under the policy, in nats."""
        return self.chosen_logps - self.rejected_logps

    @property
    def reference_delta(self) -> PerPair:
        """Chosen minus rejected log-probability under the reference, in nats."""
        return self.reference_chosen_logps - self.reference_rejected_logps

    @property
    def chosen_mean_logp(self) -> PerPair:
        """The policy's log-probability of the chosen completion, averaged over its tokens, in nats per token."""
        return self.chosen_logps / self.chosen_length

    @property
    def rejected_mean_logp(self) -> PerPair:
        """The policy's log-probability of the rejected completion, averaged over its tokens, in nats per token."""
        return self.rejected_logps / self.rejected_length
