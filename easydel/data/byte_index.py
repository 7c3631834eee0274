"""Where each record of a text file starts, found in one pass over its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64, UInt8

CHUNK_BYTES = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WHITE_SPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)


def record_starts(path: Path, *, quoted: bool = False) -> Int64[np.ndarray, " records_plus_1"]:
    """The byte at which each non-blank record starts, and the end of the file.

    Reads 16 MiB at a time, so memory is flat but for 8 bytes a record.

    Args:
      path: a local file with one record a line.
      quoted: a newline between an odd and an even double quote belongs to the record, as in CSV.
    """
    newlines = []
    position, inside_quotes = 0, False
    with path.open("rb") as file:
        start = len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            values = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(values == ord("\n"))
            if quoted:
                quotes = np.flatnonzero(values == ord('"'))
                ends = ends[(np.searchsorted(quotes, ends) + inside_quotes) % 2 == 0]
                inside_quotes ^= bool(len(quotes) % 2)
            newlines.append(ends + position)
            position += len(chunk)
        starts = np.concatenate([[start], *(ends + 1 for ends in newlines), [position]]).astype(np.int64)
        return _without_blank_records(np.unique(starts), file)


def _without_blank_records(starts: Int64[np.ndarray, " all"], file: BinaryIO) -> Int64[np.ndarray, " filled"]:
    """Drops the starts of records that hold only white space; few begin with it, so few are looked at."""
    first_bytes = _bytes_at(starts[:-1], file)
    keep = np.ones(len(starts), bool)
    for record in np.flatnonzero(np.isin(first_bytes, WHITE_SPACE)):
        file.seek(starts[record])
        keep[record] = bool(file.read(int(starts[record + 1] - starts[record])).strip())
    return starts[keep]


def _bytes_at(positions: Int64[np.ndarray, " n"], file: BinaryIO) -> UInt8[np.ndarray, " n"]:
    return np.memmap(file, np.uint8, mode="r")[positions] if len(positions) else np.empty(0, np.uint8)
