"""Every option says what it changes."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from easydel import DPOConfig
from easydel.options import Changes
from easydel.trainers.run.identity import options_of_result


@pytest.mark.parametrize("field", dataclasses.fields(DPOConfig), ids=lambda field: field.name)
def test_every_field_says_what_it_changes(field):
    assert field.metadata["changes"] in get_args(Changes)


def test_a_run_is_told_by_what_changes_its_numbers_and_by_its_layout_only_where_that_does_too():
    plain = DPOConfig()
    session = DPOConfig(log_steps=7, save_directory=None, gradient_checkpointing=False)
    assert options_of_result(session, with_layout=True) == options_of_result(plain, with_layout=True)
    layout = DPOConfig(packing=False, gradient_accumulation_steps=2)
    assert options_of_result(layout, with_layout=False) == options_of_result(plain, with_layout=False)
    assert options_of_result(layout, with_layout=True) != options_of_result(plain, with_layout=True)
    result = DPOConfig(beta=0.2)
    assert options_of_result(result, with_layout=False) != options_of_result(plain, with_layout=False)
