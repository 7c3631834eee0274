"""Compiled programs are kept between runs, all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "options", [(), pytest.param(("lora_rank=2",), marks=pytest.mark.slow)], ids=["all weights", "adapters"]
)
def test_a_second_start_of_the_same_run_compiles_nothing(tmp_path, options):
    command = [sys.executable, "-m", f"{__package__}.second_start", str(tmp_path / "runs"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def start() -> dict[str, int]:
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr[-3000:]
        return json.loads(process.stdout.splitlines()[-1])

    first, second = start(), start()
    print(f"programs: first start {first}, second start {second}")
    assert first["found"] < first["requested"]
    # The second scores no reference, whose log-probs are known, and asks for nothing that is not there.
    assert second["found"] == second["requested"] == second["all"] > 0
