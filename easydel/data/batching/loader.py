"""Load batches of consecutive good rows, resumable at any batch; rows are transformed ahead, on threads."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain

from easydel.data.batching.first_rows import data_identity, readable_rows
from easydel.data.batching.packing import Batch
from easydel.data.batching.stream import MapAhead, StreamedRow, stream_rows
from easydel.data.faults import DataError, FaultTally, RowFault, UnreadableRow, unreadable
from easydel.data.preference.transform import Transform
from easydel.data.sources.base import ShardedDataSource
from easydel.data.tree import PreferencePair

# Rows are transformed this many batches ahead of the batch that is being packed, on this many threads.
ROWS_AHEAD_IN_BATCHES = 2
THREADS = 4
PACKED_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of transforming one row.

    Attributes:
      result: the pair, or what is wrong with the row.
      epoch: epoch of the row, from 0.
      location: where a bad row lies, such as "train.jsonl, row 812"; "" for a good one.
    """

    result: PreferencePair | RowFault
    epoch: int
    location: str = ""


class _GoodPairs(grain.IterDataset):
    """The good pairs of a dataset of outcomes, in order; every outcome is counted in `tally` when it is read.

    The counts are part of the iterator's state, so that they resume with it.
    """

    def __init__(self, outcomes: grain.IterDataset, tally: FaultTally):
        super().__init__(outcomes)
        self._tally = tally

    def __iter__(self) -> grain.DatasetIterator:
        return _GoodPairsIterator(iter(self._parent), self._tally)

    def __str__(self) -> str:
        return "GoodPairs"


class _GoodPairsIterator(grain.DatasetIterator):
    def __init__(self, outcomes: grain.DatasetIterator, tally: FaultTally):
        super().__init__(outcomes)
        self._tally = tally

    def __next__(self) -> PreferencePair:
        while True:
            outcome: _Outcome = next(self._parent)
            if not isinstance(outcome.result, RowFault):
                self._tally.record_good(outcome.epoch)
                return outcome.result
            self._tally.record(outcome.result, outcome.location, outcome.epoch)

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._parent.get_state(), "tally": self._tally.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["rows"])
        self._tally.restore(state["tally"])

    def __str__(self) -> str:
        return "GoodPairsIterator"


