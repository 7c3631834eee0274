"""One file of rows, by number and in order: what every format must give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from .sources import Row


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
