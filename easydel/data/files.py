"""Rows from files: JSON lines, JSON, CSV, Parquet and Arrow, each with random access where the format allows it."""

from __future__ import annotations

import csv
import json
import tempfile
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from .byte_index import record_starts
from .faults import DataError, describe
from .sources import Row, ShardedDataSource


class TableFile(ABC):
    """One file of rows; what it needs to know about the file is found out when it is first asked for."""

    def __init__(self, path: Path, label: str):
        self.path = path
        self.label = label

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> Row:
        """One row, counted from 0."""

    @abstractmethod
    def rows_from(self, number: int) -> Iterator[Row]:
        """The rows from a number on, in order."""


class FileSource(ShardedDataSource):
    """Files of one format, a shard each, in the order given.

    Args:
      paths: a path or a list of paths: local, or a URL that fsspec reads. Remote files are copied once, to a
        temporary folder, when they are first read.

    Raises:
      DataError: while reading, for a file that is not what its name says; names the file and the row or line.
    """

    file_type: ClassVar[type[TableFile]]

    def __init__(self, paths: str | PathLike | Sequence[str | PathLike]):
        given = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
        self._names = tuple(fspath(path) for path in given)
        if repeated := [name for name, count in Counter(self._names).items() if count > 1]:
            raise ValueError(f"the file {repeated[0]} is given twice; give each file once.")
        short = [name.rstrip("/").rsplit("/", 1)[-1] for name in self._names]
        self._labels = dict(zip(self._names, short if len(set(short)) == len(short) else self._names, strict=True))
        self._files: dict[str, TableFile] = {}

    @property
    def shard_names(self) -> Sequence[str]:
        return self._names

    def open_shard(self, name: str) -> Iterator[Row]:
        return self._file(name).rows_from(0)

    def open_shard_at_row(self, name: str, row: int) -> Iterator[Row]:
        return self._file(name).rows_from(row)

    def shard_length(self, name: str) -> int | None:
        return len(self._file(name))

    def read_row(self, name: str, row: int) -> Row:
        return self._file(name).row(row)

    @property
    def has_random_access(self) -> bool:
        return True

    def label(self, name: str) -> str:
        return self._labels[name]

    def _file(self, name: str) -> TableFile:
        if name not in self._files:
            if name not in self._labels:
                raise KeyError(f"there is no shard {name!r}; the shards are {', '.join(self._names)}.")
            self._files[name] = self.file_type(local_copy(name), self._labels[name])
        return self._files[name]


def local_copy(name: str) -> Path:
    """A local path with the content of `name`, a path or an fsspec URL."""
    if "://" not in name:
        return Path(name)
    if name.startswith(("file://", "local://")):
        return Path(fsspec.core.url_to_fs(name)[1])
    return Path(fsspec.open_local(f"filecache::{name}"))


class _RecordFile(TableFile):
    """A text file with one record after another, found again by byte offset."""

    quoted: ClassVar[bool] = False

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each record starts, and where the last one ends."""
        return record_starts(self.path, quoted=self.quoted)

    def record(self, number: int) -> bytes:
        """The bytes of one record."""
        # Opened anew: several threads read at once, and a seek belongs to one of them.
        with self.path.open("rb") as file:
            file.seek(self.starts[number])
            return file.read(int(self.starts[number + 1] - self.starts[number]))

    def records_from(self, number: int) -> Iterator[tuple[int, bytes]]:
        """The numbers and bytes of the records from a number on."""
        with self.path.open("rb") as file:
            file.seek(self.starts[number] if number < len(self.starts) else self.starts[-1])
            for record in range(number, len(self.starts) - 1):
                yield record, file.read(int(self.starts[record + 1] - self.starts[record]))

    def line_number(self, number: int) -> int:
        """The line on which a record starts, counted from 1, as an editor counts."""
        lines, left = 1, int(self.starts[number])
        with self.path.open("rb") as file:
            while left > 0 and (chunk := file.read(min(left, 1 << 24))):
                lines += chunk.count(b"\n")
                left -= len(chunk)
        return lines


class JsonLinesFile(_RecordFile):
    """One JSON object a line."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> Row:
        return self._parse(number, self.record(number))

    def rows_from(self, number: int) -> Iterator[Row]:
        return (self._parse(*numbered) for numbered in self.records_from(number))

    def _parse(self, number: int, record: bytes) -> Row:
        try:
            row = json.loads(record)
        except ValueError as error:
            raise DataError(
                f"{self.label}, line {self.line_number(number)} (row {number}) is not JSON: {error}. "
                "Expected one JSON object a line; mend or remove the line."
            ) from error
        return _as_object(row, f"{self.label}, line {self.line_number(number)}" if not isinstance(row, dict) else "")


