"""A function over the elements of a stream, run ahead on threads; the results come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain


class MapAhead(grain.IterDataset):
    """`function` of every element; Grain's own map of a stream runs on one thread.

    Args:
      parent: the elements, read on the thread that iterates.
      function: called on `num_threads` threads.
      num_threads: how many run at once.
      buffer_size: elements that are worked on or ready ahead of the one asked for.
    """

    def __init__(
        self, parent: grain.IterDataset, function: Callable[[Any], Any], *, num_threads: int, buffer_size: int
    ):
        super().__init__(parent)
        self._function = function
        self._num_threads = num_threads
        self._buffer_size = buffer_size

    def __iter__(self) -> grain.DatasetIterator:
        return _MapAheadIterator(iter(self._parent), self._function, self._num_threads, self._buffer_size)

    def __str__(self) -> str:
        return "MapAhead"


class _MapAheadIterator(grain.DatasetIterator):
    def __init__(
        self, parent: grain.DatasetIterator, function: Callable[[Any], Any], num_threads: int, buffer_size: int
    ):
        super().__init__(parent)
        self._function = function
        self._buffer_size = buffer_size
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="easydel-rows")
        # What is ahead, each with the state of the parent right behind it.
        self._ahead: deque[tuple[Future, dict[str, Any]]] = deque()
        self._parent_ended = False
        self._state = parent.get_state()

    def __next__(self) -> Any:
        while not self._parent_ended and len(self._ahead) < self._buffer_size:
            try:
                element = next(self._parent)
            except StopIteration:
                self._parent_ended = True
            else:
                self._ahead.append((self._threads.submit(self._function, element), self._parent.get_state()))
        if not self._ahead:
            self._threads.shutdown()
            raise StopIteration
        result, self._state = self._ahead.popleft()
        return result.result()

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        for result, _ in self._ahead:
            result.cancel()
        self._ahead.clear()
        self._parent_ended = False
        self._parent.set_state(state)
        self._state = state

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        super().close()

    def __str__(self) -> str:
        return "MapAheadIterator"
