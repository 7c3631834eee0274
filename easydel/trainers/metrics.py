"""Means over many batches, exact whatever the batches' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def fetch(self) -> list[dict[str, np.ndarray]]:
        """The batches' metrics on the host, in order; waits for the device."""
        return jax.device_get([dict(metrics) for metrics in self._metrics])

    def means(self) -> dict[str, Any]:
        """Mean over all examples of every metric, in float64; arrays and lists of one shape element by element.

        What has no mean (text, lists that change their length) keeps its latest value.
        """
        collected: dict[str, list[tuple[Any, int]]] = {}
        for metrics, examples in zip(self.fetch(), self._examples):
            for name, value in metrics.items():
                collected.setdefault(name, []).append((value, examples))
        return {name: _mean(values) for name, values in collected.items()}


def _mean(values: Sequence[tuple[Any, int]]) -> Any:
    latest = values[-1][0]
    arrays = [array for value, _ in values if (array := _numbers(value)) is not None]
    if len(arrays) < len(values) or len({array.shape for array in arrays}) > 1:
        return latest.tolist() if isinstance(latest, np.ndarray) else latest
    mean = np.asarray(np.average(np.stack(arrays), axis=0, weights=[examples for _, examples in values]))
    return mean.item() if mean.size == 1 else mean.tolist()


def _numbers(value: Any) -> np.ndarray | None:
    """The value in float64, or None where it is text, a ragged list or a truth value."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.number) else None
