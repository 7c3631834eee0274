"""Read files as sources of rows, one class for each format; remote files are copied once."""

from __future__ import annotations

import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import starmap
from os import PathLike, fspath
from typing import ClassVar

import fsspec

from easydel.data.faults import DataError
from easydel.data.sources.arrow_files import ArrowFile, ParquetFile
from easydel.data.sources.base import Row, ShardedDataSource
from easydel.data.sources.local_file import TableFile, regular_file
from easydel.data.sources.remote import file_name, local_copy, masked
from easydel.data.sources.text_files import LONGEST_RECORD, CsvFile, JsonFile, JsonLinesFile, parse_json_line


class FileSource(ShardedDataSource):
    """Files of one format, a shard each, in the order given.

    Args:
      paths: a path or a list of paths: local, or a URL of http, https or another protocol that fsspec reads. Remote
        files are copied once, to a temporary folder, when they are first read.

    Raises:
      ValueError: a file is given twice.
      DataError: while reading, for a file that is not of this format; names the file and the row or line.
    """

    file_type: ClassVar[type[TableFile]]

    def __init__(self, paths: str | PathLike | Sequence[str | PathLike]):
        given = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
        self._names = tuple(fspath(path) for path in given)
        if repeated := [name for name, count in Counter(self._names).items() if count > 1]:
            raise ValueError(f"the file {masked(repeated[0])} is given twice; give each file once.")
        short, whole = list(map(file_name, self._names)), list(map(masked, self._names))
        self._labels = dict(zip(self._names, short if len(set(short)) == len(short) else whole, strict=True))
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
                raise KeyError(
                    f"there is no shard {masked(name)}; the shards are {', '.join(map(masked, self._names))}."
                )
            self._files[name] = self.file_type(local_copy(name), self._labels[name])
        return self._files[name]


class JsonLinesSource(FileSource):
    """Files with one JSON object per line, found by byte offset after one pass over the file."""

    file_type = JsonLinesFile


class JsonSource(FileSource):
    """Files that are one JSON list of objects; each is held in memory, so JSON lines suit large data better."""

    file_type = JsonFile


class CsvSource(FileSource):
    """CSV files with a header; every value is text. Rows are found by byte offset after one pass over the file."""

    file_type = CsvFile


class ParquetSource(FileSource):
    """Parquet files; the first access by number to a row group makes a temporary Arrow copy of it."""

    file_type = ParquetFile


class ArrowSource(FileSource):
    """Arrow IPC files and streams, mapped into memory."""

    file_type = ArrowFile


class CompressedJsonLinesSource(ShardedDataSource):
    """Compressed files with one JSON object per line; they can only be read in order."""

    def __init__(self, paths: str | PathLike | Sequence[str | PathLike]):
        given = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
        self._names = tuple(fspath(path) for path in given)

    @property
    def shard_names(self) -> Sequence[str]:
        return self._names

    def open_shard(self, name: str) -> Iterator[Row]:
        # Not a generator: that would end at a line that cannot be read.
        return starmap(partial(self._parse, name), self._lines(name))

    def _lines(self, name: str) -> Iterator[tuple[int, bytes]]:
        """The lines with text in them, and their numbers, counted from 1."""
        try:
            path, compression = local_copy(name), fsspec.utils.infer_compression(file_name(name))
            regular_file(path, self.label(name))
            with fsspec.open(str(path), "rb", compression=compression) as file:
                # A few kilobytes can unpack to gigabytes without a line end.
                for number, line in enumerate(iter(lambda: file.readline(LONGEST_RECORD + 1), b""), start=1):
                    if len(line) > LONGEST_RECORD:
                        raise DataError(f"{self.label(name)}, line {number} has more than {LONGEST_RECORD} bytes.")
                    if line.strip():
                        yield number, line
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise DataError(
                f"{self.label(name)} is damaged or was cut short, so it cannot be unpacked to its end: {error}. "
                "Fetch or compress the file again."
            ) from error

    def _parse(self, name: str, number: int, line: bytes) -> Row:
        return parse_json_line(line, lambda: f"{self.label(name)}, line {number}")

    def label(self, name: str) -> str:
        return file_name(name)
