"""Read a `datasets.Dataset` or `datasets.IterableDataset` as a source of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from easydel.data.sources.base import Row, ShardedDataSource

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class HuggingFaceSource(ShardedDataSource):
    """A Hugging Face data set as one shard: a `Dataset` with random access, an `IterableDataset` in order only.

    Raises:
      TypeError: the argument is a dict of splits, or no data set.
    """

    def __init__(self, dataset: Dataset | IterableDataset):
        # Imported here: the import takes a second, which a process without such a data set need not spend.
        from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

        if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
            raise TypeError(
                f"the data set has the splits {', '.join(map(str, dataset))}; give one, such as data['train']."
            )
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise TypeError(f"expected a datasets.Dataset or IterableDataset, got {type(dataset).__name__}.")
        self._dataset = dataset
        self._mapped = isinstance(dataset, Dataset)

    @property
    def shard_names(self) -> Sequence[str]:
        return (str(self._dataset.split or "dataset"),)

    def open_shard(self, name: str) -> Iterator[Row]:
        return iter(self._dataset)

    def open_shard_at_row(self, name: str, row: int) -> Iterator[Row]:
        return iter(self._dataset.skip(row))

    def shard_length(self, name: str) -> int | None:
        return len(self._dataset) if self._mapped else None

    def read_row(self, name: str, row: int) -> Row:
        return self._dataset[row] if self._mapped else super().read_row(name, row)

    @property
    def has_random_access(self) -> bool:
        return self._mapped
