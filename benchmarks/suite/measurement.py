"""What a contender reports of itself: time, memory, loss. Standard library only: it runs in every environment."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def seconds_since_process_start() -> float:
    """Seconds since the kernel started this process, interpreter start-up and imports included; 10 ms resolution."""
    # The name of the program stands in brackets and may hold spaces; field 22 counts from before it.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_memory() -> int:
    """Most memory this process has held so far, in bytes."""
    return _status("VmHWM")


def held_memory() -> int:
    """Memory this process holds, in bytes."""
    return _status("VmRSS")


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def was_held_up(seconds: float, processor_seconds: float) -> bool:
    """Whether training had less than half of one core: it was paused, or starved by other work."""
    return processor_seconds < 0.5 * seconds


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def arguments_of_a_contender(description: str | None) -> argparse.ArgumentParser:
    """The command line that every contender understands."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines of plain text: prompt, chosen, rejected")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for what was measured")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and completion")
    parser.add_argument("--pairs", type=int, default=16, help="of one update")
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--options", type=json.loads, default={}, help="more options of the trainer, as JSON")
    return parser


class Measurement:
    """The measurement of one process, which trains once and ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.updates: list[dict[str, float]] = []
        self._last = self._last_processor = 0.0
        # Where memory runs out, this process goes and not another one.
        Path("/proc/self/oom_score_adj").write_text("1000")

    def mark(self, event: str) -> None:
        """Note when something was done, counted from the start of the process."""
        self.seconds[event] = seconds_since_process_start()

    def begin_updates(self) -> None:
        """The first update starts now."""
        self._last, self._last_processor = time.perf_counter(), time.process_time()

    def end_update(self, **numbers: float) -> None:
        """An update has ended, on the device as well."""
        now, processor = time.perf_counter(), time.process_time()
        times = {"seconds": now - self._last, "processor_seconds": processor - self._last_processor}
        self.updates.append(times | numbers)
        self._last, self._last_processor = now, processor
        if len(self.updates) == 1:
            self.mark("first update done")

    def write(self, output: Path, **more: Any) -> None:
        """Write everything as JSON."""
        self.mark("end")
        result = {"seconds": self.seconds, "updates": self.updates, "peak_memory": peak_memory()} | more
        output.write_text(json.dumps(result))
