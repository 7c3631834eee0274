"""Seconds from the command to the first updates of SmolLM2-135M-Instruct, by what they are spent on.

    python -m benchmarks.start_up

Every start is a process of its own with the same private cache folder: the first finds it empty, the second finds the
compiled programs and the reference's log-probs of the first.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, command_line, end, real_task, run
from benchmarks.tables import table

# What ends with which mark of a run of ours.
STAGES = {
    "imports": "imports done",
    "tokenizer": "tokenizer loaded",
    "weights": "model loaded",
    "trainer: rows looked at, weights copied, moments made": "trainer built",
    "identity of the run": "training begun",
}


def stages(measured: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each stage of one start."""
    seconds, before = {}, 0.0
    for name, mark in STAGES.items():
        seconds[name], before = measured["seconds"][mark] - before, measured["seconds"][mark]
    for name, update in zip(("first update", "second update"), measured["updates"]):
        seconds[name] = update["seconds"]
    compiling = sum(update["compilation"] for update in measured["updates"])
    return seconds | {"sum": sum(seconds.values()), "of it compiled, or read from the cache": compiling}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--starts", type=int, default=2)
    parser.set_defaults(pairs=4, updates=2, max_length=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="easydel-start-up-") as name:
        task, _, _ = real_task(Path(name), "short", arguments)
        cache = Path(name) / "cache"
        cache.mkdir()
        runs = [run(Contender("ours", "ours"), task, {"ours": sys.executable}, cache) for _ in range(arguments.starts)]
    end([measured["failure"] for measured in runs if "failure" in measured])
    starts = [stages(measured) for measured in runs]
    rows = [[stage, *(f"{start[stage]:.1f}" for start in starts)] for stage in starts[0]]
    print(table(["", *(f"start {number + 1}" for number in range(len(starts)))], rows))


if __name__ == "__main__":
    main()
