"""A small random model trained by us and by TRL on made rows, from the least to the most of what may grow.

    python -m benchmarks.generated --trl-python <interpreter with golden/requirements.txt>

Length, pairs of an update, vocabulary and the share of the prompt go to both ends of `benchmarks.suite.made.SWEEPS`,
one at a time. Every run is a process of its own with empty caches and scores its reference in every update; losses must
agree and every token must be seen, or the command fails. Writes results/generated.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.headline import CONTENDERS, in_short
from benchmarks.suite import machine
from benchmarks.suite.agreement import disagreements, failures, hold_ups
from benchmarks.suite.contenders import Task, run
from benchmarks.suite.made import BASE, SWEEPS, as_text, made_row, small_model, tokenizer_of_ids
from benchmarks.suite.rows import tokens_of_updates, write_rows

RESULTS = Path(__file__).parent / "results"
COMPARED = [contender for contender in CONTENDERS if contender.name in ("ours", "TRL")]


def points() -> dict[str, dict[str, float]]:
    """Name of a point -> its sizes: the base, and both ends of every sweep."""
    ends = {
        f"{sweep.replace('_', ' ')} {value:g}": BASE | {sweep: value}
        for sweep, values in SWEEPS.items()
        for value in (values[0], values[-1])
    }
    return {"base": BASE} | ends


def measure(point: dict[str, float], updates: int, interpreters: dict[str, str]) -> dict[str, Any]:
    """Both contenders on one point."""
    length, pairs, vocabulary = (int(point[name]) for name in ("length", "batch", "vocabulary"))
    random = np.random.default_rng(0)
    rows = [as_text(made_row(random, length, point["prompt_share"], vocabulary)) for _ in range(pairs * updates)]
    with tempfile.TemporaryDirectory(prefix="easydel-generated-") as name:
        folder = Path(name)
        write_rows(rows, folder / "rows.jsonl")
        small_model(vocabulary, length).save_pretrained(folder / "model")
        tokenizer_of_ids(vocabulary).save_pretrained(folder / "model")
        task = Task(folder / "rows.jsonl", folder / "model", length, pairs, updates, learning_rate=1e-4)
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
    arguments.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine.describe(), "updates": arguments.updates, "points": {}}
    wrong: list[str] = []
    for name in arguments.points:
        print(name, flush=True)
        measured = measure(points()[name], arguments.updates, interpreters)
        result["points"][name] = measured
        (arguments.output / "generated.json").write_text(json.dumps(result, indent=1) + "\n")
        found = failures(measured) + disagreements(measured) + hold_ups(measured)
        wrong += [f"{name}: {what}" for what in found]
    if wrong:
        raise SystemExit("these results are not to be used:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
