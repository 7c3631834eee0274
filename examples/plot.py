"""Curves of a training log, as an image and in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import plotext

matplotlib.use("Agg")  # draws into files; needs no screen
from matplotlib import pyplot as plt

METRICS = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
PARTS = {"train": "training batch", "eval": "held-out pairs"}

Log = Sequence[dict[str, Any]]


def save_curves(log: Log, path: Path) -> None:
    """Write one panel a metric over the updates, training batches and held-out pairs together, as an image."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(12, 3.5), layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items()):
        for part, label in PARTS.items():
            axis.plot(*curve(log, f"{part}/{metric}"), marker="o", label=label)
        axis.set(title=title, xlabel="update")
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_curves(log: Log, *, color: bool = True) -> None:
    """Print the same curves, one below the other."""
    figure = plotext.figure
    for metric, title in METRICS.items():
        figure.clear()
        figure.plot_size(76, 12)
        figure.theme("simple")
        figure.title(f"{title} over the updates")
        for (part, label), marker in zip(PARTS.items(), ("braille", "o")):
            figure.draw(figure.signal(*curve(log, f"{part}/{metric}"), marker=marker).lines().label(label))
        figure.show(colorless=not color)


def curve(log: Log, name: str) -> tuple[list[int], list[float]]:
    """The updates at which a number was logged, and its values."""
    lines = [line for line in log if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]
