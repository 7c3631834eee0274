"""Read the text formats: JSON lines and CSV, whose records are found by byte offset, and JSON lists."""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.csv
from jaxtyping import Int64

from easydel.data.faults import DataError, UnreadableRow, describe, in_quotes
from easydel.data.sources.base import Row
from easydel.data.sources.byte_index import BYTE_ORDER_MARK, CHUNK_BYTES, record_starts
from easydel.data.sources.local_file import TableFile, kind_found, kind_of_bytes, regular_file

# A row of text has a few kilobytes; a longer record is a file without line ends, or a quote that is never closed.
LONGEST_RECORD = 1 << 26
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class _RecordFile(TableFile):
    """A text file of records, each found by its byte offset."""

    quoted: ClassVar[bool] = False

    @cached_property
    def starts(self) -> Int64[np.ndarray, " records_plus_1"]:
        """Byte offset of each record, and the end of the last one."""
        refuse_other_kinds(self.path, self.label)
        starts = record_starts(self.path, quoted=self.quoted)
        if self.quoted and len(starts) > 1:
            self._refuse_open_quote(int(starts[-2]))
        return starts

    def _refuse_open_quote(self, last: int) -> None:
        """Refuse a file whose last record, which starts at byte `last`, has a quote that nothing closes."""
        # All other records end where their quotes are closed.
        if self._count(b'"', last) % 2:
            lines = self._count(b"\n", last)
            raise DataError(
                f"{self.label}, line {self._line_at(last)}: a double quote is opened and never closed, so this row "
                f"takes in {lines} lines, to the end of the file. Close the quote, or double it where it belongs to "
                "the text."
            )

    def _count(self, sign: bytes, start: int, end: int | None = None) -> int:
        """Count a byte string between two offsets; `end` None is the end of the file."""
        found, left = 0, self.path.stat().st_size - start if end is None else end - start
        with self.path.open("rb") as file:
            file.seek(start)
            while left > 0 and (piece := file.read(min(left, CHUNK_BYTES))):
                found += piece.count(sign)
                left -= len(piece)
        return found

    def _line_at(self, byte: int) -> int:
        return 1 + self._count(b"\n", 0, byte)

    def record(self, number: int) -> bytes | None:
        """The bytes of one record; None where it is too long to be one."""
        # Open the file anew: several threads read at once, and a seek moves an open file for all of them.
        with self.path.open("rb") as file:
            return self._read(file, number)

    def records_from(self, number: int) -> Iterator[tuple[int, bytes | None]]:
        """Numbers and bytes of the records from number `number` on."""
        records = range(number, len(self.starts) - 1)  # refuses a pipe, before it is opened
        with self.path.open("rb") as file:
            for record in records:
                yield record, self._read(file, record)

    def _read(self, file: BinaryIO, number: int) -> bytes | None:
        size = int(self.starts[number + 1] - self.starts[number])
        if size > LONGEST_RECORD:
            return None
        file.seek(self.starts[number])
        return file.read(size)

    def line_number(self, number: int) -> int:
        """The line on which a record starts, counted from 1, as an editor counts."""
        return self._line_at(int(self.starts[number]))


