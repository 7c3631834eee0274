"""Where figures were measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# What a user may have set that changes speed or memory.
VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "XLA_FLAGS")


def describe() -> dict[str, Any]:
    """Processor, memory and settings of this machine."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    total = next(line for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(total.split()[1]) * 1024,
        "python": platform.python_version(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
