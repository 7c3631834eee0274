"""Read chat messages, in the OpenAI or ShareGPT spelling or as JSON text, into `{"role", "content", ...}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from easydel.data.faults import BadRow, describe, in_quotes
from easydel.data.preference.json_values import is_given, is_list, read_json_text, without_nulls
from easydel.data.preference.tools import calls_in_text, read_call, read_tool_calls

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
_PARTS_IN_TEXT = re.compile(r'\s*\[\s*\{\s*"(?:type|text|image|image_url)"')
_NAMES = "|".join({*OPENAI_ROLES, *SHAREGPT_ROLES})
_OPENING = re.compile(r"""\s*["']?\s*(?:(?:np\.)?array\(\s*)?\[?\s*\{""")
_ROLE = re.compile(rf"""(\\?["'])(?:role|from)\1\s*:\s*\\?(["'])(?:(?P<known>{_NAMES})\b|\w+\\?\2)""")
_CONTENT = re.compile(r"""(\\?["'])(?:content|value|tool_calls)\1\s*:""")
# Characters in which to look for signs that a text that cannot be read was meant as messages.
_HEAD = 2000


def is_message_list(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """True if a value looks like a conversation: an empty list, or a list whose first entry is a mapping."""
    return is_list(value) and (len(value) == 0 or isinstance(value[0], Mapping))


def normalise_messages(value: Sequence[Mapping[str, Any]], field: str, *, nulls_are_own: bool = False) -> list[Message]:
    """Copies of the messages with an OpenAI role and text as content, from either spelling.

    Keys whose value is None are left out, at any depth: Arrow fills absent keys with None, and templates ask
    `is defined`. Tool calls and their arguments are read where they are JSON text.

    Args:
      value: the messages.
      field: the column that a fault names.
      nulls_are_own: nulls were written by the user, as in JSON text; only those of the messages' own keys are left out.

    Raises:
      BadRow: "unknown role", "missing value", "wrong type" or "bad value", naming the message by its number, from 0.
    """
    return [_normalise(message, field, number, nulls_are_own) for number, message in enumerate(value)]


def read_messages(value: Any, field: str) -> list[Message] | None:
    """Read the messages of a column, from a list or its JSON text; None where the column holds something else.

    Raises:
      BadRow: as `normalise_messages`; "bad value" for text that looks like messages and cannot be read as such.

    Example:
      >>> read_messages('[{"from": "human", "value": "Hi"}]', "prompt")
      [{'role': 'user', 'content': 'Hi'}]
      >>> read_messages("Hi", "prompt") is None
      True
    """
    if is_message_list(value):
        return normalise_messages(value, field)
    if isinstance(value, str) and (found := _read_message_text(value, field)) is not None:
        return normalise_messages(found, field, nulls_are_own=True)
    return None


def role_of(speaker: object) -> str | None:
    """OpenAI's role for a role of either spelling; None for any other value."""
    if not isinstance(speaker, str):
        return None
    return speaker if speaker in OPENAI_ROLES else SHAREGPT_ROLES.get(speaker)


def what_is_said(message: Message) -> tuple[object, ...]:
    """The content by which turns are compared: role, text without outer white space, reasoning, tool calls."""
    reasoning = tuple(str(message[key]).strip() for key in REASONING_KEYS if key in message)
    calls = tuple(
        (name, json.dumps(arguments, sort_keys=True))
        for name, arguments in map(read_call, message.get("tool_calls", ()))
    )
    return message["role"], message["content"].strip(), reasoning, calls


def begins_with(messages: Sequence[Message], said: Sequence[tuple[object, ...]]) -> bool:
    """True where the first turns have the contents `said`, each as `what_is_said` gives it."""
    return [what_is_said(message) for message in messages[: len(said)]] == list(said)


def _normalise(message: Mapping[str, Any], field: str, number: int, nulls_are_own: bool) -> Message:
    """One message, as `normalise_messages` returns it; `number` is its index, for messages."""
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
    if speaker in TOOL_CALL_ROLES and (calls := calls_in_text(kept["content"], field, where)):
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
        kept["tool_calls"] = read_tool_calls(kept["tool_calls"], field, where)
    elif kept["role"] == "assistant" and is_given(kept.get("function_call")):  # OpenAI's former spelling
        kept["tool_calls"] = read_tool_calls([{"function": kept.pop("function_call")}], field, where)
    if not kept.get("tool_calls"):
        kept.pop("tool_calls", None)
    return kept


def _text(content: object, field: str, where: str, key: str) -> str:
    """The text of a message's content, which may be a list of text parts."""
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
    """True for the JSON of `[{"type": "text", "text": ...}, ...]`; other JSON may be an answer."""
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


def _read_message_text(text: str, field: str) -> Sequence[Mapping[str, Any]] | None:
    """Read the messages of a JSON text; None where the text is plain text, even if it begins with a bracket.

    Raises:
      BadRow: "bad value" where it looks like messages and cannot be read: cut off, a list as Python prints it, JSON
        inside JSON, or one message without a list.
    """
    if not _OPENING.match(text):
        return None
    role = _ROLE.search(text[:_HEAD])
    looks_like_messages = role is not None and (role["known"] is not None or _CONTENT.search(text[:_HEAD]) is not None)
    if text.lstrip()[0] == "[" and (looks_like_messages or "role" in text or "value" in text):
        try:
            value = read_json_text(text, field, f'"{field}"')
        except BadRow:
            if not looks_like_messages:
                return None
            raise _unfit(text, field) from None
        return value if is_message_list(value) and any(map(_is_message, value)) else None
    if looks_like_messages and _is_whole(text):
        raise _unfit(text, field)
    return None


def _is_message(entry: object) -> bool:
    if not isinstance(entry, Mapping):
        return False
    return (
        role_of(entry.get("role")) is not None
        or {"role", "content"} <= entry.keys()
        or {"from", "value"} <= entry.keys()
    )


def _is_whole(text: str) -> bool:
    """True where a structure fills the whole text, rather than being quoted at its beginning."""
    return text.rstrip()[-1] in "]})\"'"


def _unfit(text: str, field: str) -> BadRow:
    how = (
        "as Python prints it" if re.search(r"""[{,]\s*'""", text[:_HEAD])
        else "as JSON inside JSON" if text.lstrip()[0] == '"'
        else "of one message, not a list" if text.lstrip()[0] == "{"
        else "that is not valid JSON"
    )  # fmt: skip
    return BadRow(
        field,
        "bad value",
        f'"{field}" looks like chat messages, but is text {how}: {describe(text)}. Write it with json.dumps(messages).',
    )
