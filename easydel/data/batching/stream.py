"""Stream the rows of sources that can only be read in order, as Grain datasets, shuffled in windows, on threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from easydel.data.faults import UnreadableRow
from easydel.data.sources.base import Row, ShardedDataSource


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row with its epoch, shard and number.

    Attributes:
      content: the row, or the error that says why it cannot be read.
      epoch: epoch of the row, from 0.
      number: number of the row in its epoch, from 0.
      shard, row: the shard's name, and the row's number in it, from 0.
    """

    content: Row | UnreadableRow
    epoch: int
    number: int
    shard: str
    row: int


def stream_rows(
    source: ShardedDataSource, *, num_epochs: int, shuffle_seed: int | None, buffer_size: int
) -> grain.IterDataset:
    """Every row of every epoch, as `StreamedRow`; an iterator's state holds the shard and row to resume at.

    Args:
      source: the rows.
      num_epochs: passes over the data.
      shuffle_seed: shuffles the order of the shards, and then the rows within windows of `buffer_size` rows, anew each
        epoch; None keeps the order of the source.
      buffer_size: rows of a window; a window is held in memory, and read again on resuming.
    """

    def epoch_rows(epoch: int) -> grain.IterDataset:
        shards = list(source.shard_names)
        if shuffle_seed is None:
            return _ShardRows(source, shards, epoch)
        random = np.random.default_rng([shuffle_seed, epoch])
        rows = _ShardRows(source, [shards[number] for number in random.permutation(len(shards))], epoch)
        # Grain adds the window's number to the seed, which must stay within 32 bits.
        seed = int(random.integers(2**31))
        return grain.experimental.WindowShuffleIterDataset(rows, window_size=buffer_size, seed=seed)

    return _Epochs(epoch_rows, num_epochs)


class _ShardRows(grain.IterDataset):
    """The rows of shards, one shard after the other."""

    def __init__(self, source: ShardedDataSource, shards: Sequence[str], epoch: int):
        super().__init__()
        self._source = source
        self._shards = shards
        self._epoch = epoch

    def __iter__(self) -> grain.DatasetIterator:
        return _ShardRowsIterator(self._source, self._shards, self._epoch)

    def __str__(self) -> str:
        return "ShardRows"


class _ShardRowsIterator(grain.DatasetIterator):
    def __init__(self, source: ShardedDataSource, shards: Sequence[str], epoch: int):
        super().__init__()
        self._source = source
        self._shards = shards
        self._epoch = epoch
        self._rows: Iterator[Row] | None = None
        self._shard = self._row = self._number = 0

    def __next__(self) -> StreamedRow:
        while self._shard < len(self._shards):
            shard = self._shards[self._shard]
            if self._rows is None:
                self._rows = iter(self._source.open_shard_at_row(shard, self._row))
            try:
                content: Row | UnreadableRow = next(self._rows)
            except StopIteration:
                self._rows, self._shard, self._row = None, self._shard + 1, 0
                continue
            except UnreadableRow as error:
                content = error
            except Exception as error:
                error.add_note(f"while reading {self._source.locate_in(shard, self._row)}")
                raise
            self._row, self._number = self._row + 1, self._number + 1
            return StreamedRow(content, self._epoch, self._number - 1, shard, self._row - 1)
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        return {"shard": self._shard, "row": self._row, "number": self._number}

    def set_state(self, state: dict[str, Any]) -> None:
        self._shard, self._row, self._number = state["shard"], state["row"], state["number"]
        self._rows = None

    def __str__(self) -> str:
        return "ShardRowsIterator"


class _Epochs(grain.IterDataset):
    """The datasets of all epochs, one after the other, each made when its epoch begins."""

    def __init__(self, make: Callable[[int], grain.IterDataset], num_epochs: int):
        super().__init__()
        self._make = make
        self._num_epochs = num_epochs

    def __iter__(self) -> grain.DatasetIterator:
        return _EpochsIterator(self._make, self._num_epochs)

    def __str__(self) -> str:
        return "Epochs"


class _EpochsIterator(grain.DatasetIterator):
    def __init__(self, make: Callable[[int], grain.IterDataset], num_epochs: int):
        super().__init__()
        self._make = make
        self._num_epochs = num_epochs
        self._epoch = 0
        self._rows = iter(make(0))

    def __next__(self) -> Any:
        while True:
            try:
                return next(self._rows)
            except StopIteration:
                if self._epoch + 1 >= self._num_epochs:
                    raise
                self._epoch += 1
                self._rows = iter(self._make(self._epoch))

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "rows": self._rows.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._rows = iter(self._make(self._epoch))
        self._rows.set_state(state["rows"])

    def __str__(self) -> str:
        return "EpochsIterator"


class MapAhead(grain.IterDataset):
    """Apply a function to every element ahead, on several threads; Grain's own map of a stream runs on one.

    Args:
      parent: the elements, read on the thread that iterates.
      function: called on `num_threads` threads.
      num_threads: number of threads.
      buffer_size: most elements in work or ready ahead of the one asked for.
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
        # Results ahead, each with the state of the parent right after its element.
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
