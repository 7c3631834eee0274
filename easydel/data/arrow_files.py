"""Binary formats: Arrow, mapped into memory, and Parquet, by way of Arrow."""

from __future__ import annotations

import tempfile
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
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
    """A Parquet file. In order it is read as it is; a row asked for by number makes an Arrow copy of its row group.

    A Parquet page must be unpacked whole for one of its rows, so shuffled reading would unpack it once a row. Copied
    group by group, the first rows of a shuffled file cost the groups they lie in, however many there are in all.
    """

    def __init__(self, path: Path, label: str):
        super().__init__(path, label)
        self._lock = threading.Lock()
        self._copies: dict[int, ArrowFile] = {}

    @cached_property
    def _metadata(self) -> pa.parquet.FileMetaData:
        return self._open().metadata

    @cached_property
    def _ends(self) -> list[int]:
        groups = range(self._metadata.num_row_groups)
        return list(accumulate(self._metadata.row_group(group).num_rows for group in groups))

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="easydel-parquet-")  # goes when this object goes

    def _copy(self, group: int) -> ArrowFile:
        if group not in self._copies:
            # One group at a time: pyarrow unpacks its columns on all cores.
            with self._lock:
                if group not in self._copies:
                    self._copies[group] = self._copy_to_arrow(group)
        return self._copies[group]

    def _copy_to_arrow(self, group: int) -> ArrowFile:
        copy = Path(self._folder.name) / f"{group}.arrow"
        parquet = self._open()
        with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_file(sink, parquet.schema_arrow) as writer:
            for batch in self._read(parquet, [group]):
                writer.write_batch(batch)
        return ArrowFile(copy, self.label)

    def _open(self) -> pa.parquet.ParquetFile:
        try:
            return pa.parquet.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.label} is not a Parquet file: {error}.") from error

    def _read(self, parquet: pa.parquet.ParquetFile, groups: Sequence[int]) -> Iterator[pa.RecordBatch]:
        """The rows of some row groups, some at a time."""
        try:
            yield from parquet.iter_batches(1024, row_groups=groups)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.label} is damaged: {error}. Fetch or write the file again.") from error

    def __len__(self) -> int:
        return self._metadata.num_rows

    def row(self, number: int) -> Row:
        group = bisect_right(self._ends, number)
        return self._copy(group).row(number - (self._ends[group - 1] if group else 0))

    def rows_from(self, number: int) -> Iterator[Row]:
        parquet, group = self._open(), bisect_right(self._ends, number)
        groups = range(group, len(self._ends))
        rows = (row for batch in self._read(parquet, groups) for row in batch.to_pylist())
        return islice(rows, number - (self._ends[group - 1] if group else 0), None)
