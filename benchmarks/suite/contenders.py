"""Who is compared, and how one of them is run: a process of its own, in an environment of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
      name: what the tables call it.
      trainer: "ours", "trl" or "easydel", the script that runs it.
      options: what differs from the trainer's defaults.
      cache: contenders of one round that name the same cache find what the earlier one has kept; each other one starts
        with nothing.
      environment: variables for its process alone.
      pairs: of one update, where it cannot do what the others do.
    """

    name: str
    trainer: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pairs: int | None = None

    @property
    def scores_reference(self) -> bool:
        """Whether the reference is part of its updates."""
        return not self.options.get("precompute_ref_log_probs", False)


@dataclasses.dataclass(frozen=True)
class Task:
    """What all of them are to do; the names are those of `measurement.arguments_of_a_contender`."""

    rows: Path
    model: Path
    max_length: int
    pairs: int
    updates: int
    learning_rate: float


def command(contender: Contender, task: Task, interpreters: Mapping[str, str], output: Path) -> list[str]:
    """The command line of a contender."""
    script = {
        "ours": ["-m", "benchmarks.suite.run_ours"],
        # By path: a peer that is called easydel as well must not find our package beside it.
        "trl": [str(HERE / "run_trl.py")],
        "easydel": [str(HERE / "run_easydel.py")],
    }[contender.trainer]
    words = [interpreters[contender.trainer], *script, "--output", str(output)]
    for field in dataclasses.fields(task):
        words += [f"--{field.name.replace('_', '-')}", str(getattr(task, field.name))]
    return [*words, "--options", json.dumps(dict(contender.options))]


def run(contender: Contender, task: Task, interpreters: Mapping[str, str], cache: Path | None = None) -> dict[str, Any]:
    """Train, and give who did what and what was measured, or ``failure``: why there is nothing."""
    about = {"contender": contender.name, "trainer": contender.trainer, "pairs": task.pairs}
    about["scores_reference"] = contender.scores_reference
    with tempfile.TemporaryDirectory(prefix="easydel-benchmark-") as name:
        scratch = Path(name)
        # Nothing that an earlier run has kept is found, unless a cache is given; no peer asks the network.
        environment = os.environ | {
            "PYTHONPATH": str(ROOT) if contender.trainer == "ours" else "",
            "XDG_CACHE_HOME": str(cache or scratch),
            "HF_HOME": str(scratch),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        output = scratch / "measured.json"
        words = command(contender, task, interpreters, output)
        # Training scripts may write to where they stand.
        process = subprocess.run(
            words, env=environment | contender.environment, cwd=scratch, capture_output=True, text=True, check=False
        )
        if process.returncode:
            last_lines = "\n".join(process.stderr.strip().splitlines()[-15:])
            print(f"{contender.name} failed with status {process.returncode}:\n{last_lines}", file=sys.stderr)
            if process.returncode == -signal.SIGKILL:
                return about | {"failure": "ran out of memory or was killed"}
            return about | {"failure": last_lines.rpartition("\n")[2] or f"status {process.returncode}"}
        return about | json.loads(output.read_text())
