"""The updates between two lines of the log."""

from __future__ import annotations

import time

from easydel.trainers.metrics import MeanMetrics
from easydel.trainers.trainer_protocol import BatchStatistics, Metrics


class LogWindow:
    """The updates of one log line."""

    def __init__(self) -> None:
        self.metrics = MeanMetrics()
        self.steps: list[tuple[int, BatchStatistics]] = []
        self._started = time.perf_counter()
        self.seconds = 0.0

    def add(self, step: int, metrics: Metrics, statistics: BatchStatistics) -> None:
        self.metrics.add(metrics | statistics.means, statistics.examples)
        self.steps.append((step, statistics))

    def close(self) -> LogWindow:
        self.seconds = time.perf_counter() - self._started
        return self

    @property
    def last_step(self) -> int:
        return self.steps[-1][0]

    @property
    def tokens(self) -> int:
        return sum(statistics.tokens for _, statistics in self.steps)

    @property
    def examples(self) -> int:
        return sum(statistics.examples for _, statistics in self.steps)

    @property
    def flops(self) -> float:
        return sum(statistics.flops for _, statistics in self.steps)
