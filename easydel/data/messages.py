"""Chat messages in the OpenAI and ShareGPT spellings, brought to one form: `{"role", "content", ...}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np

from .faults import BadRow, describe

Message: TypeAlias = dict[str, Any]

OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}

TOOL_CALL_ROLES = ("function_call", "tool_call")


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a sequence of things, rather than text: a list, a tuple or a numpy array."""
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def is_message_list(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a value looks like a conversation: an empty list, or a list whose first entry is a mapping."""
    return is_list(value) and (len(value) == 0 or isinstance(value[0], Mapping))


def normalise_messages(value: Sequence[Mapping[str, Any]], field: str) -> list[Message]:
    """Copies of the messages with an OpenAI role and text as content, whatever spelling they came in.

    Keys whose value is None are left out: Arrow fills absent keys with None, and templates ask `is defined`.

    Raises:
      BadRow: "unknown role", "missing value" or "wrong type", naming the message by its number, from 0.
    """
    return [_normalise(message, field, number) for number, message in enumerate(value)]


def _normalise(message: Mapping[str, Any], field: str, number: int) -> Message:
    where = f'"{field}" message {number}'
    if not isinstance(message, Mapping):
        raise BadRow(
            field, "wrong type", f'{where} is {describe(message)}, expected a mapping such as {{"role", "content"}}.'
        )
    if message.get("role") is not None:
        return _from_openai(message, field, where)
    if message.get("from") is not None:
        return _from_sharegpt(message, field, where)
    raise BadRow(
        field,
        "unknown role",
        f'{where} has no role: its keys are {sorted(map(str, message))}, expected "role" and "content" '
        'or "from" and "value".',
    )


def _from_openai(message: Mapping[str, Any], field: str, where: str) -> Message:
    role = message["role"]
    # ShareGPT's names in OpenAI's keys are common enough, and unambiguous.
    known = role if role in OPENAI_ROLES else SHAREGPT_ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise _unknown_role(field, where, role, OPENAI_ROLES)
    kept = {key: value for key, value in message.items() if value is not None}
    kept["role"] = known
    if is_list(kept.get("tool_calls")):
        kept["tool_calls"] = list(kept["tool_calls"])
    if not kept.get("tool_calls"):
        kept.pop("tool_calls", None)
    content = message.get("content")
    # An assistant that only calls tools has no content in OpenAI's format.
    kept["content"] = "" if content is None and "tool_calls" in kept else _text(content, field, where, "content")
    return kept


def _from_sharegpt(message: Mapping[str, Any], field: str, where: str) -> Message:
    speaker = message["from"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise _unknown_role(field, where, speaker, tuple(SHAREGPT_ROLES))
    text = _text(message.get("value"), field, where, "value")
    if speaker in TOOL_CALL_ROLES and (call := _tool_call(text)) is not None:
        return {"role": role, "content": "", "tool_calls": [call]}
    return {"role": role, "content": text}


def _tool_call(text: str) -> dict[str, Any] | None:
    """ShareGPT's `{"name": ..., "arguments": ...}` as OpenAI's tool call, None when the text is something else."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
        return None
    return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}


def _text(content: object, field: str, where: str, key: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise BadRow(field, "missing value", f'{where} has no "{key}" (None); give it text or remove the message.')
    if is_list(content):
        return "".join(_part_text(part, field, where) for part in content)
    raise BadRow(field, "wrong type", f'{where} has {describe(content)} as "{key}", expected text.')


def _part_text(part: object, field: str, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = f'a part of type "{part.get("type")}"' if isinstance(part, Mapping) else describe(part)
    raise BadRow(
        field,
        "wrong type",
        f'{where} holds {kind}; only {{"type": "text", "text": ...}} parts can be trained on. Remove the other parts.',
    )


def _unknown_role(field: str, where: str, role: object, known: Sequence[str]) -> BadRow:
    return BadRow(field, "unknown role", f"{where} has the role {role!r}, expected one of {', '.join(known)}.")
