"""Average metrics over the updates of each log line, read one line late so that nothing waits for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from easydel.options import check_options
from easydel.trainers.trainer_protocol import BatchStatistics, Metrics, NonFiniteError

logger = logging.getLogger("easydel")


class MeanMetrics:
    """Collects the means of each batch with its number of examples; fetches from the device only at the end."""

    def __init__(self) -> None:
        self._metrics: list[Mapping[str, Any]] = []
        self._examples: list[int] = []

    def add(self, metrics: Mapping[str, Any], examples: int) -> None:
        """Add one batch's means; the device may still be computing its arrays."""
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


class Update(NamedTuple):
    """One update's metrics; the device may still be computing some of them."""

    step: int
    metrics: Metrics
    nonfinite: Any
    statistics: BatchStatistics


class LogWindow:
    """The updates of one log line, and the seconds they took on the device."""

    def __init__(self, updates: Iterable[Update] = ()) -> None:
        self.updates = list(updates)
        self.seconds = 0.0

    def wait(self) -> list[bool]:
        """Wait for the last update; return whether each update was non-finite."""
        return [bool(flag) for flag in jax.device_get([update.nonfinite for update in self.updates])]

    def means(self) -> dict[str, float]:
        """Means over the window's examples."""
        metrics = MeanMetrics()
        for update in self.updates:
            metrics.add(update.metrics | update.statistics.means, update.statistics.examples)
        return metrics.means()

    def total(self, count: Callable[[BatchStatistics], float]) -> float:
        """The sum of a count over the window's updates."""
        return sum(count(update.statistics) for update in self.updates)

    @property
    def last_step(self) -> int:
        """The number of the window's last update."""
        return self.updates[-1].step


class TrainingLog:
    """Cuts a run into windows of `log_steps` updates and stops it when updates stay non-finite.

    A window is read when the next one is full: its metrics are computed by then. A non-finite update is therefore
    noticed up to two windows late; it was never applied.

    Args:
      log_steps: updates per window.
      max_nonfinite_steps: non-finite updates in a row that end the run.
      write: called with each window when its line is due.
    """

    def __init__(self, log_steps: int, max_nonfinite_steps: int, write: Callable[[LogWindow], None]):
        self._log_steps = log_steps
        self._max_nonfinite_steps = max_nonfinite_steps
        self._write = write
        self._window = LogWindow()
        self._full: LogWindow | None = None
        self._nonfinite_in_a_row = 0
        # Updates run asynchronously, so a window's time is measured from one window's end to the next.
        self._last_end = time.perf_counter()

    def add(self, step: int, metrics: Metrics, nonfinite: jax.Array, statistics: BatchStatistics) -> None:
        """Add update number `step`.

        Raises:
          NonFiniteError: too many updates in a row were non-finite.
        """
        self._append(Update(step, metrics, nonfinite, statistics))

    def _append(self, update: Update) -> None:
        self._window.updates.append(update)
        if update.step % self._log_steps == 0:
            # Set both before a line is written: writing calls callbacks, which may raise.
            full, self._full, self._window = self._full, self._window, LogWindow()
            self._finish(full)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Write the complete line, and leave the time inside the block out of the speeds."""
        self.write_complete()
        self._window.wait()
        started = time.perf_counter()
        yield
        self._last_end += time.perf_counter() - started

    def write_complete(self) -> None:
        """Write the line that is complete and waits for the next one."""
        full, self._full = self._full, None
        self._finish(full)

    def write_all(self) -> None:
        """Write what is left, full or not."""
        self.write_complete()
        window, self._window = self._window, LogWindow()
        self._finish(window)

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint must keep so that later lines are the same; waits for the device."""
        updates = [
            update._asdict()
            | {"metrics": jax.tree.map(_plain, jax.device_get(update.metrics))}
            | {"nonfinite": bool(update.nonfinite), "statistics": dataclasses.asdict(update.statistics)}
            for window in (self._full, self._window)
            if window is not None
            for update in window.updates
        ]
        return {"updates": updates, "nonfinite_in_a_row": self._nonfinite_in_a_row}

    def restore(self, updates: Iterable[Update], nonfinite_in_a_row: int) -> None:
        """Restore what `read_log_metadata` returned."""
        self._nonfinite_in_a_row = nonfinite_in_a_row
        for update in updates:
            self._append(update)

    def _finish(self, window: LogWindow | None) -> None:
        if window is None or not window.updates:
            return
        flags = window.wait()
        end = time.perf_counter()
        window.seconds, self._last_end = end - self._last_end, end
        error = None
        for update, is_bad in zip(window.updates, flags):
            self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if is_bad else 0
            if not is_bad:
                continue
            names = update.statistics.names
            message = f"update {update.step} was skipped: its loss or gradient is not finite ({names})"
            logger.warning("%s.", message)
            if self._nonfinite_in_a_row >= self._max_nonfinite_steps:
                error = NonFiniteError(
                    f"{message}, {self._nonfinite_in_a_row} in a row. The state is the last good one. "
                    "Look at these rows, lower learning_rate, or raise max_nonfinite_steps."
                )
        self._write(window)
        if error is not None:
            raise error


def read_log_metadata(metadata: Mapping[str, Any]) -> tuple[list[Update], int]:
    """Read the updates that wait for their line, and the number of last ones skipped, from `TrainingLog.metadata`.

    Raises:
      ValueError: this is not such metadata; names the field.
    """
    in_a_row, entries = metadata.get("nonfinite_in_a_row"), metadata.get("updates")
    if type(in_a_row) is not int or not isinstance(entries, list):
        raise ValueError("log")
    return [_read_update(entry) for entry in entries], in_a_row


def _read_update(entry: Any) -> Update:
    try:
        update = Update(**(entry | {"statistics": BatchStatistics(**entry["statistics"])}))
        check_options(update.statistics)
        numbers = [*update.metrics.values(), *update.statistics.means.values()]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"log.updates: {error}") from error
    is_right = type(update.step) is int and type(update.nonfinite) is bool
    if not is_right or not all(type(number) in (int, float, list) for number in numbers):
        raise ValueError("log.updates")
    return update


def _plain(value: Any) -> Any:
    """A value of a metric in JSON types."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _mean(values: Sequence[tuple[Any, int]]) -> Any:
    latest = values[-1][0]
    arrays = [array for value, _ in values if (array := _numbers(value)) is not None]
    if len(arrays) < len(values) or len({array.shape for array in arrays}) > 1:
        return latest.tolist() if isinstance(latest, np.ndarray) else latest
    mean = np.asarray(np.average(np.stack(arrays), axis=0, weights=[examples for _, examples in values]))
    return mean.item() if mean.size == 1 else mean.tolist()


def _numbers(value: Any) -> np.ndarray | None:
    """The value in float64, or None if it is text, a ragged list or a boolean."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.number) else None
