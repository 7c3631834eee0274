"""Define the file of rows that every format implements, and recognise a file's true format by its first bytes."""

from __future__ import annotations

import codecs
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from easydel.data.faults import DataError
from easydel.data.sources.base import Row

HEAD_BYTES = 512
# The longest first: the mark of UTF-16 begins that of UTF-32.
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32 text"),
    (codecs.BOM_UTF32_BE, "UTF-32 text"),
    (codecs.BOM_UTF16_LE, "UTF-16 text"),
    (codecs.BOM_UTF16_BE, "UTF-16 text"),
)
FORMATS = (
    (b"\x1f\x8b", "gzip-compressed"),
    (b"BZh", "bzip2-compressed"),
    (b"\xfd7zXZ\x00", "xz-compressed"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed"),
    (b"\x04\x22\x4d\x18", "lz4-compressed"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89PNG", "a PNG image"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data it stands for"),
)
PAGES = (b"<!doctype html", b"<html", b"<?xml")


class TableFile(ABC):
    """One file of rows; the file is opened only when rows or their number are asked for."""

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


def regular_file(path: Path, label: str) -> int:
    """The size of a regular file in bytes.

    Raises:
      DataError: it is a folder, a pipe or a device; the last two could block or never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise DataError(f"{label} is {found}, expected a file.")
    return status.st_size


def kind_of_bytes(head: bytes) -> str | None:
    """The kind of a file that begins with these bytes, such as "gzip-compressed"; None for an unknown kind."""
    for mark, kind in (*ENCODINGS, *FORMATS):
        if head.startswith(mark):
            return kind
    if head.lstrip()[:20].lower().startswith(PAGES):
        return "a web page"
    if head[:2] == b"\x80\x04" or head[:2] == b"\x80\x05":
        return "a Python pickle, which is never opened"
    return _unmarked_encoding(head)


def _unmarked_encoding(head: bytes) -> str | None:
    """Recognise UTF-16 and UTF-32 without a byte order mark by the positions of the zero bytes of ASCII characters."""
    quarter = len(head) // 4
    zeros = [head[start : 4 * quarter : 4].count(0) for start in range(4)]
    often = [quarter >= 2 and count > 0.7 * quarter for count in zeros]
    if often in ([False, True, True, True], [True, True, True, False]):
        return "UTF-32 text"
    if often in ([False, True, False, True], [True, False, True, False]):
        return "UTF-16 text"
    return None


def kind_found(path: Path) -> str | None:
    """The kind of a file by its first bytes; None for an unknown kind."""
    with path.open("rb") as file:
        return kind_of_bytes(file.read(HEAD_BYTES))
