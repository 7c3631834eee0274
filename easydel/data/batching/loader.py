"""Rows in an order, transformed on threads, in batches of consecutive good rows: a Grain pipeline."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain

from easydel.data.batching.ahead import MapAhead
from easydel.data.batching.identity import data_identity
from easydel.data.batching.outcomes import GoodPairs, Outcome, Transform
from easydel.data.batching.packing import Batch
from easydel.data.batching.stream import StreamedRow, stream_rows
from easydel.data.faults import MINIMUM_ROWS_TO_JUDGE, DataError, FaultTally, RowFault, UnreadableRow, unreadable
from easydel.data.sources.base import Row, ShardedDataSource
from easydel.data.tree import PreferencePair

# Rows are transformed this many batches ahead of the one being packed, on this many threads.
ROWS_AHEAD_IN_BATCHES = 2
THREADS = 4
PACKED_BATCHES_AHEAD = 2


class BatchIterator(Iterator[Batch]):
    """Batches from a place in the data on; made by `PreferenceLoader.iterate`.

    Batches are made ahead on threads; `position` and `tally` speak of the batches that were handed out.

    Attributes:
      tally: rows up to the end of the latest batch, good and dropped.

    Raises:
      DataError: from ``next``, when too large a share of the rows cannot be used or there is none at all.
    """

    def __init__(self, batches: grain.IterDataset, ahead: FaultTally, order: dict[str, Any], state: Any):
        self._ahead = ahead
        self._order = order
        self._ended = False
        self._batches = iter(batches)
        if state is not None:
            self._batches.set_state(state)
        self.tally = FaultTally(ahead.limit)
        self.tally.restore(self._batches.get_state()["tally"])

    def __next__(self) -> Batch:
        if self._ended:
            raise StopIteration
        try:
            batch = next(self._batches)
        except (StopIteration, DataError) as end:
            # Nothing runs ahead any more, and bad rows may have come after the last batch.
            self._ended = True
            self.tally.restore(self._ahead.state())
            if isinstance(end, StopIteration):
                self.tally.check(final=True)
                if self.tally.rows_seen == 0:
                    raise DataError("the data holds no rows.") from None
            raise
        self.tally.restore(self._batches.get_state()["tally"])
        return batch

    def position(self) -> dict[str, Any]:
        """The place right after the latest batch, as values that JSON can hold; for `PreferenceLoader.iterate`."""
        return {"order": dict(self._order), "state": copy.deepcopy(self._batches.get_state())}

    def close(self) -> None:
        """Stop the threads that work ahead, and give no more batches."""
        self._ended = True
        self._batches.close()


class PreferenceLoader:
    """Batches of `batch_size` consecutive good rows; nothing is transformed before iteration asks for it.

    It can be iterated any number of times; each pass counts its rows anew.

    Args:
      source: rows, by number or in order only.
      transform: row and its index -> pair, or the fault that keeps it from becoming one.
      collate: pairs -> batch.
      batch_size: pairs a batch; the last one may hold fewer.
      max_dropped_share: largest share of rows, 0 to 1, that may be dropped.
      shuffle_seed: a different order each epoch, the same in every run with this seed; None keeps the data's order.
      shuffle_buffer_size: rows within which a source that can only be read in order is shuffled; its shards are
        shuffled besides. With access by number, all rows are shuffled.
      num_epochs: passes over the data in one iteration; batches run on across the end of an epoch.

    Attributes:
      tally: rows that the latest pass has seen so far, up to its latest batch.

    Example:
      >>> batches = loader.iterate()  # doctest: +SKIP
      >>> first, position = next(batches), batches.position()  # doctest: +SKIP
      >>> second = next(loader.iterate(position))  # doctest: +SKIP
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
        shuffle_buffer_size: int = 10_000,
        num_epochs: int = 1,
    ):
        self._source = source
        self._transform = transform
        self._collate = collate
        self._batch_size = batch_size
        self._shuffle_seed = shuffle_seed
        self._shuffle_buffer_size = shuffle_buffer_size
        self._num_epochs = num_epochs
        self._max_dropped_share = max_dropped_share
        self._latest: BatchIterator | None = None

    def __iter__(self) -> BatchIterator:
        return self.iterate()

    def iterate(self, position: dict[str, Any] | None = None) -> BatchIterator:
        """One pass, from its beginning or from where `BatchIterator.position` says.

        Raises:
          ValueError: the position belongs to other data or another order.
        """
        order = self._order()
        if position is not None and position["order"] != order:
            changed = [f"{name}={position['order'].get(name)}, now {value}" for name, value in order.items()
                       if position["order"].get(name) != value]  # fmt: skip
            raise ValueError(
                "the position belongs to another order of the rows, so the data cannot go on from it: it has "
                f"{'; '.join(changed)}. Give the same data and shuffling as then, or start from the beginning."
            )
        tally = FaultTally(self._max_dropped_share)
        state = None if position is None else position["state"]
        self._latest = BatchIterator(self._pipeline(tally), tally, order, state)
        return self._latest

    def __len__(self) -> int:
        """Rows of the data, good and bad.

        Raises:
          TypeError: the data can only be read in order, so nobody knows.
        """
        return len(self._source)

    @property
    def is_stream(self) -> bool:
        """Whether the rows can only be read in order."""
        return not self._source.has_random_access

    @property
    def tally(self) -> FaultTally:
        return FaultTally(self._max_dropped_share) if self._latest is None else self._latest.tally

    def counters(self) -> dict[str, float]:
        """Rows that the latest pass dropped so far."""
        return {"dropped_rows": float(sum(self.tally.dropped.values()))}

    def identity(self) -> dict[str, Any]:
        """What tells these batches from those of other data; see `data_identity`."""
        return data_identity(self._source, self._transform)

    def first_pairs(self, count: int) -> list[PreferencePair]:
        """The first good rows, in the data's own order; this is no pass and counts nothing."""
        results = (self._transform(row, index) for index, row in enumerate(readable_rows(self._source)))
        return list(itertools.islice((pair for pair in results if not isinstance(pair, RowFault)), count))

    def _order(self) -> dict[str, Any]:
        """What the order of the rows depends on."""
        by_number, shuffled = not self.is_stream, self._shuffle_seed is not None
        return {
            "rows": len(self._source) if by_number else None,
            "shards": None if by_number else self._source.num_shards(),
            "shuffle_seed": self._shuffle_seed,
            "shuffle_buffer_size": self._shuffle_buffer_size if shuffled and not by_number else None,
        }

    def _pipeline(self, tally: FaultTally) -> grain.IterDataset:
        pairs = GoodPairs(self._outcomes(), tally)
        batches = pairs.batch(self._batch_size, batch_fn=self._collate)
        return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PACKED_BATCHES_AHEAD)

    def _outcomes(self) -> grain.IterDataset:
        """Every row's outcome, in order; rows are transformed ahead on threads."""
        rows_ahead = ROWS_AHEAD_IN_BATCHES * self._batch_size
        if self.is_stream:
            rows = stream_rows(
                self._source,
                num_epochs=self._num_epochs,
                shuffle_seed=self._shuffle_seed,
                buffer_size=self._shuffle_buffer_size,
            )
            return MapAhead(rows, self._streamed_outcome, num_threads=THREADS, buffer_size=rows_ahead)
        length = len(self._source)
        indices = grain.MapDataset.range(length)
        if self._shuffle_seed is not None:
            indices = indices.shuffle(seed=self._shuffle_seed)
        outcomes = indices.repeat(self._num_epochs).map_with_index(
            lambda number, index: self._outcome(number // length, int(index))
        )
        return outcomes.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=rows_ahead))

    def _outcome(self, epoch: int, index: int) -> Outcome:
        """A row that is fetched by number."""
        try:
            result = self._transform(self._source[index], index)
        except UnreadableRow as error:
            result = unreadable(error, index)
        except Exception as error:
            error.add_note(f"while reading {self._source.locate(index)}")
            raise
        return Outcome(result, epoch, self._source.locate(index) if isinstance(result, RowFault) else "")

    def _streamed_outcome(self, row: StreamedRow) -> Outcome:
        if isinstance(row.content, UnreadableRow):
            result: PreferencePair | RowFault = unreadable(row.content, row.number)
        else:
            result = self._transform(row.content, row.number)
        is_bad = isinstance(result, RowFault)
        return Outcome(result, row.epoch, self._source.locate_in(row.shard, row.row) if is_bad else "")


