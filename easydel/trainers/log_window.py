"""The updates between two lines of the log, read one line late so that nothing waits for the device."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import jax

from easydel.trainers.metrics import MeanMetrics
from easydel.trainers.trainer_protocol import BatchStatistics, Metrics, NonFiniteError

logger = logging.getLogger("easydel")


class LogWindow:
    """The updates of one log line, and the seconds they took on the device."""

    def __init__(self) -> None:
        self.metrics = MeanMetrics()
        self.steps: list[tuple[int, BatchStatistics, jax.Array]] = []
        self.seconds = 0.0

    def add(self, step: int, metrics: Metrics, nonfinite: jax.Array, statistics: BatchStatistics) -> None:
        """Take one update; its numbers may still be on their way on the device."""
        self.metrics.add(metrics | statistics.means, statistics.examples)
        self.steps.append((step, statistics, nonfinite))

    def wait(self) -> list[bool]:
        """Whether each update was non-finite; returns when the last of them is done."""
        return [bool(flag) for flag in jax.device_get([flag for _, _, flag in self.steps])]

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
        # Updates are only sent off when they are called, so a window's time is from one window's end to the next's.
        self._last_end = time.perf_counter()

    def add(self, step: int, metrics: Metrics, nonfinite: jax.Array, statistics: BatchStatistics) -> None:
        """Take update number `step`.

        Raises:
          NonFiniteError: too many updates in a row were non-finite.
        """
        self._window.add(step, metrics, nonfinite, statistics)
        if step % self._log_steps == 0:
            self._finish(self._full)
            self._full, self._window = self._window, LogWindow()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Write what is complete, and leave the time inside out of the speeds."""
        self._finish(self._full)
        self._full = None
        self._window.wait()
        started = time.perf_counter()
        yield
        self._last_end += time.perf_counter() - started

    def write_all(self) -> None:
        """Write what is left, full or not."""
        self._finish(self._full)
        self._finish(self._window)
        self._full, self._window = None, LogWindow()

    def _finish(self, window: LogWindow | None) -> None:
        if window is None or not window.steps:
            return
        flags = window.wait()
        end = time.perf_counter()
        window.seconds, self._last_end = end - self._last_end, end
        for (step, statistics, _), is_bad in zip(window.steps, flags):
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
