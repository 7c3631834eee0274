"""The picture of `benchmarks.scaling`: measured points and the predicted curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.suite.matmul import matmul_rate

LABELS = {
    "length": "tokens of prompt and completion",
    "batch": "pairs of an update",
    "vocabulary": "vocabulary",
    "prompt_share": "share of the prompt",
}


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Time above, memory below, one column a sweep."""
    sweeps, rate = result["sweeps"], matmul_rate(result["matmul"])
    figure, axes = plt.subplots(2, len(sweeps), figsize=(3.4 * len(sweeps), 5.6), squeeze=False, layout="constrained")
    for (time, memory), (sweep, points) in zip(axes.T, sweeps.items()):
        values = [point[sweep] for point in points]
        time.plot(values, [median(point["seconds"]) for point in points], "o", label="measured")
        time.plot(values, [point["flops"] / rate for point in points], "-", label="arithmetic at the matmul rate")
        memory.plot(values, [point["measured_bytes"] / 1e9 for point in points], "o", label="measured")
        memory.plot(values, [point["compiled_bytes"] / 1e9 for point in points], "x", label="by the compiler")
        memory.plot(values, [point["bytes"] / 1e9 for point in points], "-", label="predicted")
        for axis in (time, memory):
            axis.set_xlabel(LABELS[sweep])
            axis.grid(alpha=0.3)
            if sweep != "prompt_share":
                axis.set_xscale("log", base=2)
        memory.set_ylim(0, 1.1 * memory.get_ylim()[1])
        if sweep == "prompt_share":
            time.set_ylim(0, 1.1 * time.get_ylim()[1])
        else:
            time.set_yscale("log")
    axes[0, 0].set_ylabel("seconds an update")
    axes[1, 0].set_ylabel("GB")
    for row in axes:
        row[0].legend(fontsize="small")
    figure.savefig(file, dpi=100)
    plt.close(figure)