class JsonLinesFile(_RecordFile):
    """One JSON object per line."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> Row:
        return self._parse(number, self.record(number))

    def rows_from(self, number: int) -> Iterator[Row]:
        # Not a generator, which would end at a record that cannot be read.
        return starmap(self._parse, self.records_from(number))

    def _parse(self, number: int, record: bytes | None) -> Row:
        return parse_json_line(record, lambda: f"{self.label}, line {self.line_number(number)} (row {number})")


class JsonFile(TableFile):
    """One JSON list of objects, held in memory."""

    @cached_property
    def _rows(self) -> list[Any]:
        refuse_other_kinds(self.path, self.label)
        try:
            rows = parse_json(self.path.read_bytes())
        except ValueError as error:
            raise DataError(f"{self.label} is not JSON: {error}. Expected one list of objects.") from error
        if isinstance(rows, dict):
            inside = next((key for key, value in rows.items() if isinstance(value, list) and value), None)
            fix = f'; the rows seem to be under "{inside[:40]}": write that list alone' if inside is not None else ""
            raise DataError(f"{self.label} holds {describe(rows)}, expected one list of objects{fix}.")
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


def parse_json_line(record: bytes | None, where: Callable[[], str]) -> Row:
    """Parse the row on a line; `where` names the line for an error.

    Raises:
      UnreadableRow: the line is too long, no JSON, or no object.
    """
    if record is None:
        raise UnreadableRow(f"{where()} has more than {LONGEST_RECORD} bytes; mend or remove the line.")
    try:
        row = parse_json(record)
    except ValueError as error:
        raise UnreadableRow(
            f"{where()} is not JSON: {error}. Expected one JSON object a line; mend or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise not_an_object(row, where())
    return row


def parse_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
      ValueError: the text is no such JSON, nests too deeply, or gives a key of an object twice.
    """
    try:
        return json.loads(text.removeprefix(BYTE_ORDER_MARK).decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"{kind_of_bytes(text) or 'not UTF-8 text'} ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of key-value pairs; a repeated key is an error, since only one of its values could be kept."""
    held = dict(pairs)
    if len(held) < len(pairs):
        repeated = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {reprlib.repr(repeated)} comes twice in one object")
    return held


def refuse_other_kinds(path: Path, label: str) -> None:
    """Refuse a path that is no regular file, or a file that begins like another format than UTF-8 text.

    Raises:
      DataError: names the kind of file that was found.
    """
    regular_file(path, label)
    found = kind_found(path)
    if found is not None:
        fix = "save it as UTF-8 text" if found in ("UTF-16 text", "UTF-32 text") else "name it by what it is"
        raise DataError(f"{label} is {found}; {fix}.")


def not_an_object(row: Any, where: str) -> UnreadableRow:
    """The error of a row that is some other JSON than an object."""
    return UnreadableRow(f"{where} is {describe(row)}, expected a JSON object with a column for each key.")


class CsvFile(_RecordFile):
    """A header and one record per row, comma-separated (tab-separated in .tsv files); every value is text."""

    quoted = True

    @cached_property
    def _header(self) -> list[str]:
        record = self.record(0) if len(self.starts) > 1 else b""
        if record is None:
            raise DataError(f"{self.label}: the first line, which names the columns, is longer than any such line.")
        if b"\r" in record.rstrip(b"\r\n"):
            raise DataError(
                f"{self.label}, line 1: a lone carriage return is in the line that names the columns; where it ends "
                "every line, as on old Macs, save the file with line feeds."
            )
        try:
            header = self._fields(record)
        except (ValueError, csv.Error) as error:
            raise DataError(
                f"{self.label}: the first line, which names the columns, is not UTF-8 text: {error}. "
                "Save the file as UTF-8."
                if isinstance(error, UnicodeDecodeError)
                else f"{self.label}, line 1, which names the columns, cannot be read: {error}."
            ) from error
        if len(set(header)) < len(header):
            raise DataError(f"{self.label} names a column twice in its first line: {in_quotes(header)}.")
        if len(header) == 1 and (other := next((sign for sign in DELIMITERS if sign in header[0]), None)):
            raise DataError(
                f"{self.label} names the one column {reprlib.repr(header[0])}; its columns seem to be separated by "
                f"{DELIMITERS[other]}, expected {DELIMITERS[self._delimiter]}. Save it so, or rename it."
            )
        return header

    @property
    def _delimiter(self) -> str:
        return "\t" if self.label.lower().endswith(".tsv") else ","  # the label, since the path may be that of a copy

    def __len__(self) -> int:
        return len(self.starts) - 2 if self._header else 0

    def row(self, number: int) -> Row:
        return self._parse(number + 1, self.record(number + 1))

    def rows_from(self, number: int) -> Iterator[Row]:
        return starmap(self._parse, self.records_from(number + 1)) if self._header else iter(())

    def _fields(self, record: bytes) -> list[str]:
        # The csv module refuses long fields; its limit belongs to the whole process, so it is left as it is.
        if len(record) > csv.field_size_limit():
            return _long_fields(record, self._delimiter)
        return next(csv.reader([record.decode().rstrip("\r\n")], delimiter=self._delimiter), [])

    def _parse(self, number: int, record: bytes | None) -> Row:
        header = self._header
        try:
            if record is None:
                raise ValueError(f"it has more than {LONGEST_RECORD} bytes")
            fields = self._fields(record)
        except (ValueError, csv.Error) as error:
            cause = "it holds a lone carriage return outside quotes" if "new-line character" in str(error) else error
            raise UnreadableRow(
                f"{self.label}, line {self.line_number(number)} cannot be read: {cause}{_taken_in(record)}. "
                "Mend or remove the line."
            ) from error
        if len(fields) != len(header):
            raise UnreadableRow(
                f"{self.label}, line {self.line_number(number)} has {len(fields)} fields, expected the "
                f"{len(header)} of the header{_taken_in(record)}. A field with quotes in it must be quoted, and "
                "its quotes doubled."
            )
        return dict(zip(header, fields, strict=True))


def _taken_in(record: bytes | None) -> str:
    """The end of a message on a row that an unclosed quote may have made longer than a line; "" for one line."""
    lines = (record or b"").rstrip(b"\r\n").count(b"\n") + 1
    return f"; a double quote makes it take in {lines} lines" if lines > 1 else ""


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
