"""SimPER against its formula."""

from __future__ import annotations

import numpy as np

from easydel.trainers.direct_preference_optimization_trainer.objectives.simper import SimPER
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import (
    LENGTHS,
    LOGPS,
    assert_equals,
    scores_of,
)


def test_it_equals_the_difference_of_inverse_perplexities():
    def perplexity(logp, length):
        return np.exp(-logp / length)

    def form(pairs):
        chosen, rejected = (
            perplexity(pairs.chosen, pairs.chosen_length),
            perplexity(pairs.rejected, pairs.rejected_length),
        )
        return 1 / rejected - 1 / chosen

    assert_equals(SimPER(), form)


def test_a_worked_number():
    """Tokens of probability 1/2 against tokens of probability 1/4: 1/4 - 1/2."""
    logps = np.log([[0.5], [0.25]]) * LENGTHS
    np.testing.assert_allclose(SimPER()(scores_of(logps)), -0.25, rtol=1e-5)
    assert (np.abs(SimPER()(scores_of(LOGPS))) < 1).all()
