"""SimPO against its formula, in the paper's notation and in that of the authors' code."""

from __future__ import annotations

import numpy as np
import pytest

from easydel import DPOConfig
from easydel.trainers.direct_preference_optimization_trainer.objectives.simpo import SimPO
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import (
    LENGTHS,
    Pairs,
    assert_equals,
    log_sigmoid,
    mean_loss,
)

BETA, RATIO = 2.0, 0.25


def margin(pairs: Pairs) -> np.ndarray:
    return pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length


def test_it_equals_the_authors_form_with_gamma_as_a_ratio_to_beta():
    """Their code takes gamma / beta off the margin and multiplies by beta; so does TRL with simpo_gamma / beta."""
    simpo = SimPO(beta=BETA, target_margin=BETA * RATIO)
    assert_equals(simpo, lambda pairs: -log_sigmoid(BETA * (margin(pairs) - RATIO)))


def test_label_smoothing_swaps_labels_around_the_target_margin():
    def form(pairs):
        x = BETA * margin(pairs) - 0.8
        return -0.9 * log_sigmoid(x) - 0.1 * log_sigmoid(-x)

    assert_equals(SimPO(beta=BETA, target_margin=0.8, label_smoothing=0.1), form)


def test_a_worked_number():
    """One token each, log-probs -1 and -2: sigma(2 * 1 - 0.5) = 0.81757, so the loss is 0.20141."""
    logps = np.array([[-1.0], [-2.0]]) * np.ones(6)
    assert float(mean_loss(SimPO(beta=2.0, target_margin=0.5), logps * LENGTHS)) == pytest.approx(0.20141, abs=1e-5)


def test_it_has_no_reference_to_keep():
    config = DPOConfig(loss_type="simpo", beta=2.0)
    assert not config.keeps_reference
    with pytest.raises(ValueError, match="target_margin=1.0 has no effect with loss_type='sigmoid'"):
        DPOConfig(target_margin=1.0)
    with pytest.raises(ValueError, match="target_margin=-1.0, expected a number of at least 0"):
        DPOConfig(loss_type="simpo", target_margin=-1.0)
