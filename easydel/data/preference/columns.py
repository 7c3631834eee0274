"""Read the columns of a row, and refuse those that would be ignored though they carry meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

import numpy as np

from easydel.data.faults import BadRow, describe, in_quotes
from easydel.data.preference.json_values import is_given, read_json_text, without_nulls
from easydel.data.preference.messages import MEDIA
from easydel.data.preference.tools import read_tools

PAIR_FIELDS = ("prompt", "chosen", "rejected")
ID_FIELDS = tuple(f"{field}_ids" for field in PAIR_FIELDS)
NUMBER_COLUMNS = ("weight", "ref_chosen_logps", "ref_rejected_logps")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = (*SYSTEM_COLUMNS, "history", "documents")
READ_COLUMNS = frozenset({*PAIR_FIELDS, *TEMPLATE_COLUMNS, *NUMBER_COLUMNS, *CONTEXT_COLUMNS, *MEDIA})

LARGEST_FLOAT32, SMALLEST_FLOAT32 = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)

# Names that other data sets use for these columns; only ever suggested, never read.
NAMES_OF_PAIR_FIELDS = {
    "prompt": ("question", "instruction", "query", "input", "user", "context", "messages", "conversations"),
    "chosen": ("preferred", "winner", "win", "better", "accepted", "response_chosen", "chosen_response", "positive"),
    "rejected": ("dispreferred", "loser", "lose", "worse", "response_rejected", "rejected_response", "negative"),
}
NAMES_OF_CONTEXT = {
    "functions": "tools",
    "chat_history": "history",
    "conversation_history": "history",
    "sys_prompt": "system",
    "system_instruction": "system",
    "system_msg": "system",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a row, read and checked.

    Attributes:
      row: all columns of the row.
      values: values of `PAIR_FIELDS`; the prompt is None where the row leaves it implicit.
      numbers: values of `NUMBER_COLUMNS`, and the margin where it is read, by the names of `PreferencePair`.
      tools: the tools that the chat template gets.
      own_tools: the tools in the row itself.
      chat_template_kwargs: other variables that the chat template gets.
    """

    row: Mapping[str, Any]
    values: dict[str, Any]
    numbers: dict[str, Any]
    tools: list[Any] | None
    own_tools: list[Any]
    chat_template_kwargs: Mapping[str, Any]


def read_columns(
    row: Mapping[str, Any],
    tools: list[Any] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    *,
    reads_margin: bool = False,
) -> Columns:
    """Read and check the columns of a row.

    Args:
      row: column -> value.
      tools: for rows without tools of their own.
      chat_template_kwargs: variables of the chat template; a row's own win key by key.
      reads_margin: True requires the column "margin". Otherwise it is ignored, since data sets have columns of that
        name that mean something else.

    Raises:
      BadRow: "wrong type", "bad value", "missing value", "missing column" (structural), or "unused column" for media
        and for a column of context under another name.
    """
    if not isinstance(row, Mapping):
        raise BadRow("row", "wrong type", f"the row is {describe(row)}, expected a mapping from column to value.")
    given = _json_column(row, "tools", list)
    own_tools = None if given is None else read_tools(given)
    own_kwargs = _json_column(row, "chat_template_kwargs", Mapping) or {}
    numbers = _read_numbers(row) | ({"margin": _read_margin(row)} if reads_margin else {})
    _refuse_media(row)
    _refuse_other_names(row)
    return Columns(
        row=row,
        values=_read_pair_fields(row),
        numbers=numbers,
        tools=(tools if own_tools is None else own_tools) or None,
        own_tools=own_tools or [],
        chat_template_kwargs={**(chat_template_kwargs or {}), **own_kwargs},
    )


def unread_columns(rows: Iterable[Mapping[str, Any]], *, reads_margin: bool = False) -> list[str]:
    """The names of the columns that nothing reads, such as scores, ids and sources, each once."""
    read = READ_COLUMNS | ({"margin"} if reads_margin else set())
    names: dict[str, None] = {}
    for row in rows:
        if isinstance(row, Mapping):
            ids = ID_FIELDS if all(row.get(name) is not None for name in ID_FIELDS) else ()
            names |= dict.fromkeys(str(name) for name in row if name not in read and name not in ids)
    return list(names)