class BatchIterator(Iterator[Batch]):
    """Batches from a position in the data on; made by `PreferenceLoader.iterate`.

    Batches are made ahead on threads; `position` and `tally` describe only those that were returned.

    Attributes:
      tally: counts of good and dropped rows up to the end of the latest batch.

    Raises:
      DataError: from ``next``, when too large a share of the rows cannot be used or there are no rows.
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
            # No thread works ahead any more, and bad rows may follow the last batch.
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
        """The position right after the latest batch, in JSON types; pass it to `PreferenceLoader.iterate` to resume."""
        return {"order": dict(self._order), "state": copy.deepcopy(self._batches.get_state())}

    def close(self) -> None:
        """Stop the threads that work ahead; there are no more batches."""
        self._ended = True
        self._batches.close()


class PreferenceLoader:
    """Batches of `batch_size` consecutive good rows; nothing is transformed before iteration starts.

    A loader can be iterated any number of times; each pass counts its rows anew.

    Args:
      source: rows, with random access or in order only.
      transform: row and its index -> pair or fault.
      collate: pairs -> batch.
      batch_size: pairs per batch; the last one may hold fewer.
      max_dropped_share: largest share of rows, 0 to 1, that may be dropped.
      shuffle_seed: draws a new order each epoch, the same in every run; None keeps the data's order.
      shuffle_buffer_size: window, in rows, in which a source that can only be read in order is shuffled; its shards are
        shuffled too. With random access, all rows are shuffled.
      num_epochs: passes over the data in one iteration; a batch may hold the end of one epoch and the start of the
        next.

    Attributes:
      tally: counts of good and dropped rows of the latest pass, up to its latest batch.

    Example:
      >>> transform = PreferenceTransform(tokenizer)
      >>> loader = PreferenceLoader(
      ...     open_source("train.jsonl"), transform, lambda pairs: {"pairs": pairs}, batch_size=4, max_dropped_share=0.0
      ... )
      >>> batches = loader.iterate()
      >>> first, position = next(batches), batches.position()
      >>> [pair.index for pair in next(loader.iterate(position))["pairs"]]
      [4, 5]
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
        """One pass, from its beginning or resumed from a position that `BatchIterator.position` returned.

        Raises:
          ValueError: the position belongs to other data or another order.
        """
        order = self._order()
        if position is not None and position["order"] != order:
            changed = [f"{name}={position['order'].get(name)}, now {value}" for name, value in order.items()
                       if position["order"].get(name) != value]  # fmt: skip
            raise ValueError(
                "the position belongs to another order of the rows, so the data cannot continue from it: it has "
                f"{'; '.join(changed)}. Give the same data and shuffling as then, or start from the beginning."
            )
        tally = FaultTally(self._max_dropped_share)
        state = None if position is None else position["state"]
        self._latest = BatchIterator(self._pipeline(tally), tally, order, state)
        return self._latest

    def __len__(self) -> int:
        """Rows of the data, good and bad.

        Raises:
          TypeError: the data can only be read in order, so the number is unknown.
        """
        return len(self._source)

    @property
    def is_stream(self) -> bool:
        """True if the rows can only be read in order."""
        return not self._source.has_random_access

    @property
    def tally(self) -> FaultTally:
        """Counts of good and dropped rows of the latest pass, up to its latest batch."""
        return FaultTally(self._max_dropped_share) if self._latest is None else self._latest.tally

    def counters(self) -> dict[str, float]:
        """Number of rows that the latest pass dropped so far, by the name of its metric."""
        return {"dropped_rows": float(sum(self.tally.dropped.values()))}

    def identity(self) -> dict[str, Any]:
        """Number of rows and a digest of the data; see `data_identity`."""
        return data_identity(self._source, self._transform)

    def first_pairs(self, count: int) -> list[PreferencePair]:
        """The pairs of the first `count` good rows, in the data's own order; this counts nothing."""
        results = (self._transform(row, index) for index, row in readable_rows(self._source))
        return list(itertools.islice((pair for pair in results if not isinstance(pair, RowFault)), count))

    def _order(self) -> dict[str, Any]:
        """All that the order of the rows depends on."""
        by_number, shuffled = not self.is_stream, self._shuffle_seed is not None
        return {
            "rows": len(self._source) if by_number else None,
            "shards": None if by_number else self._source.num_shards(),
            "shuffle_seed": self._shuffle_seed,
            "shuffle_buffer_size": self._shuffle_buffer_size if shuffled and not by_number else None,
        }

    def _pipeline(self, tally: FaultTally) -> grain.IterDataset:
        pairs = _GoodPairs(self._outcomes(), tally)
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

    def _outcome(self, epoch: int, index: int) -> _Outcome:
        """The outcome of a row that is fetched by its index."""
        try:
            result = self._transform(self._source[index], index)
        except UnreadableRow as error:
            result = unreadable(error, index)
        except Exception as error:
            error.add_note(f"while reading {self._source.locate(index)}")
            raise
        return _Outcome(result, epoch, self._source.locate(index) if isinstance(result, RowFault) else "")

    def _streamed_outcome(self, row: StreamedRow) -> _Outcome:
        """The outcome of a row that was read in order."""
        if isinstance(row.content, UnreadableRow):
            result: PreferencePair | RowFault = unreadable(row.content, row.number)
        else:
            result = self._transform(row.content, row.number)
        is_bad = isinstance(result, RowFault)
        return _Outcome(result, row.epoch, self._source.locate_in(row.shard, row.row) if is_bad else "")
