"""Runs the campaign of faults and prints what became of each; exit code 1 if anything was lost,
passed in silence or was refused with more noise than words."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.faults.campaign import FAULTY, FELL_BACK, LOST, NOISY, OUTCOMES, REFUSED, SKIPPED, Trial, campaign
from tests.faults.runs import MODES, Ground


def table(trials: Iterable[Trial]) -> str:
    """How often each fault had each outcome, and the messages."""
    trials = list(trials)
    counts = Counter((trial.fault, trial.outcome) for trial in trials)
    lines = [f"{'fault':<28}{'trials':>8}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES)]
    for fault in dict.fromkeys(trial.fault for trial in trials):
        numbers = [counts[fault, outcome] for outcome in OUTCOMES]
        lines.append(f"{fault:<28}{sum(numbers):>8}" + "".join(f"{number:>12}" for number in numbers))
    for outcome in (REFUSED, FELL_BACK, SKIPPED, NOISY, LOST):
        told = [trial for trial in trials if trial.outcome == outcome]
        if told:
            lines += ["", f"{outcome}:"]
            lines += [f"  {trial.fault}, {trial.where}\n      {trial.detail}" for trial in told]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="kills in each mode with each signal")
    parser.add_argument("--damages", type=int, help="damaged files in each mode; default: every file in every way")
    parser.add_argument("--seconds", type=float, help="start no fault after so many seconds")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, trials = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="easydel-faults-") as folder:
        ground = Ground(Path(folder) / "ground")
        for trial in campaign(ground, options.rounds, options.damages, options.seed, options.modes):
            trials.append(trial)
            print(f"{time.monotonic() - start:6.0f} s  {trial.fault}, {trial.where}: {trial.outcome}", flush=True)
            if options.seconds is not None and time.monotonic() - start > options.seconds:
                break
    print(f"\n{table(trials)}")
    return 1 if any(trial.outcome in FAULTY for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(main())