def readable_rows(source: ShardedDataSource) -> Iterator[Row]:
    """A source's rows without those that cannot be read; these are counted when their turn comes."""
    rows = iter(source)
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except UnreadableRow:
            continue


def check_first_rows(
    source: ShardedDataSource, transform: Transform, max_dropped_share: float, rows: int = 16
) -> list[PreferencePair]:
    """Look at a few rows before anything expensive starts, at all of them where they are few: the good ones' pairs.

    Raises:
      DataError: there are no rows, they show a structural fault, none is good, all have weight 0, or a small set has
        too many bad ones.
    """
    is_whole = source.has_random_access and len(source) <= MINIMUM_ROWS_TO_JUDGE
    tally = FaultTally(max_dropped_share if is_whole else 1.0)
    first, pairs = iter(source), []
    for index in range(len(source) if is_whole else rows):
        try:
            result = transform(next(first), index)
        except StopIteration:
            break
        except UnreadableRow as error:
            result = unreadable(error, index)
        if isinstance(result, RowFault):
            tally.record(result, source.locate(index))
        else:
            tally.record_good()
            pairs.append(result)
    if tally.rows_seen == 0:
        raise DataError("the data holds no rows.")
    tally.check(final=True)
    if all(pair.weight == 0 for pair in pairs):
        which = "every good row" if is_whole else f"each of the first {len(pairs)} good rows"
        raise DataError(
            f'{source.locate(pairs[0].index)}: "weight" is 0, as in {which}, so that nothing is trained. Give weights '
            'above 0, drop the column, or leave such rows out: source.filter(lambda row: float(row["weight"]) > 0).'
        )
    return pairs
