"""Read the binary formats: Arrow, mapped into memory, and Parquet, converted to Arrow.

A damaged file could make pyarrow read outside its buffers, so every batch is checked before a value is read from it.
"""

from __future__ import annotations

import tempfile
import threading
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from easydel.data.faults import DataError, UnreadableRow
from easydel.data.sources.arrow_check import FILE_MAGIC, check_batch, check_schema, holds_maps, unpacked_size
from easydel.data.sources.base import Row
from easydel.data.sources.local_file import TableFile, kind_found, regular_file

# Number of rows that become Python values at once, and of rows of a Parquet file that are unpacked at once.
ROWS_AT_ONCE = 64
BATCH_ROWS = 256
# A file that unpacks to more than both, bytes and a multiple of its size, is a decompression bomb.
BOMB_BYTES = 1 << 28
BOMB_RATIO = 200


class _BatchedFile(TableFile):
    """A file whose rows become Python values a few at a time."""

    @cached_property
    def _size(self) -> int:
        return regular_file(self.path, self.label)

    @property
    @abstractmethod
    def _schema(self) -> pa.Schema: ...

    @cached_property
    def _maps(self) -> Literal["strict"] | None:
        """The option that reads maps as dicts; None where there are no maps, since pyarrow is much slower with it."""
        return "strict" if holds_maps(self._schema) else None

    def _refuse_bomb(self, unpacked: int) -> None:
        if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * self._size:
            raise DataError(
                f"{self.label} has {self._size} bytes and unpacks to {unpacked} or more, which is no data set but a "
                "decompression bomb, or damage. Write the file again."
            )

    def _check(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A batch, checked."""
        check_batch(batch, self.label)
        return batch

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Turn pyarrow's errors on a damaged file into a `DataError`; `what` is the expected format."""
        try:
            yield
        except (FileNotFoundError, PermissionError, DataError):
            raise
        except (pa.ArrowException, OSError, MemoryError, ValueError, TypeError) as error:
            found = kind_found(self.path)
            raise DataError(
                f"{self.label} is {found}, not {what}; name it by what it is, or write it again."
                if found is not None and found not in what
                else f"{self.label} is not {what}, or it is damaged or was cut short: {first_line(error)}. "
                "Fetch or write the file again."
            ) from error

    def _rows_of(self, batch: pa.RecordBatch, first: int) -> Iterator[Row | UnreadableRow]:
        """The rows of a checked batch; `first` is the number of its first row in the file."""
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            few = batch.slice(start, ROWS_AT_ONCE)
            try:
                yield from few.to_pylist(maps_as_pydicts=self._maps)
            except Exception:  # One row is at fault, of any kind: see `_row_of`.
                for row in range(few.num_rows):
                    try:
                        yield self._row_of(few, row, first + start + row)
                    except UnreadableRow as error:
                        yield error

    def _row_of(self, batch: pa.RecordBatch, row: int, number: int) -> Row:
        """A row of a checked batch; `number` is its number in the file."""
        one = batch.slice(row, 1)
        try:
            return one.to_pylist(maps_as_pydicts=self._maps)[0]
        except Exception:
            # Time zones, years beyond 9999, map keys that come twice: pyarrow raises all kinds of errors.
            raise UnreadableRow(f"{self.label}, row {number}: {_what_is_wrong(one)}. Mend or remove the row.") from None


class ArrowFile(_BatchedFile):
    """An Arrow IPC file or stream, mapped into memory; a compressed one is unpacked to a temporary copy first."""

    def __init__(self, path: Path, label: str, first_row: int = 0):
        super().__init__(path, label)
        self._first_row = first_row  # where this is a copy of some rows: number of its first row in the original
        self._lock = threading.Lock()
        self._checked: dict[int, pa.RecordBatch] = {}

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        with self._reading("an Arrow file or an Arrow stream"):
            if not self._size:
                raise pa.ArrowInvalid("it is empty")
            schema, batches = _open_arrow(self.path)
            check_schema(schema, self.label)
            if (unpacked := unpacked_size(self.path)) is not None:
                self._refuse_bomb(unpacked)
                copy = Path(self._folder.name) / "unpacked.arrow"
                _write_arrow(copy, schema, map(self._check, batches))
                _, batches = _open_arrow(copy)
                self._checked = dict(enumerate(batches))
                return list(self._checked.values())
            return list(batches)

    @property
    def _schema(self) -> pa.Schema:
        return self._batches[0].schema

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="easydel-arrow-")  # deleted with this object

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(batch.num_rows for batch in self._batches))

    def _checked_batch(self, number: int) -> pa.RecordBatch:
        if number not in self._checked:
            with self._lock:
                if number not in self._checked:
                    self._checked[number] = self._check(self._batches[number])
        return self._checked[number]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, number: int) -> Row:
        batch = bisect_right(self._ends, number)
        start = self._ends[batch - 1] if batch else 0
        return self._row_of(self._checked_batch(batch), number - start, self._first_row + number)

    def rows_from(self, number: int) -> Iterator[Row]:
        return map(given, self._found_from(number))

    def _found_from(self, number: int) -> Iterator[Row | UnreadableRow]:
        for batch in range(bisect_right(self._ends, number), len(self._ends)):
            start = self._ends[batch - 1] if batch else 0
            skipped = max(0, number - start)
            yield from self._rows_of(self._checked_batch(batch).slice(skipped), self._first_row + start + skipped)


