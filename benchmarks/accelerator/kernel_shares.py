"""What the time of the device went into, from a trace of `jax.profiler`."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.suite.operation_times import CONTAINERS

# The first that matches a kernel's name, or the name of the operation behind it, takes it.
KINDS = {
    "attention": r"fmha|flash|sdpa|cudnn_generated|tree_attention",
    "communication": r"nccl|all-reduce|all-gather|reduce-scatter|all-to-all|collective",
    "matrix products": r"gemm|gemv|cublas|cutlass|nvjet|wgmma|^dot|matmul|convolution",
    "copies": r"memcpy|memset|^copy|transpose",
    "elementwise and reductions": "",
}


def kind_of(name: str, operation: str) -> str:
    """The row of `KINDS` a kernel belongs to."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, f"{name}\n{operation}", re.I | re.M))


def kernel_times(folder: Path) -> Counter[tuple[str, str]]:
    """Microseconds by ``(kernel, operation)``, added up over the device's streams.

    Raises:
      FileNotFoundError: the folder holds no trace.
    """
    files = sorted(folder.rglob("*.trace.json.gz"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.trace.json.gz; was it written by jax.profiler.trace?")
    events = json.loads(gzip.decompress(files[-1].read_bytes()))["traceEvents"]
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
    }
    has_device = any(key[0] == "process_name" and name.startswith("/device:") for key, name in names.items())
    times: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.get("ph") != "X":
            continue
        operation = event.get("args", {}).get("hlo_op", "")
        if has_device:
            process = names.get(("process_name", event["pid"], None), "")
            thread = names.get(("thread_name", event["pid"], event["tid"]), "")
            # Beside the streams a GPU's trace repeats the same time by operation, module and step.
            is_kernel = process.startswith("/device:") and re.match(r"Stream|XLA Ops", thread)
        else:
            is_kernel = bool(operation)
        # What is inside a loop has events of its own.
        if is_kernel and not CONTAINERS.match(operation):
            times[event["name"], operation] += event["dur"]
    return times


def kernel_shares(folder: Path, largest: int = 12) -> dict[str, Any]:
    """Shares of the device's busy time by kind, and the kernels that took most of it."""
    times = kernel_times(folder)
    total = sum(times.values())
    kinds: Counter[str] = Counter()
    for (name, operation), time in times.items():
        kinds[kind_of(name, operation)] += time
    return {
        "busy_seconds": total / 1e6,
        "kinds": {kind: time / total for kind, time in kinds.most_common()},
        "kernels": [
            {"kernel": name, "operation": operation, "share": time / total}
            for (name, operation), time in times.most_common(largest)
        ],
    }
