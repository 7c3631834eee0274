"""Chat messages in the OpenAI and ShareGPT spellings, brought to one form: `{"role", "content", ...}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np

from easydel.data.faults import BadRow, describe, in_quotes
from easydel.data.preference.nested import is_given, read_json_text, without_nulls

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
SYSTEM_ROLES = ("system", "developer")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Names under which columns, messages and content parts hold what is not text.
MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio", "media", "pixel_values")
# Other names for the arguments of a call, which would otherwise be taken for a call without any.
ARGUMENTS_BY_OTHER_NAMES = ("parameters", "args", "kwargs", "input")

_PARTS_IN_TEXT = re.compile(r'\s*\[\s*\{\s*"(?:type|text|image|image_url)"')


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a sequence of things, rather than text: a list, a tuple or a numpy array."""
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def is_message_list(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a value looks like a conversation: an empty list, or a list whose first entry is a mapping."""
    return is_list(value) and (len(value) == 0 or isinstance(value[0], Mapping))


def normalise_messages(value: Sequence[Mapping[str, Any]], field: str, *, nulls_are_own: bool = False) -> list[Message]:
    """Copies of the messages with an OpenAI role and text as content, whatever spelling they came in.

    Keys whose value is None are left out, at any depth: Arrow fills absent keys with None, and templates ask
    `is defined`. With `nulls_are_own`, as in JSON text, that is so for the messages' own keys alone. Tool calls and
    their arguments are read where they are JSON text.

    Raises:
      BadRow: "unknown role", "missing value", "wrong type" or "bad value", naming the message by its number, from 0.
    """
    return [_normalise(message, field, number, nulls_are_own) for number, message in enumerate(value)]


def role_of(speaker: object) -> str | None:
    """OpenAI's role for either spelling; None for any other value."""
    if not isinstance(speaker, str):
        return None
    return speaker if speaker in OPENAI_ROLES else SHAREGPT_ROLES.get(speaker)


def what_is_said(message: Message) -> tuple[object, ...]:
    """All by which turns are compared: role, text without outer white space, reasoning, tool calls."""
    reasoning = tuple(str(message[key]).strip() for key in REASONING_KEYS if key in message)
    calls = tuple(
        (name, json.dumps(arguments, sort_keys=True))
        for name, arguments in map(read_call, message.get("tool_calls", ()))
    )
    return message["role"], message["content"].strip(), reasoning, calls


def begins_with(messages: Sequence[Message], said: Sequence[tuple[object, ...]]) -> bool:
    """True where the first turns say what `said` has of each turn; see `what_is_said`."""
    return [what_is_said(message) for message in messages[: len(said)]] == list(said)


def read_call(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of a normalised tool call."""
    function = call.get("function", call)
    return function["name"], function["arguments"]


def _normalise(message: Mapping[str, Any], field: str, number: int, nulls_are_own: bool) -> Message:
    where = f'"{field}" message {number}'
    if not isinstance(message, Mapping):
        raise BadRow(
            field, "wrong type", f'{where} is {describe(message)}, expected a mapping such as {{"role", "content"}}.'
        )
    kept = {key: value for key, value in message.items() if value is not None}
    content_key = "content"
    if "role" not in kept and "from" in kept:
        kept = {"role": kept.pop("from"), **kept}
        if "value" in message or "content" not in kept:
            content_key, kept["content"] = "value", kept.pop("value", None)
        speakers: tuple[str, ...] = tuple(SHAREGPT_ROLES)
    else:
        speakers = OPENAI_ROLES
    if "role" not in kept:
        raise BadRow(
            field,
            "unknown role",
            f'{where} has no role: its keys are {in_quotes(sorted(map(str, message)))}, expected "role" and "content" '
            'or "from" and "value".',
        )
    speaker = kept["role"]
    # ShareGPT's names in OpenAI's keys are common enough, and unambiguous.
    kept["role"] = role_of(speaker)
    if kept["role"] is None:
        raise _unknown_role(field, where, speaker, speakers)
    text = kept.pop("content", None)
    if len(kept) > 1:
        kept = _normalise_others(kept, field, where, nulls_are_own)
    # An assistant that only calls tools has no content in OpenAI's format.
    kept["content"] = "" if text is None and "tool_calls" in kept else _text(text, field, where, content_key)
    if speaker in TOOL_CALL_ROLES and (calls := _calls_in_text(kept["content"], field, where)):
        kept |= {"content": "", "tool_calls": calls}
    return kept


def _normalise_others(kept: Message, field: str, where: str, nulls_are_own: bool) -> Message:
    """Read the keys of a message beside role and content."""
    if not nulls_are_own:
        kept = without_nulls(kept, field, where)
    for key in MEDIA:
        if is_given(kept.get(key)):
            raise BadRow(field, "wrong type", f'{where} holds "{key}"; only text can be trained on. Remove it.')
    for key in REASONING_KEYS:
        if key in kept:
            kept[key] = _text(kept[key], field, where, key)
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], field, where)
    elif kept["role"] == "assistant" and is_given(kept.get("function_call")):  # OpenAI's former spelling
        kept["tool_calls"] = _tool_calls([{"function": kept.pop("function_call")}], field, where)
    if not kept.get("tool_calls"):
        kept.pop("tool_calls", None)
    return kept


def _tool_calls(calls: object, field: str, where: str) -> list[Message]:
    if isinstance(calls, str):
        calls = read_json_text(calls, field, f'"tool_calls" of {where}') if is_given(calls) else []
    if calls is None:
        return []
    if not is_list(calls):
        raise BadRow(field, "wrong type", f'{where} has {describe(calls)} as "tool_calls", expected a list of calls.')
    return [_call(call, field, f"tool call {number} of {where}") for number, call in enumerate(calls)]


def _call(call: object, field: str, where: str) -> Message:
    """A call with its arguments as a mapping, in the shape it came in: with "function" or without."""
    if isinstance(call, str):
        call = read_json_text(call, field, where)
    if not isinstance(call, Mapping):
        raise BadRow(field, "wrong type", f'{where} is {describe(call)}, expected a mapping with "function".')
    function = call.get("function")
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = read_json_text(function, field, f'"function" of {where}')
    if isinstance(function, Mapping):
        return {"type": "function", **call, "function": _function(function, field, where)}
    return _function(call, field, where)


def _function(function: Mapping[str, Any], field: str, where: str) -> Message:
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise BadRow(
            field, "missing value", f'{where} has {describe(name)} as "name", expected the name of a function.'
        )
    if arguments is None:
        for key in ARGUMENTS_BY_OTHER_NAMES:
            if is_given(function.get(key)):
                raise BadRow(field, "missing value", f'{where} has "{key}" but no "arguments". Rename it.')
    # A function without arguments is called with none, with {} and with "".
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        arguments = read_json_text(arguments, field, f'"arguments" of {where}')
    if not isinstance(arguments, Mapping):
        raise BadRow(
            field,
            "wrong type",
            f'{where} has {describe(arguments)} as "arguments", expected a mapping or its JSON text.',
        )
    return {**function, "arguments": arguments}


def _calls_in_text(text: str, field: str, where: str) -> list[Message]:
    """ShareGPT's `{"name": ..., "arguments": ...}`, or a list of these, as tool calls; none where it is other words."""
    if text.lstrip()[:1] not in ("{", "["):
        return []
    value = read_json_text(text, field, where)
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return []
    return [{"type": "function", "function": _function(call, field, where)} for call in calls]


def _text(content: object, field: str, where: str, key: str) -> str:
    if isinstance(content, str):
        if content.lstrip().startswith("[") and _is_parts_in_text(content):
            raise BadRow(
                field,
                "wrong type",
                f'{where} has content parts as JSON text in "{key}". Give them as a list, or give the text itself.',
            )
        return content
    if content is None:
        raise BadRow(field, "missing value", f'{where} has no "{key}" (None); give it text or remove the message.')
    if is_list(content):
        return "".join(_part_text(part, field, where) for part in content)
    raise BadRow(field, "wrong type", f'{where} has {describe(content)} as "{key}", expected text.')


def _is_parts_in_text(text: str) -> bool:
    """True for the JSON of `[{"type": "text", "text": ...}, ...]`; any other JSON may well be an answer."""
    if not _PARTS_IN_TEXT.match(text):
        return False
    try:
        parts = json.loads(text)
    except ValueError:
        return False
    return all(
        isinstance(part, dict) and (part.keys() == {"type", "text"} or part.get("type") in MEDIA) for part in parts
    )


def _part_text(part: object, field: str, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        other = next((key for key in MEDIA if is_given(part.get(key))), None)
        if other is None:
            return part["text"]
        kind = f'a part with "{other}"'
    else:
        kind = f"a part of type {in_quotes([part.get('type')])}" if isinstance(part, Mapping) else describe(part)
    raise BadRow(
        field,
        "wrong type",
        f'{where} holds {kind}; only {{"type": "text", "text": ...}} parts can be trained on. Remove the other parts.',
    )


def _unknown_role(field: str, where: str, role: object, known: Sequence[str]) -> BadRow:
    return BadRow(field, "unknown role", f"{where} has the role {describe(role)}, expected one of {', '.join(known)}.")
