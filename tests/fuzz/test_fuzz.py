"""A few hundred inputs of every fuzzer; `python -m tests.fuzz --inputs 100000` tries more."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import fuzz
from tests.fuzz.targets import TARGETS

INPUTS = dict.fromkeys(("config", "index", "safetensors", "adapters", "gguf.model"), 80)
INPUTS |= {"templates": 60, "tokenizer": 150, "gguf.tokenizer": 150}
INPUTS |= {"yaml": 60, "arguments": 60, "show": 60, "checkpoints": 4}


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_does_worse_than_a_short_refusal(target, tmp_path):
    report = fuzz(target, INPUTS.get(target, 300), seed=0, save=tmp_path)
    found = [f"{finding['times']} x {kind}: {finding['input']}" for kind, finding in report["findings"].items()]
    assert not found, "\n".join([f"{target}: {len(found)} kinds of findings", *found])
