"""Define a source of rows, in named shards that are read lazily, and derive views and chains of sources."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, TypeAlias

from easydel.data.faults import DataError, UnreadableRow

Row: TypeAlias = dict[str, Any]


class ShardedDataSource(ABC):
    """Rows in an order, in one or more named shards.

    A subclass defines `shard_names` and `open_shard`; a shard may be opened any number of times, and gives the same
    rows each time. Where rows can be fetched by number, it also defines `shard_length`, `read_row` and
    `has_random_access`; then `len(source)` and `source[i]` work, and training can shuffle all rows. A row that cannot
    be read raises `UnreadableRow` from an iterator that continues after it (a generator would end); the row is dropped
    and counted. Any other error stops the run.

    Example:
      >>> source = open_source("train.jsonl").select_fields(["chosen", "rejected"]).rename_fields({"rejected": "other"})
      >>> len(source), list(source[0]), source.shard_names
      (6, ['chosen', 'other'], ('train.jsonl',))
    """

    @property
    @abstractmethod
    def shard_names(self) -> Sequence[str]:
        """The names of the shards, unique and in the order of the data."""

    @abstractmethod
    def open_shard(self, name: str) -> Iterator[Row]:
        """The rows of a shard, in order."""

    def open_shard_at_row(self, name: str, row: int) -> Iterator[Row]:
        """The rows of a shard from number `row` on, counted from 0."""
        return skip_rows(iter(self.open_shard(name)), row)

    def shard_length(self, name: str) -> int | None:
        """Number of rows of a shard; None where it is unknown before the shard is read to the end."""
        return None

    def read_row(self, name: str, row: int) -> Row:
        """One row of a shard, by its number from 0, without reading those before it.

        Raises:
          TypeError: the source has no random access.
        """
        raise TypeError(f"{type(self).__name__} can only be read in order; iterate over it instead.")

    @property
    def has_random_access(self) -> bool:
        """Whether `len(source)` and `source[i]` work."""
        return False

    def label(self, name: str) -> str:
        """A shard's name in error messages."""
        return name

    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shard_names)

    @cached_property
    def _ends(self) -> list[int]:
        """For each shard, the number of rows from the first shard up to its end."""
        lengths = []
        for name in self.shard_names:
            length = self.shard_length(name)
            if length is None:
                raise TypeError(f"the number of rows of {self.label(name)} is unknown until it is read to the end.")
            lengths.append(length)
        return list(accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        return self.read_row(*self._shard_and_row(index))

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(map(self.open_shard, self.shard_names))

    def locate(self, index: int) -> str:
        """Name the shard and the number of row `index` of the source, such as "train.jsonl, row 812"; both from 0."""
        if self.has_random_access:
            return self.locate_in(*self._shard_and_row(index))
        if self.num_shards() == 1:
            return self.locate_in(self.shard_names[0], index)
        return f"row {index}"

    def locate_in(self, name: str, row: int) -> str:
        """Name a shard and the number of a row in it, such as "train.jsonl, row 812"."""
        return f"{self.label(name)}, row {row}"

    def _shard_and_row(self, index: int) -> tuple[str, int]:
        """The shard that holds row `index` of the source, and the row's number in it."""
        index = operator.index(index)
        rows = len(self)
        if not -rows <= index < rows:
            raise IndexError(f"row {index} of a source with {rows} rows")
        index %= rows
        shard = bisect_right(self._ends, index)
        return self.shard_names[shard], index - (self._ends[shard - 1] if shard else 0)

    def map(self, function: Callable[[Row], Row]) -> ShardedDataSource:
        """A source of ``function(row)`` for every row, called when the row is read."""
        return _Mapped(self, function)

    def filter(self, predicate: Callable[[Row], bool]) -> ShardedDataSource:
        """A source of the rows for which `predicate` is true, in order only, since their number is unknown."""
        return _Streamed(self, lambda rows: filter(predicate, rows))  # continues after an unreadable row

    def transform(self, function: Callable[[Iterator[Row]], Iterable[Row]]) -> ShardedDataSource:
        """A source of the rows that `function` makes from those of each shard; rows can only be read in order."""
        return _Streamed(self, lambda rows: _in_one_go(function, rows))

    def rename_fields(self, names: Mapping[str, str]) -> ShardedDataSource:
        """A source whose rows have the fields in `names` renamed, old name -> new name; other fields stay."""
        names = dict(names)

        def rename(row: Row) -> Row:
            _require(row, names)
            kept = {field: value for field, value in row.items() if field not in names}
            renamed = {new: row[old] for old, new in names.items()}
            if taken := sorted(kept.keys() & renamed.keys()):
                raise UnreadableRow(f"rename_fields({names}) would overwrite {taken}, which the rows have already.")
            return kept | renamed

        return self.map(rename)

    def select_fields(self, fields: Iterable[str]) -> ShardedDataSource:
        """A source whose rows have only these fields."""
        fields = tuple(fields)

        def select(row: Row) -> Row:
            _require(row, fields)
            return {field: row[field] for field in fields}

        return self.map(select)


class CompositeSource(ShardedDataSource):
    """The rows of several sources, one after the other.

    Shards keep their names; where two sources have a shard of the same name, the later one gets "#2", "#3" and so on.

    Example:
      >>> both = CompositeSource([open_source("helpful.jsonl"), open_source("harmless.jsonl")])
      >>> len(both), both.locate(4)
      (6, 'harmless.jsonl, row 0')
    """

    def __init__(self, sources: Iterable[ShardedDataSource]):
        self._shards: dict[str, tuple[ShardedDataSource, str]] = {}
        for source in sources:
            for name in source.shard_names:
                unique, number = name, 1
                while unique in self._shards:
                    number += 1
                    unique = f"{name}#{number}"
                self._shards[unique] = (source, name)

    @property
    def shard_names(self) -> Sequence[str]:
        return tuple(self._shards)

    def open_shard(self, name: str) -> Iterator[Row]:
        source, inner = self._shards[name]
        return source.open_shard(inner)

    def open_shard_at_row(self, name: str, row: int) -> Iterator[Row]:
        source, inner = self._shards[name]
        return source.open_shard_at_row(inner, row)

    def shard_length(self, name: str) -> int | None:
        source, inner = self._shards[name]
        return source.shard_length(inner)

    def read_row(self, name: str, row: int) -> Row:
        source, inner = self._shards[name]
        return source.read_row(inner, row)

    @property
    def has_random_access(self) -> bool:
        return all(source.has_random_access for source, _ in self._shards.values())

    def label(self, name: str) -> str:
        source, inner = self._shards[name]
        return source.label(inner)

    def locate_in(self, name: str, row: int) -> str:
        source, inner = self._shards[name]
        return source.locate_in(inner, row)


class _View(ShardedDataSource):
    """A source seen through a function, under the same shard names."""

    def __init__(self, source: ShardedDataSource, function: Callable[..., Any]):
        self._source = source
        self._function = function

    @property
    def shard_names(self) -> Sequence[str]:
        return self._source.shard_names


class _Mapped(_View):
    """A function of each row of a source; keeps length and random access."""

    def open_shard(self, name: str) -> Iterator[Row]:
        return map(self._function, self._source.open_shard(name))

    def open_shard_at_row(self, name: str, row: int) -> Iterator[Row]:
        return map(self._function, self._source.open_shard_at_row(name, row))

    def shard_length(self, name: str) -> int | None:
        return self._source.shard_length(name)

    def read_row(self, name: str, row: int) -> Row:
        return self._function(self._source.read_row(name, row))

    @property
    def has_random_access(self) -> bool:
        return self._source.has_random_access

    def label(self, name: str) -> str:
        return self._source.label(name)

    def locate_in(self, name: str, row: int) -> str:
        return self._source.locate_in(name, row)


class _Streamed(_View):
    """The rows that a function makes from those of each shard; their number is unknown until they are read."""

    def open_shard(self, name: str) -> Iterator[Row]:
        return iter(self._function(self._source.open_shard(name)))

    def label(self, name: str) -> str:
        return f"{self._source.label(name)} (filtered or transformed)"


def skip_rows(rows: Iterator[Row], number: int) -> Iterator[Row]:
    """The rows after the first `number`; unreadable rows, at which `islice` would end, count too."""
    for _ in range(number):
        try:
            next(rows)
        except UnreadableRow:
            continue
        except StopIteration:
            break
    return rows


def _in_one_go(function: Callable[[Iterator[Row]], Iterable[Row]], rows: Iterator[Row]) -> Iterator[Row]:
    """The rows that a function makes; an unreadable row ends it, since it may be a generator, which cannot continue."""
    try:
        yield from function(rows)
    except UnreadableRow as error:
        raise DataError(str(error)) from error


def _require(row: Row, fields: Iterable[str]) -> None:
    for field in fields:
        if field not in row:
            raise UnreadableRow(f'a row has no field "{field}"; its fields are {", ".join(map(str, row)) or "none"}.')
