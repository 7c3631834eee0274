"""The columns that say in what context a pair stands: system prompt, history, documents; and those of media."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easydel.data.faults import BadRow, describe, in_quotes
from easydel.data.preference.messages import (
    MEDIA,
    SYSTEM_ROLES,
    Message,
    begins_with,
    is_list,
    is_message_list,
    normalise_messages,
    what_is_said,
)
from easydel.data.preference.nested import is_given, read_json_text, without_nulls

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = (*SYSTEM_COLUMNS, "history", "documents")
# What other data sets call these columns; only ever suggested, never read.
OTHER_NAMES = {
    "functions": "tools",
    "chat_history": "history",
    "conversation_history": "history",
    "sys_prompt": "system",
    "system_instruction": "system",
    "system_msg": "system",
}


@dataclass(frozen=True, slots=True)
class Context:
    """The columns that go into the chat template beside prompt, chosen and rejected.

    Attributes:
      system: the system prompt.
      system_column: the column that it stands in.
      history: turns before the prompt.
      documents: what the answers are drawn from, as `apply_chat_template(documents=...)` takes it.
    """

    system: str | None
    system_column: str
    history: list[Message]
    documents: list[Any] | None

    def before(self, prompt: list[Message]) -> list[Message]:
        """The prompt with the system message and the history in front, each once.

        Raises:
          BadRow: "bad value" where the prompt brings a system message or a history of its own that differ.
        """
        opening = [message for message in prompt[:1] if message["role"] in SYSTEM_ROLES]
        turns = prompt[len(opening) :]
        if self.history and not begins_with(turns, [*map(what_is_said, self.history)]):
            if any(message["role"] == "assistant" for message in turns):
                raise BadRow(
                    "history",
                    "bad value",
                    '"history" is given, but "prompt" has earlier turns of its own. Keep one of them.',
                )
            turns = self.history + turns
        if self.system is not None and not opening:
            opening = [{"role": "system", "content": self.system}]
        elif self.system is not None and opening[0]["content"].strip() != self.system.strip():
            column = self.system_column
            raise BadRow(
                column,
                "bad value",
                f'"{column}" is {describe(self.system)}, but the messages open with another system message, '
                f"{describe(opening[0]['content'])}. Keep one of them.",
            )
        return opening + turns


def read_context(row: Mapping[str, Any]) -> Context:
    """The columns of `CONTEXT_COLUMNS`; those that are None or empty say nothing.

    Raises:
      BadRow: "wrong type" or "bad value".
    """
    given = [column for column in SYSTEM_COLUMNS if is_given(row.get(column))]
    for column in given:
        if not isinstance(row[column], str):
            raise BadRow(column, "wrong type", f'"{column}" is {describe(row[column])}, expected text.')
        if row[column].strip() != row[given[0]].strip():
            raise BadRow(column, "bad value", f'"{column}" and "{given[0]}" differ. Keep one of them.')
    column = given[0] if given else ""
    return Context(row[column] if given else None, column, _history(row), _documents(row))


def refuse_media(row: Mapping[str, Any]) -> None:
    """Raise `BadRow` for a row with images, sound or video: only text is trained on."""
    for column in MEDIA:
        if column in row and is_given(row[column]):
            raise BadRow(
                column,
                "unused column",
                f'"{column}" is {describe(row[column])}, but only text can be trained on. Remove these rows, or '
                "empty the column where the text stands without it.",
            )


def refuse_other_names(row: Mapping[str, Any]) -> None:
    """Raise `BadRow` for a column of context under another name, which would be lost; letter case counts as one."""
    for column in row:
        if not isinstance(column, str) or column in CONTEXT_COLUMNS:
            continue
        lower = column.lower()
        name = lower if lower in CONTEXT_COLUMNS else OTHER_NAMES.get(lower)
        if name is not None and is_given(row[column]):
            raise BadRow(
                column,
                "unused column",
                f'"{column}" is {describe(row[column])}, but that is read from "{name}". Rename it: '
                f'source.rename_fields({{{in_quotes([column])}: "{name}"}}), or remove it.',
            )


def refuse_context_of_text(row: Mapping[str, Any], read: str) -> None:
    """Raise `BadRow` for what only a chat template could put in front of plain text, which uses none.

    A system prompt that the text itself (`read`) holds is in its place already.
    """
    for column in (*CONTEXT_COLUMNS, "tools", "chat_template_kwargs"):
        value = row.get(column)
        if not is_given(value):
            continue
        if column in SYSTEM_COLUMNS and isinstance(value, str) and value.strip() in read:
            continue
        raise BadRow(
            column,
            "unused column",
            f'"{column}" is {describe(value)}, but the row is plain text, for which no chat template is used. Give the '
            f"prompt as chat messages, or write it into the text and remove the column.",
        )


def _history(row: Mapping[str, Any]) -> list[Message]:
    """LLaMA-Factory's list of [user, assistant] texts, or a list of messages."""
    value = row.get("history")
    if not is_given(value):
        return []
    if isinstance(value, str):
        value = read_json_text(value, "history", '"history"')
    if is_message_list(value):
        return normalise_messages(value, "history")
    if not is_list(value) or not all(
        is_list(turn) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in value
    ):
        raise BadRow(
            "history",
            "wrong type",
            f'"history" is {describe(value)}, expected a list of [user, assistant] texts, or chat messages.',
        )
    roles = ("user", "assistant")
    return [{"role": role, "content": str(text)} for turn in value for role, text in zip(roles, turn, strict=True)]


def _documents(row: Mapping[str, Any]) -> list[Any] | None:
    value = row.get("documents")
    if not is_given(value):
        return None
    documents = (
        read_json_text(value, "documents", '"documents"')
        if isinstance(value, str)
        else without_nulls(value, "documents", '"documents"')
    )
    if not isinstance(documents, list) or not all(map(_has_text, documents)):
        raise BadRow(
            "documents",
            "wrong type",
            f'"documents" is {describe(value)}, expected a list of mappings with text, or its JSON.',
        )
    return documents


def _has_text(document: object) -> bool:
    texts = document.values() if isinstance(document, Mapping) else [document]
    return any(isinstance(text, str) and text.strip() for text in texts)
