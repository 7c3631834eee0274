"""Rows out of the columnar batches that TFDS and ``tf.data`` deliver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from easydel.data.faults import DataError


def rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A dict of columns as a list of rows; byte strings become text, arrays lists.

    A column may be a NumPy array, a list, or an object with ``numpy()`` (an eager TensorFlow tensor), and may hold a
    dict of columns in turn (chat messages as TFDS stores them: a sequence of features).

    Raises:
      DataError: the columns differ in length.
    """
    plain = {name: _column(column) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in plain.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the columns of a batch differ in length: {lengths}.")
    return [dict(zip(plain, values)) for values in zip(*plain.values())]


def _column(value: Any) -> Any:
    """A column of a batch, an entry a row."""
    return [_record(row) for row in rows_of_columns(value)] if isinstance(value, Mapping) else _plain(value)


def _record(fields: Mapping[str, Any]) -> Any:
    """A dict of lists is a list of records, such as messages; any other dict is one record."""
    return rows_of_columns(fields) if fields and all(isinstance(field, list) for field in fields.values()) else fields


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _record({name: _plain(field) for name, field in value.items()})
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if hasattr(value, "to_list"):  # a ragged tensor
        return _plain(value.to_list())
    array = value.numpy() if hasattr(value, "numpy") else value
    return [_plain(item) for item in (array.tolist() if isinstance(array, np.ndarray) else array)]
