"""A few hundred inputs of every fuzzer; `python -m tests.fuzz --inputs 100000` tries more."""

from __future__ import annotations

import pytest

from .__main__ import fuzz
from .targets import TARGETS

INPUTS = {"config": 60, "index": 60, "safetensors": 60, "adapters": 60, "gguf.model": 60, "checkpoints": 40, "show": 60}


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_does_worse_than_a_short_refusal(target, tmp_path):
    report = fuzz(target, INPUTS.get(target, 300), seed=0, save=tmp_path)
    assert not report["findings"], report
