"""Mix the rows of several sources in given proportions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain, count

import numpy as np

from easydel.data.sources.base import Row, ShardedDataSource, skip_rows

# The pattern of sources repeats after at most this many rows; finer proportions are rounded.
LONGEST_PERIOD = 10_000


class MixtureSource(ShardedDataSource):
    """Rows of several sources in fixed proportions, spread evenly; one shard.

    Each source is read from its first row on, and no row is repeated. The mixture ends where a row is due from a source
    that has none left, so that the proportions hold to the end; `rows_used` gives the rows of each source. It has
    random access where all of its sources have it.

    Args:
      sources: the sources to mix.
      weights: one number above 0 for each; only their ratios matter, to about 1 in 10 000.

    Raises:
      ValueError: weights and sources do not match, or a weight is not a number above 0.

    Example:
      >>> helpful, harmless = open_source("helpful.jsonl"), open_source("harmless.jsonl")
      >>> len(helpful), len(harmless), MixtureSource([helpful, harmless], [0.5, 0.5]).rows_used
      (4, 2, (3, 2))
    """

    def __init__(self, sources: Sequence[ShardedDataSource], weights: Sequence[float]):
        self._sources = tuple(sources)
        if not self._sources or len(self._sources) != len(weights):
            raise ValueError(
                f"a mixture of {len(self._sources)} sources has {len(weights)} weights; give one for each source, and "
                "at least one source."
            )
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"{weight} is the weight of a source in a mixture, expected a number above 0.")
        self._shares = _whole_shares(weights)
        self._period = sum(self._shares)
        # For each row of one period: its source, and its number among that source's rows.
        positions = [[(2 * row + 1) / (2 * share) for row in range(share)] for share in self._shares]
        order = np.argsort(np.concatenate(positions), kind="stable")
        self._owner = np.repeat(np.arange(len(self._shares)), self._shares)[order]
        self._rank = np.concatenate([np.arange(share) for share in self._shares])[order]

    @property
    def shard_names(self) -> Sequence[str]:
        return ("mixture",)

    def open_shard(self, name: str) -> Iterator[Row]:
        return self.open_shard_at_row(name, 0)

    def open_shard_at_row(self, name: str, row: int) -> Iterator[Row]:
        return _Mixing(self, row)

    def shard_length(self, name: str) -> int | None:
        return sum(self.rows_used) if self.has_random_access else None

    def read_row(self, name: str, row: int) -> Row:
        source, inner = self.origin(row)
        return self._sources[source][inner]

    @property
    def has_random_access(self) -> bool:
        return all(source.has_random_access for source in self._sources)

    @property
    def rows_used(self) -> tuple[int, ...]:
        """Number of rows that the mixture takes from each source.

        Raises:
          TypeError: a source can only be read in order, so the number is unknown.
        """
        ends = []
        for source, share in enumerate(self._shares):
            periods, rank = divmod(len(self._sources[source]), share)
            due = np.flatnonzero((self._owner == source) & (self._rank == rank))[0]
            ends.append(periods * self._period + int(due))
        return self._taken(min(ends))

    def label(self, name: str) -> str:
        return "mixture"

    def locate_in(self, name: str, row: int) -> str:
        source, inner = self.origin(row)
        return self._sources[source].locate(inner)

    def origin(self, row: int) -> tuple[int, int]:
        """The index of the source of row `row` of the mixture, and the row's number in that source."""
        periods, position = divmod(row, self._period)
        source = int(self._owner[position])
        return source, periods * self._shares[source] + int(self._rank[position])

    def _taken(self, rows: int) -> tuple[int, ...]:
        """Number of rows of each source among the first `rows` of the mixture."""
        periods, rest = divmod(rows, self._period)
        begun = np.bincount(self._owner[:rest], minlength=len(self._shares))
        return tuple(periods * share + int(more) for share, more in zip(self._shares, begun))


class _Mixing(Iterator[Row]):
    """The rows of a mixture from a number on; iteration continues after a row that cannot be read."""

    def __init__(self, mixture: MixtureSource, row: int):
        self._mixture = mixture
        self._numbers = count(row)
        self._rows = [_rows_from(source, taken) for source, taken in zip(mixture._sources, mixture._taken(row))]

    def __next__(self) -> Row:
        source, _ = self._mixture.origin(next(self._numbers))
        try:
            return next(self._rows[source])
        except StopIteration:
            self._rows = [iter(()) for _ in self._rows]
            raise


def _rows_from(source: ShardedDataSource, row: int) -> Iterator[Row]:
    """The rows of a whole source from a number on."""
    if source.has_random_access:
        return chain.from_iterable(_opened_from(source, row))
    return skip_rows(iter(source), row)


def _opened_from(source: ShardedDataSource, row: int) -> Iterator[Iterator[Row]]:
    for name in source.shard_names:
        length = source.shard_length(name)
        assert length is not None  # with random access it is known
        if row < length:
            yield source.open_shard_at_row(name, row)
        row = max(0, row - length)


def _whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Integers in the ratio of the weights: exact where their sum is at most `LONGEST_PERIOD`, else rounded."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    whole = [share // math.gcd(*whole) for share in whole]
    if sum(whole) > LONGEST_PERIOD:
        whole = [max(1, round(LONGEST_PERIOD * weight / sum(exact))) for weight in exact]
    return tuple(whole)
