"""One file of rows, by number and in order: what every format must give."""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from easydel.data.faults import DataError
from easydel.data.sources.base import Row


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


def regular_file(path: Path, label: str) -> int:
    """The size of a file in bytes; a pipe or a device could block or never end, so anything else is refused."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise DataError(f"{label} is {found}, expected a file.")
    return status.st_size
