"""Conversations stored as text: JSON is read, what looks like one and is not is refused, other text stays text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from easydel.data.faults import BadRow, describe
from easydel.data.preference.messages import OPENAI_ROLES, SHAREGPT_ROLES, is_message_list, role_of
from easydel.data.preference.nested import read_json_text

_NAMES = "|".join({*OPENAI_ROLES, *SHAREGPT_ROLES})
_OPENING = re.compile(r"""\s*["']?\s*(?:(?:np\.)?array\(\s*)?\[?\s*\{""")
_ROLE = re.compile(rf"""(\\?["'])(?:role|from)\1\s*:\s*\\?(["'])(?:(?P<known>{_NAMES})\b|\w+\\?\2)""")
_CONTENT = re.compile(r"""(\\?["'])(?:content|value|tool_calls)\1\s*:""")
# What is looked at to tell whether a text that cannot be read was meant as messages.
_HEAD = 2000


def read_message_text(text: str, field: str) -> Sequence[Mapping[str, Any]] | None:
    """The messages of a JSON text; None where the text is only text, even one that begins with a bracket.

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
    """True where the structure goes on to the end of the text, rather than being quoted at its beginning."""
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
