"""DPO with an offset, against its formula and from the rows' column to the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.data import DataError
from easydel.trainers.direct_preference_optimization_trainer.objectives.odpo import ODPO
from tests.tiny import make_rows
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import (
    LOGPS,
    assert_equals,
    log_sigmoid,
    scores_of,
)

BETA = 0.3


def test_it_equals_its_formula():
    def form(pairs):
        log_ratios = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
        return -log_sigmoid(BETA * (log_ratios[0] - log_ratios[1]) - pairs.margin)

    assert_equals(ODPO(beta=BETA), form)


def test_a_batch_without_margins_is_refused():
    scores = scores_of(LOGPS, margin=np.zeros(6))
    with pytest.raises(ValueError, match='the batch has no "pair_margin"'):
        ODPO()(type(scores)(*scores[:8]))


def trainer_of(rows, model, tokenizer, **options):
    config = DPOConfig(save_directory=None, progress_bar=False, total_batch_size=4, **options)
    return DPOTrainer(config, model, None, tokenizer, Dataset.from_list(rows))


def test_the_column_of_the_rows_reaches_the_loss(tiny_model, tokenizer):
    """At the start delta is 0, so the loss is the mean of log(1 + exp(margin))."""
    rows = [row | {"margin": 0.5 * number} for number, row in enumerate(make_rows()[:4])]
    log = trainer_of(rows, tiny_model, tokenizer, loss_type="odpo").train().log_history
    expected = np.mean([math.log1p(math.exp(0.5 * number)) for number in range(4)])
    assert log[0]["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_without_the_column_are_refused_and_a_column_without_the_objective_is_named(tiny_model, tokenizer, caplog):
    rows = make_rows()[:4]
    with pytest.raises(DataError, match='no column "margin"'):
        trainer_of(rows, tiny_model, tokenizer, loss_type="odpo")
    trainer_of([row | {"margin": 1.0} for row in rows], tiny_model, tokenizer)
    assert 'columns of the data that are not read: "margin"' in caplog.text
