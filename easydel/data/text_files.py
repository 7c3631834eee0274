"""Text formats: JSON lines and CSV, found by byte offset, and JSON lists."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import starmap
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.csv
from jaxtyping import Int64

from .byte_index import record_starts
from .faults import DataError, UnreadableRow, describe
from .sources import Row
from .table_file import TableFile


class _RecordFile(TableFile):
    """A text file with one record after another, found again by byte offset."""

    quoted: ClassVar[bool] = False

    @cached_property
    def starts(self) -> Int64[np.ndarray, " records_plus_1"]:
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
        # Not a generator: that would end at a record that cannot be read.
        return starmap(self._parse, self.records_from(number))

    def _parse(self, number: int, record: bytes) -> Row:
        return parse_json_line(record, lambda: f"{self.label}, line {self.line_number(number)} (row {number})")


class JsonFile(TableFile):
    """One JSON list of objects, held in memory."""

    @cached_property
    def _rows(self) -> list[Any]:
        try:
            rows = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise DataError(f"{self.label} is not JSON: {error}. Expected one list of objects.") from error
        if not isinstance(rows, list):
            raise DataError(f"{self.label} holds {describe(rows)}, expected one list of objects.")
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Row:
        row = self._rows[number]
        if not isinstance(row, dict):
            raise not_an_object(row, f"{self.label}, row {number}")
        return row

    def rows_from(self, number: int) -> Iterator[Row]:
        return map(self.row, range(number, len(self)))


def parse_json_line(record: bytes, where: Callable[[], str]) -> Row:
    """The row on a line; `where` says which line it is, should it be bad."""
    try:
        row = json.loads(record)
    except ValueError as error:
        raise UnreadableRow(
            f"{where()} is not JSON: {error}. Expected one JSON object a line; mend or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise not_an_object(row, where())
    return row


def not_an_object(row: Any, where: str) -> UnreadableRow:
    """The error of a row that is some other JSON than an object."""
    return UnreadableRow(f"{where} is {describe(row)}, expected a JSON object with a column for each key.")


class CsvFile(_RecordFile):
    """A header and one record a row, comma-separated (tab-separated in .tsv files); every value is text."""

    quoted = True

    @cached_property
    def _header(self) -> list[str]:
        try:
            header = self._fields(self.record(0)) if len(self.starts) > 1 else []
        except ValueError as error:
            raise DataError(
                f"{self.label}: the first line, which names the columns, is not UTF-8 text: {error}. "
                "Save the file as UTF-8."
            ) from error
        if len(set(header)) < len(header):
            raise DataError(f"{self.label} names a column twice in its first line: {', '.join(header)}.")
        return header

    def __len__(self) -> int:
        return max(0, len(self.starts) - 2)

    def row(self, number: int) -> Row:
        return self._parse(number + 1, self.record(number + 1))

    def rows_from(self, number: int) -> Iterator[Row]:
        return starmap(self._parse, self.records_from(number + 1))

    def _fields(self, record: bytes) -> list[str]:
        delimiter = "\t" if self.label.endswith(".tsv") else ","  # the path may be a cache's
        # The csv module refuses long fields; its limit belongs to the whole process, so it is left as it is.
        if len(record) > csv.field_size_limit():
            return _long_fields(record, delimiter)
        return next(csv.reader([record.decode().rstrip("\r\n")], delimiter=delimiter), [])

    def _parse(self, number: int, record: bytes) -> Row:
        header = self._header
        try:
            fields = self._fields(record)
        except (ValueError, csv.Error) as error:
            raise UnreadableRow(
                f"{self.label}, line {self.line_number(number)} cannot be read: {error}. Mend or remove the line."
            ) from error
        if len(fields) != len(header):
            raise UnreadableRow(
                f"{self.label}, line {self.line_number(number)} has {len(fields)} fields, expected the "
                f"{len(header)} of the header. A field with quotes in it must be quoted, and its quotes doubled."
            )
        return dict(zip(header, fields, strict=True))


def _long_fields(record: bytes, delimiter: str) -> list[str]:
    """The fields of a record of any length."""
    columns = record.count(delimiter.encode()) + 1  # at most
    table = pyarrow.csv.read_csv(
        pa.BufferReader(record),
        pyarrow.csv.ReadOptions(autogenerate_column_names=True, block_size=len(record) + 1, use_threads=False),
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types={f"f{column}": pa.large_string() for column in range(columns)}),
    )
    return [column[0].as_py() for column in table.columns]
