"""HyPO against its formula, and where it is DPO."""

from __future__ import annotations

import numpy as np

from easydel.trainers.direct_preference_optimization_trainer.objectives.hypo import HyPO
from easydel.trainers.direct_preference_optimization_trainer.objectives.pairwise import Sigmoid
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import (
    LOGPS,
    REFERENCE,
    assert_equals,
    log_sigmoid,
    scores_of,
)

BETA = 0.3


def test_it_equals_its_formula():
    def form(pairs):
        delta = pairs.chosen - pairs.rejected
        return -log_sigmoid(BETA * (delta - np.maximum(0, pairs.reference_chosen - pairs.reference_rejected)))

    assert_equals(HyPO(beta=BETA), form)


def test_it_is_dpo_where_the_reference_ranks_the_pair_right_and_larger_elsewhere():
    scores = scores_of(LOGPS)
    hypo, dpo = HyPO(beta=BETA)(scores), Sigmoid(beta=BETA)(scores)
    is_right = REFERENCE[0] > REFERENCE[1]
    assert is_right.any() and not is_right.all()
    np.testing.assert_allclose(hypo[is_right], dpo[is_right], rtol=1e-5)
    assert (hypo[~is_right] > dpo[~is_right]).all()
