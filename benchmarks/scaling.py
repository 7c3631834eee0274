"""How time and memory of an update grow with length, batch, vocabulary and prompt share; the predicted curve beside.

    python -m benchmarks.scaling

Every point is a process of its own that updates a small random model on made rows. Predicted time is the update's
arithmetic at the rate of large matrix products, measured before and after; predicted memory is what an update cannot do
without (`benchmarks.suite.arithmetic`). Writes results/scaling.json and results/scaling.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.suite import machine
from benchmarks.suite.contenders import ROOT
from benchmarks.suite.made import BASE, SWEEPS
from benchmarks.suite.matmul import matmul_rates
from benchmarks.suite.scaling_plot import plot

RESULTS = Path(__file__).parent / "results"


def measure_point(point: dict[str, float], updates: int) -> dict[str, Any]:
    """`benchmarks.suite.measure_step` of one point."""
    words = [sys.executable, "-m", "benchmarks.suite.measure_step", "--updates", str(updates)]
    for name, value in point.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    with tempfile.TemporaryDirectory(prefix="easydel-scaling-") as cache:
        environment = os.environ | {"XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
        process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{point} failed:\n{process.stderr}")
    return point | json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3, help="of one point; the median is drawn")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--points", type=int, help="only the first ones of each sweep")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine.describe(), "base": BASE, "matmul": [matmul_rates()], "sweeps": {}}
    for sweep in arguments.sweeps:
        points = []
        for value in SWEEPS[sweep][: arguments.points]:
            points.append(measure_point(BASE | {sweep: value}, arguments.updates))
            print(f"{sweep} {value}: {min(points[-1]['seconds']):.2f} s", flush=True)
        result["sweeps"][sweep] = points
    result["matmul"].append(matmul_rates())
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, arguments.output / "scaling.png")
    wrong = [
        f"{sweep} {point[sweep]}"
        for sweep, points in result["sweeps"].items()
        for point in points
        if point["was_held_up"]
    ]
    if wrong:
        raise SystemExit(f"held up by other work, not to be used: {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
