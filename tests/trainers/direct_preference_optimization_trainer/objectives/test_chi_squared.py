"""chi-PO: the mixed chi-squared divergence against its link function."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from easydel.trainers.direct_preference_optimization_trainer.objectives.f_divergence import chi_squared
from easydel.trainers.direct_preference_optimization_trainer.objectives.pairwise import Hinge, Sigmoid
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import assert_equals, log_sigmoid

BETA = 0.05


def difference_of_links(pairs):
    """phi(z_c) - phi(z_r) with phi(z) = z + log z; the constant of h cancels."""

    def phi(z):
        return z + np.log(z)

    ratios = np.exp(pairs.chosen - pairs.reference_chosen), np.exp(pairs.rejected - pairs.reference_rejected)
    return phi(ratios[0]) - phi(ratios[1])


def test_dpo_under_it_is_chi_po():
    chi_po = Sigmoid(beta=BETA, f_divergence_type="chi_squared")
    assert_equals(chi_po, lambda pairs: -log_sigmoid(BETA * difference_of_links(pairs)))


def test_other_losses_of_the_difference_take_it_too():
    hinge = Hinge(beta=BETA, f_divergence_type="chi_squared")
    assert_equals(hinge, lambda pairs: np.maximum(0, 1 - BETA * difference_of_links(pairs)))


def test_it_punishes_growth_beyond_the_reference_and_hardly_the_loss_of_it():
    """h'(r) = 1 + exp(r): 1, as for KL, where the policy has little mass left, and more where it has too much."""
    for r, slope in ((-8.0, 1.0), (3.0, 1 + np.exp(3.0))):
        assert float(jax.grad(chi_squared)(r, 0.5)) == pytest.approx(slope, rel=1e-3)
