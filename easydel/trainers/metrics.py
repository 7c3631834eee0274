"""Means over many batches, exact whatever the batches' sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


class MeanMetrics:
    """Collects per-batch means with the number of examples behind them; fetches from the device only at the end."""

    def __init__(self) -> None:
        self._metrics: list[Mapping[str, Any]] = []
        self._examples: list[int] = []

    def add(self, metrics: Mapping[str, Any], examples: int) -> None:
        """Take one batch's means; arrays may still be on their way on the device."""
        self._metrics.append(metrics)
        self._examples.append(examples)

    def __len__(self) -> int:
        return len(self._metrics)

    def fetch(self) -> list[dict[str, np.ndarray]]:
        """The batches' metrics on the host, in order; waits for the device."""
        return jax.device_get([dict(metrics) for metrics in self._metrics])

    def means(self) -> dict[str, float]:
        """Mean over all examples of every metric, in float64; what is not a single number is left out."""
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for metrics, examples in zip(self.fetch(), self._examples):
            for name, value in metrics.items():
                if not np.issubdtype(np.asarray(value).dtype, np.number) or np.size(value) != 1:
                    continue
                totals[name] = totals.get(name, 0.0) + float(np.asarray(value).item()) * examples
                counts[name] = counts.get(name, 0) + examples
        return {name: total / counts[name] for name, total in totals.items()}
