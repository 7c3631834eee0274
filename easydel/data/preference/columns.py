"""The columns of a row: which are there, what kind they hold, and the optional ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

import numpy as np

from easydel.data.faults import BadRow, describe, in_quotes
from easydel.data.preference.context import CONTEXT_COLUMNS
from easydel.data.preference.messages import MEDIA, is_list
from easydel.data.preference.nested import is_given, read_json_text, without_nulls

PAIR_FIELDS = ("prompt", "chosen", "rejected")
ID_FIELDS = tuple(f"{field}_ids" for field in PAIR_FIELDS)
OPTION_COLUMNS = ("tools", "chat_template_kwargs", "weight", "ref_chosen_logps", "ref_rejected_logps")
READ_COLUMNS = frozenset({*PAIR_FIELDS, *OPTION_COLUMNS, *CONTEXT_COLUMNS, *MEDIA})

LARGEST_FLOAT32, SMALLEST_FLOAT32 = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)

# Names other data sets use for these columns; only ever suggested, never read.
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "user", "context", "messages", "conversations"),
    "chosen": ("preferred", "winner", "win", "better", "accepted", "response_chosen", "chosen_response", "positive"),
    "rejected": ("dispreferred", "loser", "lose", "worse", "response_rejected", "rejected_response", "negative"),
}


@dataclass(frozen=True, slots=True)
class RowOptions:
    """The options that a row may bring beside its pair; `own_tools` are those of `tools` that the row itself brings."""

    tools: list[Any] | None
    own_tools: list[Any]
    chat_template_kwargs: Mapping[str, Any]
    weight: float
    ref_chosen_logps: float | None
    ref_rejected_logps: float | None


def unread_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of the columns that nothing reads, such as scores, ids and sources, each once."""
    names: dict[str, None] = {}
    for row in rows:
        if isinstance(row, Mapping):
            ids = ID_FIELDS if all(row.get(name) is not None for name in ID_FIELDS) else ()
            names |= dict.fromkeys(str(name) for name in row if name not in READ_COLUMNS and name not in ids)
    return list(names)


def read_pair_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of prompt, chosen and rejected; the prompt is None where the row leaves it implicit.

    Where a row has `prompt_ids`, `chosen_ids` and `rejected_ids`, those are taken.

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
    # A column that is the prompt by another name must not become an implicit prompt of a few chance words.
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
    known = next((name for name in OTHER_NAMES[field] if name in by_lower), None)
    close = known or next(iter(get_close_matches(field, by_lower, n=1, cutoff=0.75)), None)
    return by_lower[close] if close is not None else None


def is_token_ids(value: object) -> bool:
    """Whether a value is a non-empty list or array of integers."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and np.issubdtype(value.dtype, np.integer) and value.size > 0
    return is_list(value) and len(value) > 0 and isinstance(value[0], (int, np.integer))


def read_token_ids(value: object, field: str, vocabulary_size: int) -> np.ndarray:
    """Token ids as int32 [tokens].

    Raises:
      BadRow: "wrong type", "empty prompt" or "empty completion", or "bad value" for an id outside the vocabulary.
    """
    if value is None:
        raise BadRow(
            field, "missing value", f'"{field}" is None, but token-id rows need all three columns. Fill it in.'
        )
    if not is_list(value):
        raise BadRow(
            field,
            "wrong type",
            f'"{field}" is {describe(value)}, but another column holds token ids. Give all three as token ids.',
        )
    if len(value) == 0:
        raise BadRow(
            field,
            "empty prompt" if field == "prompt" else "empty completion",
            f'"{field}" holds no token ids, expected at least one.',
        )
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of unequal length
        ids = np.empty((0, 0))
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise BadRow(field, "wrong type", f'"{field}" is {describe(value)}, expected one flat list of token ids.')
    if ids.min() < 0 or ids.max() >= vocabulary_size:
        outside = ids[(ids < 0) | (ids >= vocabulary_size)][0]
        raise BadRow(
            field,
            "bad value",
            f'"{field}" holds the token id {outside}, outside the tokenizer\'s 0 to {vocabulary_size - 1}. '
            "Use the tokenizer that made these ids.",
        )
    return ids.astype(np.int32)


def read_options(
    row: Mapping[str, Any], tools: list[Any] | None, chat_template_kwargs: Mapping[str, Any] | None
) -> RowOptions:
    """The optional columns; the row's own tools win over `tools`, its template arguments key by key.

    Raises:
      BadRow: "wrong type" or "bad value".
    """
    own_tools = _tools(row)
    own_kwargs = _json_column(row, "chat_template_kwargs", Mapping) or {}
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
    return RowOptions(
        tools=(tools if own_tools is None else own_tools) or None,
        own_tools=own_tools or [],
        chat_template_kwargs={**(chat_template_kwargs or {}), **own_kwargs},
        weight=1.0 if weight is None else weight,
        ref_chosen_logps=chosen,
        ref_rejected_logps=rejected,
    )


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The row's tools as mappings; a tool, or its parameters, may be JSON text."""
    tools = _json_column(row, "tools", list)
    return None if tools is None else [_named_tool(tool, f"tool {number}") for number, tool in enumerate(tools)]


def _named_tool(tool: Any, where: str) -> dict[str, Any]:
    tool = _tool(tool, where)
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name", tool.get("name")), str):
        raise BadRow("tools", "missing value", f'{where} has no name: {describe(tool)}. Give each tool a "name".')
    return tool


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = read_json_text(tool, "tools", where)
    if not isinstance(tool, Mapping):
        raise BadRow("tools", "wrong type", f"{where} is {describe(tool)}, expected a mapping or its JSON text.")
    tool = dict(tool)
    if isinstance(tool.get("function"), Mapping | str):
        tool["function"] = _tool(tool["function"], f'"function" of {where}')
    if isinstance(tool.get("parameters"), str):
        parameters = read_json_text(tool["parameters"], "tools", f'"parameters" of {where}')
        if not isinstance(parameters, Mapping):
            raise BadRow(
                "tools", "wrong type", f'"parameters" of {where} is {describe(parameters)}, expected a mapping.'
            )
        tool["parameters"] = parameters
    return tool


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
    # Not by float(value): an integer of 400 digits is larger than any.
    if not -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise BadRow(field, "bad value", f'"{field}" is {describe(value)}, expected a number that float32 can hold.')
    return float(value)
