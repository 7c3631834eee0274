"""Rows in an order, transformed on threads, in batches of consecutive good rows: a Grain pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain

from .faults import FaultTally, RowFault
from .packing import Batch
from .preference import PreferencePair
from .sources import ShardedDataSource

# Rows are transformed this many batches ahead of the one being packed, on this many threads.
ROWS_AHEAD_IN_BATCHES = 2
THREADS = 4
PACKED_BATCHES_AHEAD = 2

Transform = Callable[[Any, int], PreferencePair | RowFault]


class _IndexedRows:
    """Random access to ``(index, row)``, so that a shuffled row still knows its place in the data."""

    def __init__(self, source: ShardedDataSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return int(index), self._source[int(index)]


def make_loader(
    source: ShardedDataSource,
    transform: Transform,
    collate: Callable[[Sequence[PreferencePair]], Batch],
    *,
    batch_size: int,
    tally: FaultTally,
    shuffle_seed: int | None = None,
    num_epochs: int = 1,
) -> grain.IterDataset:
    """Batches of `batch_size` consecutive good rows; nothing is transformed before iteration asks for it.

    Args:
      source: rows with a known length and random access.
      transform: row and its index -> pair, or the fault that keeps it from becoming one.
      collate: pairs -> batch.
      batch_size: pairs a batch; the last one may hold fewer.
      tally: counts good rows and dropped ones, and stops the run when too many are dropped.
      shuffle_seed: a different order each epoch, the same in every run with this seed; None keeps the file's order.
      num_epochs: passes over the data; batches run on across the end of an epoch.
    """

    def to_pair(indexed: tuple[int, Any]) -> PreferencePair | RowFault:
        index, row = indexed
        return transform(row, index)

    def keep(result: PreferencePair | RowFault) -> bool:
        if isinstance(result, RowFault):
            tally.record(result, source.locate(result.index))
            return False
        tally.record_good()
        return True

    rows = grain.MapDataset.source(_IndexedRows(source))
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed)
    pairs = rows.repeat(num_epochs).map(to_pair).filter(keep)
    ahead = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ROWS_AHEAD_IN_BATCHES * batch_size)
    batches = pairs.to_iter_dataset(ahead).batch(batch_size, batch_fn=collate)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PACKED_BATCHES_AHEAD)


def check_first_rows(source: ShardedDataSource, transform: Transform, rows: int = 16) -> None:
    """Look at a few rows before anything expensive starts.

    Raises:
      DataError: the first rows show a structural fault, or none of them is good.
    """
    tally = FaultTally(limit=1.0)
    for index, row in zip(range(rows), source):
        result = transform(row, index)
        if isinstance(result, RowFault):
            tally.record(result, source.locate(index))
        else:
            tally.record_good()
    tally.check(final=True)
