"""The updates between two lines of the log, read one line late so that nothing waits for the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax

from easydel.trainers.metrics import MeanMetrics
from easydel.trainers.trainer_protocol import BatchStatistics, Metrics, NonFiniteError

logger = logging.getLogger("easydel")


class LogWindow:
    """The updates of one log line, and the time they took."""

    def __init__(self) -> None:
        self.metrics = MeanMetrics()
        self.steps: list[tuple[int, BatchStatistics, Any]] = []
        self.seconds = 0.0
        self._started = time.perf_counter()

    def add(self, step: int, metrics: Metrics, nonfinite: jax.Array, statistics: BatchStatistics) -> None:
        """Take one update; its numbers may still be on their way on the device."""
        self.metrics.add(metrics | statistics.means, statistics.examples)
        self.steps.append((step, statistics, nonfinite))

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on updates."""
        self._started += seconds

    def close(self) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self._started

    @property
    def last_step(self) -> int:
        return self.steps[-1][0]

    @property
    def tokens(self) -> int:
        return sum(statistics.tokens for _, statistics, _ in self.steps)

    @property
    def examples(self) -> int:
        return sum(statistics.examples for _, statistics, _ in self.steps)

    @property
    def flops(self) -> float:
        return sum(statistics.flops for _, statistics, _ in self.steps)


class TrainingLog:
    """Cuts a run into windows of `log_steps` updates and stops it when updates stay non-finite.

    A window is looked at when the next one is full: its numbers are there by then. A non-finite update is therefore
    noticed up to two windows late; it was never applied.
    """

    def __init__(self, log_steps: int, max_nonfinite_steps: int, write: Callable[[LogWindow], None]):
        self._log_steps = log_steps
        self._max_nonfinite_steps = max_nonfinite_steps
        self._write = write
        self._window = LogWindow()
        self._full: LogWindow | None = None
        self._nonfinite_in_a_row = 0

    def add(self, step: int, metrics: Metrics, nonfinite: jax.Array, statistics: BatchStatistics) -> None:
        """Take update number `step`.

        Raises:
          NonFiniteError: too many updates in a row were non-finite.
        """
        self._window.add(step, metrics, nonfinite, statistics)
        if step % self._log_steps == 0:
            self._finish(self._full)
            self._window.close()
            self._full, self._window = self._window, LogWindow()

    def write_full(self) -> None:
        """Write the last full window, if it is not written yet."""
        self._finish(self._full)
        self._full = None

    def write_all(self) -> None:
        """Write what is left, full or not."""
        self.write_full()
        if self._window.steps:
            self._window.close()
            self._finish(self._window)
        self._window = LogWindow()

    def exclude(self, seconds: float) -> None:
        """Leave time that was not spent on updates out of the current window."""
        self._window.exclude(seconds)

    def _finish(self, window: LogWindow | None) -> None:
        if window is None:
            return
        for (step, statistics, _), is_bad in zip(window.steps, jax.device_get([flag for _, _, flag in window.steps])):
            self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if is_bad else 0
            if not is_bad:
                continue
            message = f"update {step} was skipped: its loss or gradient is not finite ({statistics.names})"
            logger.warning("%s.", message)
            if self._nonfinite_in_a_row >= self._max_nonfinite_steps:
                raise NonFiniteError(
                    f"{message}, {self._nonfinite_in_a_row} in a row. The state is the last good one. "
                    "Look at these rows, lower learning_rate, or raise max_nonfinite_steps."
                )
        self._write(window)
