"""A small random model trained by us and by TRL on made rows, from the least to the most of what may grow.

    python -m benchmarks.generated --trl-python <interpreter with golden/requirements.txt>

Length, pairs of an update, vocabulary and the share of the prompt go to both ends of `benchmarks.made.SWEEPS`, one at a
time. Every run is a process of its own with empty caches and scores its reference in every update; losses must agree
and every token must be seen, or the command fails. Writes results/generated.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checks import disagreements, failures, hold_ups
from benchmarks.harness import RESULTS, Contender, describe_machine, end, in_short, run, write_result
from benchmarks.made import BASE, SWEEPS, Shape, made_task
from benchmarks.rows import tokens_of_updates

COMPARED = (Contender("ours", "ours"), Contender("TRL", "trl"))


def points() -> dict[str, dict[str, float]]:
    """Name of a point -> its sizes: the base, and both ends of every sweep."""
    ends = {
        f"{sweep.replace('_', ' ')} {value:g}": BASE | {sweep: value}
        for sweep, values in SWEEPS.items()
        for value in values
    }
    return {"base": BASE} | ends


def measure(point: dict[str, float], updates: int, interpreters: dict[str, str]) -> dict[str, Any]:
    """Both contenders on one point."""
    length, pairs, vocabulary = (int(point[name]) for name in ("length", "batch", "vocabulary"))
    with tempfile.TemporaryDirectory(prefix="easydel-generated-") as folder:
        shape = Shape(vocabulary=vocabulary, length=length, prompt_share=point["prompt_share"])
        task, rows = made_task(Path(folder), shape, pairs, updates)
        runs = []
        for contender in COMPARED:
            runs.append(run(contender, task, interpreters))
            print(f"{contender.name}: {in_short(runs[-1])}", flush=True)
    return {"point": point, "pairs": pairs, "tokens": tokens_of_updates(rows, pairs), "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="interpreter with TRL")
    parser.add_argument("--points", nargs="+", choices=points(), default=list(points()))
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    interpreters = {"ours": sys.executable, "trl": arguments.trl_python}
    result: dict[str, Any] = {"machine": describe_machine(), "updates": arguments.updates, "points": {}}
    wrong: list[str] = []
    for name in arguments.points:
        print(name, flush=True)
        measured = measure(points()[name], arguments.updates, interpreters)
        result["points"][name] = measured
        write_result(result, arguments.output, "generated")
        found = failures(measured) + disagreements(measured) + hold_ups(measured)
        wrong += [f"{name}: {what}" for what in found]
    end(wrong)


if __name__ == "__main__":
    main()