class ParquetFile(_BatchedFile):
    """A Parquet file, read in order from the file itself, and by number from Arrow copies of its row groups.

    A Parquet page must be unpacked whole for any of its rows, so shuffled reading would unpack it once per row. A row
    group is copied when its first row is asked for, so the first rows of a shuffled file cost only their own groups.

    Attributes:
      copies: number of a row group -> its copy; the copies are deleted with this object.
    """

    def __init__(self, path: Path, label: str):
        super().__init__(path, label)
        self._lock = threading.Lock()
        self.copies: dict[int, ArrowFile] = {}

    @cached_property
    def _ends(self) -> list[int]:
        with self._reading("a Parquet file"):
            metadata = self._open().metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            ends = list(accumulate(group.num_rows for group in groups))
            if min((group.num_rows for group in groups), default=0) < 0 or (ends or [0])[-1] != metadata.num_rows:
                raise pa.ArrowInvalid("its row groups do not hold as many rows as it says")
            for group in groups:
                self._refuse_bomb(group.total_byte_size)
        return ends

    @cached_property
    def _schema(self) -> pa.Schema:
        return self._open().schema_arrow

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="easydel-parquet-")  # deleted with this object

    def _copy(self, group: int) -> ArrowFile:
        if group not in self.copies:
            # Copy one group at a time: pyarrow unpacks its columns on all cores.
            with self._lock:
                if group not in self.copies:
                    self.copies[group] = self._copy_to_arrow(group)
        return self.copies[group]

    def _copy_to_arrow(self, group: int) -> ArrowFile:
        copy = Path(self._folder.name) / f"{group}.arrow"
        _write_arrow(copy, self._schema, self._read([group]))
        return ArrowFile(copy, self.label, first_row=self._start(group))

    def _open(self) -> pa.parquet.ParquetFile:
        if not self._size:
            raise pa.ArrowInvalid("it is empty")
        parquet = pa.parquet.ParquetFile(self.path)
        check_schema(parquet.schema_arrow, self.label)
        return parquet

    def _read(self, groups: Sequence[int]) -> Iterator[pa.RecordBatch]:
        """The rows of some row groups, `BATCH_ROWS` at a time."""
        expected = sum(self._ends[group] - self._start(group) for group in groups)
        read = unpacked = 0
        with self._reading("a Parquet file"):
            for batch in self._open().iter_batches(BATCH_ROWS, row_groups=list(groups)):
                read += batch.num_rows
                unpacked += batch.nbytes
                self._refuse_bomb(unpacked)
                yield batch
            if read != expected:
                raise pa.ArrowInvalid(f"it holds {read} rows where it says {expected}")

    def _start(self, group: int) -> int:
        return self._ends[group - 1] if group else 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, number: int) -> Row:
        group = bisect_right(self._ends, number)
        return self._copy(group).row(number - self._start(group))

    def rows_from(self, number: int) -> Iterator[Row]:
        return map(given, self._found_from(number))

    def _found_from(self, number: int) -> Iterator[Row | UnreadableRow]:
        group = bisect_right(self._ends, number)
        first = self._start(group)
        for batch in self._read(range(group, len(self._ends))):
            skipped = max(0, number - first)
            yield from self._rows_of(self._check(batch).slice(skipped), first + skipped)
            first += batch.num_rows


def given(found: Row | UnreadableRow) -> Row:
    """The row that was found, or raise why it cannot be read: `map` continues after an error, generators end."""
    if isinstance(found, UnreadableRow):
        raise found
    return found


def first_line(error: BaseException) -> str:
    """The first line of another library's message, which may have many, shortened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


def _what_is_wrong(row: pa.RecordBatch) -> str:
    """Name the column of a row that cannot become a Python value, and the reason."""
    for field, column in zip(row.schema, row.columns):
        try:
            column.to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            return f'column "{field.name}" holds text that is not UTF-8 ({error.reason} at byte {error.start})'
        except Exception as error:
            kind = "nested type" if field.type.num_fields else f"type {field.type}"
            return f'column "{field.name}" of {kind} cannot be read: {first_line(error)}'
    return "it cannot be read"


def _open_arrow(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and the unchecked batches of an Arrow file or stream."""
    options = pa.ipc.IpcReadOptions(ensure_alignment=pa.ipc.Alignment.DataTypeSpecific)
    mapped = pa.memory_map(str(path))
    if mapped.read(len(FILE_MAGIC)) == FILE_MAGIC:
        file = pa.ipc.open_file(mapped, options=options)
        return file.schema, map(file.get_batch, range(file.num_record_batches))
    mapped.seek(0)
    stream = pa.ipc.open_stream(mapped, options=options)
    return stream.schema, iter(stream)


def _write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    # A stream, since a file could not change the dictionary of a column between batches.
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
