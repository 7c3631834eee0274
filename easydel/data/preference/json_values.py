"""Read nested values of a row: from JSON text, without Arrow's nulls, and not nested too deep."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any, TypeGuard

import numpy as np

from easydel.data.faults import BadRow, describe

# Far more than any tool's schema needs, and far less than Python's recursion limit.
MAX_DEPTH = 100
# Python refuses to write integers of more than 4 300 digits.
MAX_BITS = 10_000

_JSON_MARK = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def read_json_text(text: str, field: str, where: str) -> Any:
    """The value of a JSON text; its nulls are kept, since the user wrote them.

    Args:
      text: the JSON text.
      field: the column that a fault names.
      where: the value's name in a message.

    Raises:
      BadRow: "bad value" where the text is not JSON, or nested more than `MAX_DEPTH` deep.
    """
    if _depth(text) > MAX_DEPTH:
        raise _too_deep(field, where)
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(field, "bad value", f"{where} is text but not JSON ({error}): {describe(text)}.") from error


def without_nulls(value: Any, field: str, where: str, depth: int = MAX_DEPTH) -> Any:
    """A copy without the keys whose value is None, in plain lists and dicts.

    Arrow gives every mapping of a column the same keys and fills in None; a null inside a list comes from the user and
    stays.

    Raises:
      BadRow: "bad value" where it is nested more than `depth` deep, has a key that is no text, or an integer that
        nothing could write.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise BadRow(field, "bad value", f"{where} holds {describe(value)}. Remove it.")
    if not isinstance(value, Mapping | list | tuple):
        return value
    if depth == 0:
        raise _too_deep(field, where)
    if not isinstance(value, Mapping):
        return [without_nulls(item, field, where, depth - 1) for item in value]
    for key in value:
        if not isinstance(key, str):
            raise BadRow(field, "bad value", f"{where} has the key {describe(key)}, expected text. Rename it.")
    return {key: without_nulls(item, field, where, depth - 1) for key, item in value.items() if item is not None}


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """True if a value is a sequence but not text: a list, a tuple or a numpy array."""
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def is_given(value: object) -> bool:
    """True where a value has content: not None, pandas' NaN, blank text, or a list or mapping that is empty."""
    if value is None or (isinstance(value, float) and isnan(value)):
        return False
    if isinstance(value, str):
        return value.strip() not in ("", "null", "[]", "{}")
    if isinstance(value, np.ndarray):
        return value.size > 0
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    return not isinstance(value, list | tuple) or any(item is not None for item in value)


def _depth(text: str) -> int:
    """The depth of nested brackets outside JSON strings; at most `MAX_DEPTH` brackets are only counted."""
    opened = text.count("[") + text.count("{")
    if opened <= MAX_DEPTH:
        return opened
    depth = deepest = 0
    for mark in _JSON_MARK.finditer(text):
        if mark[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark[0] in "]}":
            depth -= 1
    return deepest


def _too_deep(field: str, where: str) -> BadRow:
    return BadRow(field, "bad value", f"{where} is nested more than {MAX_DEPTH} deep. Make it flatter.")
