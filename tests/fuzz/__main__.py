"""Tries every target and prints what was found; exit code 1 where there is a finding."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.targets import TARGETS

COLUMNS = {"inputs": 8, "seconds": 9, "CPU s": 8, "a CPU s": 9, "ok": 8, "row fault": 11, "refused": 9, "findings": 10}
ROOT = Path(__file__).parents[2]


def fuzz(name: str, inputs: int, seed: int, save: Path) -> dict[str, Any]:
    """What came of that many inputs of one target, in a process of its own."""
    command = [sys.executable, "-m", "tests.fuzz.supervise", name, str(inputs), str(seed), str(save)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[:4000]}")
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=TARGETS, metavar="NAME")
    parser.add_argument("--inputs", type=int, default=1000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder for the inputs that were found; default: a new one")
    options = parser.parse_args()
    save = (options.save or Path(tempfile.mkdtemp(prefix="easydel-fuzz-"))).absolute()
    print(f"{'target':<20}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    found = 0
    for name in options.target:
        report = fuzz(name, options.inputs, options.seed, save)
        speed = report["inputs"] / max(report["cpu"], 0.1)
        numbers = report | {"a CPU s": round(speed), "CPU s": report["cpu"], "findings": report["finding"]}
        print(f"{name:<20}" + "".join(f"{numbers[name]:>{width}}" for name, width in COLUMNS.items()), flush=True)
        for kind, finding in report["findings"].items():
            print(f"    {finding['times']} x {kind}\n        {finding['input']}", flush=True)
        found += report["finding"]
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
