"""Find where each record of a text file starts, in one pass over its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Int64

# Small enough to stay in a processor's cache between reading and searching.
CHUNK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WHITE_SPACE = np.zeros(256, bool)
WHITE_SPACE[list(b" \t\r\n\v\f")] = True


def record_starts(path: Path, *, quoted: bool = False) -> Int64[np.ndarray, " records_plus_1"]:
    """Offset of the first byte of each non-blank record, and the size of the file.

    The file is read in chunks, so memory is constant except for some bytes per record.

    Args:
      path: a local file with one record per line.
      quoted: True keeps a newline after an odd number of double quotes in the record, as in CSV.
    """
    pieces: list[np.ndarray] = []
    blanks: list[np.ndarray] = []
    position, inside_quotes, record_ended = 0, False, True
    with path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            position = len(BYTE_ORDER_MARK)
        file.seek(position)
        while chunk := file.read(CHUNK_BYTES):
            values = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(values == ord("\n"))
            if quoted:
                quotes = np.flatnonzero(values == ord('"'))
                ends = ends[(np.searchsorted(quotes, ends) + inside_quotes) % 2 == 0]
                inside_quotes ^= bool(len(quotes) % 2)
            begins = np.concatenate([[0], ends + 1]) if record_ended else ends + 1
            record_ended = bool(len(begins) > 0 and begins[-1] == len(values))
            begins = begins[: len(begins) - record_ended]
            pieces.append(begins + position)
            blanks.append(WHITE_SPACE[values[begins]])
            position += len(values)
        starts = np.concatenate([*pieces, [position]]).astype(np.int64)
        return starts[_holds_text(starts, np.concatenate([*blanks, [False]]).astype(bool), file)]


def _holds_text(
    starts: Int64[np.ndarray, " records_plus_1"], may_be_blank: Bool[np.ndarray, " records_plus_1"], file: BinaryIO
) -> Bool[np.ndarray, " records_plus_1"]:
    """False for records of white space only; only records that may be blank are read again."""
    holds_text = np.ones(len(starts), bool)
    for record in np.flatnonzero(may_be_blank):
        file.seek(starts[record])
        holds_text[record] = bool(file.read(int(starts[record + 1] - starts[record])).strip())
    return holds_text
