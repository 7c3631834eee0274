"""What a contender reports of itself: time, memory, loss. Standard library only: it runs in every environment."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMPILATION = "/jax/core/compile/backend_compile_duration"


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


def watch_compilation() -> list[float]:
    """A list that grows by the seconds of every program that JAX compiles, or reads from its cache, from now on."""
    import jax

    seconds: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: seconds.append(duration) if event == COMPILATION else None
    )
    return seconds


class Stopwatch:
    """Seconds, and what this process and all others had of the processor meanwhile."""

    def __init__(self) -> None:
        self._started = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        # user, nice, system, idle, waiting for a disk, interrupts (two kinds), taken by the host
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), time.process_time(), busy

    def lap(self) -> dict[str, float]:
        """Numbers since the last lap, or since this was made."""
        started, self._started = self._started, self._now()
        seconds, own, busy = (now - then for now, then in zip(self._started, started))
        return {"seconds": seconds, "processor_seconds": own, "processor_seconds_of_others": busy - own}


def was_held_up(lap: Mapping[str, float]) -> bool:
    """Whether a lap was paused, with less than half of one core, or others had more than a fifth of one."""
    starved = lap["processor_seconds"] < 0.5 * lap["seconds"]
    # Ticks are 10 ms, so a short lap tells little.
    disturbed = lap["processor_seconds_of_others"] > 0.1 + 0.2 * lap["seconds"]
    return starved or disturbed


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
    parser.add_argument("--platform", default="cpu")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--options", type=json.loads, default={}, help="more options of the trainer, as JSON")
    return parser


class Measurement:
    """The measurement of one process, which trains once and ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.updates: list[dict[str, float]] = []
        self._stopwatch = Stopwatch()
        # Where memory runs out, this process goes and not another one.
        Path("/proc/self/oom_score_adj").write_text("1000")

    def mark(self, event: str) -> None:
        """Note when something was done, counted from the start of the process."""
        self.seconds[event] = seconds_since_process_start()

    def begin_updates(self) -> None:
        """The first update starts now."""
        self._stopwatch.lap()

    def end_update(self, **numbers: float) -> None:
        """An update has ended, on the device as well."""
        self.updates.append(self._stopwatch.lap() | numbers)
        if len(self.updates) == 1:
            self.mark("first update done")

    def write(self, output: Path, **more: Any) -> None:
        """Write everything as JSON."""
        self.mark("end")
        result = {"seconds": self.seconds, "updates": self.updates, "peak_memory": peak_memory()} | more
        output.write_text(json.dumps(result))
