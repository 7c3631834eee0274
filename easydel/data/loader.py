"""Rows in an order, transformed on threads, in batches of consecutive good rows: a Grain pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain

from .faults import MINIMUM_ROWS_TO_JUDGE, DataError, FaultTally, RowFault
from .packing import Batch
from .preference import PreferencePair
from .sources import ShardedDataSource

# Rows are transformed this many batches ahead of the one being packed, on this many threads.
ROWS_AHEAD_IN_BATCHES = 2
THREADS = 4
PACKED_BATCHES_AHEAD = 2

Transform = Callable[[Any, int], PreferencePair | RowFault]


class _Pairs:
    """Random access to ``(index, pair or fault)``, so that a shuffled row still knows its place in the data."""

    def __init__(self, source: ShardedDataSource, transform: Transform):
        self._source = source
        self._transform = transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, PreferencePair | RowFault]:
        index = int(index)
        try:
            row = self._source[index]
        except DataError as error:
            return index, RowFault(index, "row", "unreadable row", str(error))
        return index, self._transform(row, index)


class PreferenceLoader:
    """Batches of `batch_size` consecutive good rows; nothing is transformed before iteration asks for it.

    It can be iterated any number of times; each pass counts its rows anew in `tally`.

    Args:
      source: rows with a known length and random access.
      transform: row and its index -> pair, or the fault that keeps it from becoming one.
      collate: pairs -> batch.
      batch_size: pairs a batch; the last one may hold fewer.
      max_dropped_share: largest share of rows, 0 to 1, that may be dropped.
      shuffle_seed: a different order each epoch, the same in every run with this seed; None keeps the file's order.
      num_epochs: passes over the data in one iteration; batches run on across the end of an epoch.
    """

    def __init__(
        self,
        source: ShardedDataSource,
        transform: Transform,
        collate: Callable[[Sequence[PreferencePair]], Batch],
        *,
        batch_size: int,
        max_dropped_share: float,
        shuffle_seed: int | None = None,
        num_epochs: int = 1,
    ):
        self._source = source
        self._transform = transform
        self._collate = collate
        self._batch_size = batch_size
        self._max_dropped_share = max_dropped_share
        self._shuffle_seed = shuffle_seed
        self._num_epochs = num_epochs
        self.tally = FaultTally(max_dropped_share)

    def __iter__(self) -> Iterator[Batch]:
        """One pass.

        Raises:
          DataError: too large a share of the rows cannot be used, or there is none at all.
        """
        self.tally = tally = FaultTally(self._max_dropped_share)
        yield from self._pipeline(tally)
        tally.check(final=True)
        if tally.rows_seen == 0:
            raise DataError("the data holds no rows.")

    def __len__(self) -> int:
        """Rows of the data, good and bad."""
        return len(self._source)

    def counters(self) -> dict[str, float]:
        """Rows that the latest pass dropped so far."""
        return {"dropped_rows": float(sum(self.tally.dropped.values()))}

    def _pipeline(self, tally: FaultTally) -> grain.IterDataset:
        source = self._source

        def keep(result: tuple[int, PreferencePair | RowFault]) -> bool:
            index, pair = result
            if isinstance(pair, RowFault):
                tally.record(pair, source.locate(index))
                return False
            tally.record_good(index)
            return True

        rows = grain.MapDataset.source(_Pairs(source, self._transform))
        if self._shuffle_seed is not None:
            rows = rows.shuffle(seed=self._shuffle_seed)
        pairs = rows.repeat(self._num_epochs).filter(keep)
        ahead = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ROWS_AHEAD_IN_BATCHES * self._batch_size)
        batches = pairs.to_iter_dataset(ahead).batch(
            self._batch_size, batch_fn=lambda indexed: self._collate([pair for _, pair in indexed])
        )
        return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PACKED_BATCHES_AHEAD)


def check_first_rows(source: ShardedDataSource, transform: Transform, max_dropped_share: float, rows: int = 16) -> None:
    """Look at a few rows before anything expensive starts; at all of them where they are few.

    Raises:
      DataError: there are no rows, they show a structural fault, none is good, or a small set has too many bad ones.
    """
    is_whole = source.has_random_access and len(source) <= MINIMUM_ROWS_TO_JUDGE
    tally = FaultTally(max_dropped_share if is_whole else 1.0)
    for index, row in enumerate(source if is_whole else itertools.islice(source, rows)):
        result = transform(row, index)
        if isinstance(result, RowFault):
            tally.record(result, source.locate(index))
        else:
            tally.record_good(index)
    if tally.rows_seen == 0:
        raise DataError("the data holds no rows.")
    tally.check(final=True)
