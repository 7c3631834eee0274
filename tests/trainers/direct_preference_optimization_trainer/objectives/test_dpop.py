"""DPO-Positive against its formula."""

from __future__ import annotations

import numpy as np

from easydel.trainers.direct_preference_optimization_trainer.objectives.dpop import DPOP
from easydel.trainers.direct_preference_optimization_trainer.objectives.pairwise import Sigmoid
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import (
    LOGPS,
    REFERENCE,
    assert_equals,
    log_sigmoid,
    scores_of,
)

BETA, LAMBDA = 0.3, 5.0
# Some chosen completions are more likely than under the reference, some less.
MIXED = np.roll(LOGPS, 1, axis=1)


def test_it_equals_its_formula():
    """The penalty in the paper's own form: lambda max(0, log(reference / policy)) of the chosen completion."""

    def form(pairs):
        log_ratios = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
        penalty = np.maximum(0, pairs.reference_chosen - pairs.chosen)
        return -log_sigmoid(BETA * (log_ratios[0] - log_ratios[1] - LAMBDA * penalty))

    assert_equals(DPOP(beta=BETA, dpop_lambda=LAMBDA), form, MIXED)


def test_it_is_dpo_where_the_chosen_completion_has_become_more_likely():
    scores = scores_of(MIXED)
    is_likelier = MIXED[0] > REFERENCE[0]
    assert is_likelier.any() and not is_likelier.all()
    dpop, dpo = DPOP(beta=BETA, dpop_lambda=LAMBDA)(scores), Sigmoid(beta=BETA)(scores)
    np.testing.assert_allclose(dpop[is_likelier], dpo[is_likelier], rtol=1e-5)
    assert (dpop[~is_likelier] > dpo[~is_likelier]).all()