def _read_pair_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of prompt, chosen and rejected; the prompt is None where the row leaves it implicit.

    A row with `prompt_ids`, `chosen_ids` and `rejected_ids` gives those.

    Raises:
      BadRow: "missing column" (structural) or "missing value".
    """
    ids = {field: row.get(name) for field, name in zip(PAIR_FIELDS, ID_FIELDS, strict=True)}
    if all(value is not None for value in ids.values()):
        return {
            field: _ids_from_text(value, field) if isinstance(value, str) else value for field, value in ids.items()
        }
    for field in ("chosen", "rejected"):
        if row.get(field) is None and field in row:
            raise BadRow(
                field, "missing value", f'"{field}" is None, expected text, chat messages or token ids. Fill it in.'
            )
        if row.get(field) is None:
            raise _missing_column(field, row)
    # A row whose prompt has another name must not get an implicit prompt of a few words that are equal by chance.
    if "prompt" not in row and _suggestion("prompt", row) is not None:
        raise _missing_column("prompt", row)
    return {field: row.get(field) for field in PAIR_FIELDS}


def _ids_from_text(text: str, field: str) -> list[Any]:
    ids = read_json_text(text, field, f'"{field}_ids"')
    if not isinstance(ids, list):
        raise BadRow(field, "wrong type", f'"{field}_ids" is {describe(text)}, expected a list of token ids.')
    return ids


def missing_prompt(row: Mapping[str, Any], units: str) -> NoReturn:
    """Raise the fault of a row without a prompt whose completions share no first words or messages (`units`).

    Raises:
      BadRow: "no shared prompt" where the row's prompt is None, "missing column" where there is no such column.
    """
    shared = f'"chosen" and "rejected" share no first {units} to take as one'
    if "prompt" in row:
        raise BadRow("prompt", "no shared prompt", f'"prompt" is None, and {shared}. Fill in "prompt".')
    raise _missing_column("prompt", row, f", and {shared}")


def _missing_column(field: str, row: Mapping[str, Any], also: str = "") -> BadRow:
    columns = in_quotes(row) or "none"
    yours = _suggestion(field, row) or "yours"
    return BadRow(
        field,
        "missing column",
        f'there is no column "{field}"{also}. The row has {columns}; expected "prompt", "chosen" and "rejected". '
        f'If it goes by another name, rename it: source.rename_fields({{{in_quotes([yours])}: "{field}"}}).',
        structural=True,
    )


def _suggestion(field: str, row: Mapping[str, Any]) -> str | None:
    by_lower = {str(name).lower(): str(name) for name in row if name not in PAIR_FIELDS}
    known = next((name for name in NAMES_OF_PAIR_FIELDS[field] if name in by_lower), None)
    close = known or next(iter(get_close_matches(field, by_lower, n=1, cutoff=0.75)), None)
    return by_lower[close] if close is not None else None


def _refuse_media(row: Mapping[str, Any]) -> None:
    """Raise `BadRow` for a row with images, sound or video: only text is trained on."""
    for column in MEDIA:
        if column in row and is_given(row[column]):
            raise BadRow(
                column,
                "unused column",
                f'"{column}" is {describe(row[column])}, but only text can be trained on. Remove these rows, or '
                "empty the column where the text stands without it.",
            )


def _refuse_other_names(row: Mapping[str, Any]) -> None:
    """Raise `BadRow` for a column of context under another name, or in other letter case: it would be ignored."""
    for column in row:
        if not isinstance(column, str) or column in CONTEXT_COLUMNS:
            continue
        lower = column.lower()
        name = lower if lower in CONTEXT_COLUMNS else NAMES_OF_CONTEXT.get(lower)
        if name is not None and is_given(row[column]):
            raise BadRow(
                column,
                "unused column",
                f'"{column}" is {describe(row[column])}, but that is read from "{name}". Rename it: '
                f'source.rename_fields({{{in_quotes([column])}: "{name}"}}), or remove it.',
            )


def _read_numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `NUMBER_COLUMNS`, each a number that float32 can hold."""
    weight = _number(row, "weight")
    if weight is not None and weight < 0:
        raise BadRow("weight", "bad value", f'"weight" is {weight}, expected a number from 0 up.')
    if weight and weight < SMALLEST_FLOAT32:
        raise BadRow(
            "weight", "bad value", f'"weight" is {weight}, which is 0 in float32. Give 0, or scale the weights.'
        )
    chosen, rejected = _log_prob(row, "ref_chosen_logps"), _log_prob(row, "ref_rejected_logps")
    if (chosen is None) != (rejected is None):
        absent = "ref_chosen_logps" if chosen is None else "ref_rejected_logps"
        raise BadRow(
            absent, "missing value", f'the row gives only one reference log-prob; fill in "{absent}" or remove both.'
        )
    return {"weight": 1.0 if weight is None else weight, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def _read_margin(row: Mapping[str, Any]) -> float:
    """The column "margin", in nats.

    Raises:
      BadRow: "missing column" (structural), "missing value", "wrong type" or "bad value".
    """
    margin = _number(row, "margin")
    if margin is None and "margin" not in row:
        raise BadRow(
            "margin",
            "missing column",
            'there is no column "margin", which the objective reads. Add it, in nats: '
            'source.map(lambda row: row | {"margin": 0.0}).',
            structural=True,
        )
    if margin is None:
        raise BadRow("margin", "missing value", '"margin" is empty, expected a number of nats. Fill it in.')
    return margin


def _json_column(row: Mapping[str, Any], field: str, expected: type) -> Any:
    """A column's list or mapping, read from JSON where it is text; None where the row has none."""
    value = row.get(field)
    if isinstance(value, str):
        value = read_json_text(value, field, f'"{field}"') if value.strip() else None
    elif isinstance(value, float) and not is_given(value):
        return None
    else:
        value = without_nulls(value, field, f'"{field}"')
    if value is not None and not isinstance(value, expected):
        kind = "a list" if expected is list else "a mapping"
        raise BadRow(field, "wrong type", f'"{field}" is {describe(value)}, expected {kind} or {kind} as JSON text.')
    return value


def _log_prob(row: Mapping[str, Any], field: str) -> float | None:
    value = _number(row, field)
    if value is not None and value > 0:
        raise BadRow(
            field, "bad value", f'"{field}" is {value}, but a log-prob is never above 0. Give the sum in nats.'
        )
    return value


def _number(row: Mapping[str, Any], field: str) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, str):  # CSV knows only text
        if not value.strip():
            return None
        try:
            value = float(value)
        except ValueError:
            raise BadRow(field, "wrong type", f'"{field}" is {describe(value)}, expected a number.') from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(field, "wrong type", f'"{field}" is {describe(value)}, expected a number.')
    # Compare before converting: float() fails for an integer of 400 digits.
    if not -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise BadRow(field, "bad value", f'"{field}" is {describe(value)}, expected a number that float32 can hold.')
    return float(value)
