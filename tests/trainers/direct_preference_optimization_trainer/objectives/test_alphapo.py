"""AlphaPO against its formula."""

from __future__ import annotations

import numpy as np
import pytest

from easydel.trainers.direct_preference_optimization_trainer.objectives.alphapo import AlphaPO
from easydel.trainers.direct_preference_optimization_trainer.objectives.simpo import SimPO
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import (
    LOGPS,
    assert_equals,
    log_sigmoid,
    mean_loss,
)

BETA, GAMMA = 2.0, 0.6


@pytest.mark.parametrize("alpha", [0.25, -0.5, 1.0])
def test_it_equals_its_formula(alpha):
    """As TRL's CPO trainer writes it, with gamma / beta inside the factor beta."""

    def reward(logp, length):
        probability = np.exp(logp / length)
        return (1 - probability**-alpha) / alpha

    def form(pairs):
        difference = reward(pairs.chosen, pairs.chosen_length) - reward(pairs.rejected, pairs.rejected_length)
        return -log_sigmoid(BETA * (difference - GAMMA / BETA))

    assert_equals(AlphaPO(beta=BETA, target_margin=GAMMA, alphapo_alpha=alpha), form)


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.0, 0.0), (1e-4, 1e-3)])
def test_it_tends_to_simpo_as_alpha_tends_to_zero(alpha, tolerance):
    simpo = float(mean_loss(SimPO(beta=BETA), LOGPS))
    assert float(mean_loss(AlphaPO(beta=BETA, alphapo_alpha=alpha), LOGPS)) == pytest.approx(simpo, rel=tolerance)