class JsonFile(TableFile):
    """One JSON list of objects, held in memory."""

    @cached_property
    def _rows(self) -> list[Any]:
        try:
            rows = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise DataError(f"{self.label} is not JSON: {error}. Expected one list of objects.") from error
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Row:
        return _as_object(self._rows[number], f"{self.label}, row {number}")

    def rows_from(self, number: int) -> Iterator[Row]:
        return (self.row(row) for row in range(number, len(self)))


def _as_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where} is {describe(row)}, expected a JSON object with a column for each key.")
    return row


class CsvFile(_RecordFile):
    """A header and one record a row, comma-separated (tab-separated in .tsv files); every value is text."""

    quoted = True

    @cached_property
    def _header(self) -> list[str]:
        header = self._fields(self.record(0)) if len(self.starts) > 1 else []
        if len(set(header)) < len(header):
            raise DataError(f"{self.label} names a column twice in its first line: {', '.join(header)}.")
        return header

    def __len__(self) -> int:
        return max(0, len(self.starts) - 2)

    def row(self, number: int) -> Row:
        return self._parse(number + 1, self.record(number + 1))

    def rows_from(self, number: int) -> Iterator[Row]:
        return (self._parse(*numbered) for numbered in self.records_from(number + 1))

    def _fields(self, record: bytes) -> list[str]:
        delimiter = "\t" if self.path.suffix == ".tsv" else ","
        return next(csv.reader([record.decode().rstrip("\r\n")], delimiter=delimiter), [])

    def _parse(self, number: int, record: bytes) -> Row:
        try:
            fields = self._fields(record)
        except (ValueError, csv.Error) as error:
            raise DataError(f"{self.label}, line {self.line_number(number)} cannot be read: {error}.") from error
        if len(fields) != len(self._header):
            raise DataError(
                f"{self.label}, line {self.line_number(number)} has {len(fields)} fields, expected the "
                f"{len(self._header)} of the header. A field with quotes in it must be quoted, and its quotes doubled."
            )
        return dict(zip(self._header, fields, strict=True))


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
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.label} is neither an Arrow IPC file nor a stream: {error}.") from error

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
            for batch in parquet.iter_batches(batch_size=1024):
                writer.write_batch(batch)
        return ArrowFile(copy, self.label)

    def _open(self) -> pa.parquet.ParquetFile:
        try:
            return pa.parquet.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.label} is not a Parquet file: {error}.") from error

    def __len__(self) -> int:
        return self._metadata.num_rows

    def row(self, number: int) -> Row:
        return self._arrow().row(number)

    def rows_from(self, number: int) -> Iterator[Row]:
        parquet, group = self._open(), 0
        while group < parquet.num_row_groups and number >= parquet.metadata.row_group(group).num_rows:
            number -= parquet.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, parquet.num_row_groups))
        rows = (row for batch in parquet.iter_batches(1024, row_groups=groups) for row in batch.to_pylist())
        return islice(rows, number, None)


class JsonLinesSource(FileSource):
    """Files with one JSON object a line; found by byte offset, after one pass over the file."""

    file_type = JsonLinesFile


class JsonSource(FileSource):
    """Files that are one JSON list of objects; held in memory, so JSON lines suit large data better."""

    file_type = JsonFile


class CsvSource(FileSource):
    """CSV files with a header; every value is text. Found by byte offset, after one pass over the file."""

    file_type = CsvFile


class ParquetSource(FileSource):
    """Parquet files; the first access by number makes a temporary Arrow copy of the file."""

    file_type = ParquetFile


class ArrowSource(FileSource):
    """Arrow IPC files and streams, mapped into memory."""

    file_type = ArrowFile


class CompressedJsonLinesSource(ShardedDataSource):
    """Compressed files with one JSON object a line; they can only be read in order."""

    def __init__(self, paths: str | PathLike | Sequence[str | PathLike]):
        given = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
        self._names = tuple(fspath(path) for path in given)

    @property
    def shard_names(self) -> Sequence[str]:
        return self._names

    def open_shard(self, name: str) -> Iterator[Row]:
        with fsspec.open(name, "rb", compression="infer") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{self.label(name)}, line {number}"
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise DataError(f"{where} is not JSON: {error}. Mend or remove the line.") from error
                    yield _as_object(row, where)

    def label(self, name: str) -> str:
        return name.rsplit("/", 1)[-1]
