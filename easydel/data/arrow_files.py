"""Binary formats: Arrow, mapped into memory, and Parquet, by way of Arrow."""

from __future__ import annotations

import tempfile
import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from .faults import DataError
from .sources import Row
from .table_file import TableFile


class ArrowFile(TableFile):
    """An Arrow IPC file or stream, mapped into memory."""

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        try:
            mapped = pa.memory_map(str(self.path))
            try:
                reader = pa.ipc.open_file(mapped)
                return [reader.get_batch(number) for number in range(reader.num_record_batches)]
            except pa.ArrowInvalid:
                mapped.seek(0)
                return list(pa.ipc.open_stream(mapped))
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.label} is neither an Arrow IPC file nor a stream, or it is damaged or was cut short: {error}. "
                "Fetch or write the file again."
            ) from error

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, number: int) -> Row:
        batch = bisect_right(self._ends, number)
        start = self._ends[batch - 1] if batch else 0
        return self._batches[batch].slice(number - start, 1).to_pylist()[0]

    def rows_from(self, number: int) -> Iterator[Row]:
        return (self.row(row) for row in range(number, len(self)))


class ParquetFile(TableFile):
    """A Parquet file. In order it is read as it is; the first row asked for by number makes an Arrow copy of it.

    A Parquet page must be unpacked whole for one of its rows, so shuffled reading would unpack it once a row.
    """

    @cached_property
    def _metadata(self) -> pa.parquet.FileMetaData:
        return self._open().metadata

    def __init__(self, path: Path, label: str):
        super().__init__(path, label)
        self._lock = threading.Lock()
        self._copy: ArrowFile | None = None

    def _arrow(self) -> ArrowFile:
        with self._lock:
            if self._copy is None:
                self._copy = self._copy_to_arrow()
            return self._copy

    def _copy_to_arrow(self) -> ArrowFile:
        # Kept as an attribute, so that the folder goes when this object goes.
        self._folder = tempfile.TemporaryDirectory(prefix="easydel-parquet-")
        copy = Path(self._folder.name) / "rows.arrow"
        parquet = self._open()
        with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_file(sink, parquet.schema_arrow) as writer:
            for batch in self._read(parquet):
                writer.write_batch(batch)
        return ArrowFile(copy, self.label)

    def _open(self) -> pa.parquet.ParquetFile:
        try:
            return pa.parquet.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.label} is not a Parquet file: {error}.") from error

    def _read(self, parquet: pa.parquet.ParquetFile, first_group: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows from a row group on, some at a time."""
        try:
            yield from parquet.iter_batches(1024, row_groups=range(first_group, parquet.num_row_groups))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.label} is damaged: {error}. Fetch or write the file again.") from error

    def __len__(self) -> int:
        return self._metadata.num_rows

    def row(self, number: int) -> Row:
        return self._arrow().row(number)

    def rows_from(self, number: int) -> Iterator[Row]:
        parquet, group = self._open(), 0
        while group < parquet.num_row_groups and number >= parquet.metadata.row_group(group).num_rows:
            number -= parquet.metadata.row_group(group).num_rows
            group += 1
        rows = (row for batch in self._read(parquet, group) for row in batch.to_pylist())
        return islice(rows, number, None)
