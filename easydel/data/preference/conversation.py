"""Read a row of chat messages: prompt and completions without repeated turns, system prompt, history, documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easydel.data.faults import BadRow, describe, empty_completion, empty_prompt
from easydel.data.preference.columns import SYSTEM_COLUMNS, Columns, missing_prompt
from easydel.data.preference.json_values import is_given, is_list, read_json_text, without_nulls
from easydel.data.preference.messages import (
    SYSTEM_ROLES,
    Message,
    begins_with,
    is_message_list,
    normalise_messages,
    read_messages,
    what_is_said,
)
from easydel.data.preference.shared_prompt import (
    gather_prompt,
    refuse_equal_messages,
    refuse_repeated_messages,
    split_shared_messages,
    without_repeated_prefill,
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and its two completions as messages, ready for the chat template.

    Attributes:
      prompt: messages up to the turn that is answered.
      chosen, rejected: messages after the prompt; each list ends in an answer.
      prefill: text that opens both answers and belongs to the prompt; "" for none.
      documents: sources of the answers, as `apply_chat_template(documents=...)` takes them.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    prefill: str = ""
    documents: list[Any] | None = None


def read_conversation(columns: Columns) -> Conversation | None:
    """Read the messages of a row; text beside messages is one message. None where all three columns are plain text.

    Raises:
      BadRow: the messages, their context, or the pair that they make cannot be used.

    Example:
      >>> from easydel.data.preference.columns import read_columns
      >>> row = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello!", "rejected": "No."}
      >>> conversation = read_conversation(read_columns(row | {"system": "Be kind."}, None, None))
      >>> [message["content"] for message in conversation.prompt + conversation.chosen]
      ['Be kind.', 'Hi', 'Hello!']
    """
    messages = {field: read_messages(value, field) for field, value in columns.values.items()}
    for field, value in columns.values.items():
        if messages[field] is None and not (isinstance(value, str) or (value is None and field == "prompt")):
            raise BadRow(
                field, "wrong type", f'"{field}" is {describe(value)}, expected text, chat messages or token ids.'
            )
    _refuse_one_in_text(columns.values, messages)
    if all(value is None for value in messages.values()):
        return None
    context = _read_context(columns.row)
    chosen = _as_messages(columns.values["chosen"], messages["chosen"], "assistant")
    rejected = _as_messages(columns.values["rejected"], messages["rejected"], "assistant")
    refuse_equal_messages(chosen, rejected)
    prompt, chosen, rejected = _split_prompt(columns, messages["prompt"], chosen, rejected)
    chosen, rejected = _up_to_last_answer(chosen, "chosen"), _up_to_last_answer(rejected, "rejected")
    refuse_equal_messages(chosen, rejected)
    prompt, prefill, chosen, rejected = _split_prefill(context.before(prompt), chosen, rejected)
    refuse_repeated_messages(prompt, chosen, rejected)
    return Conversation(prompt, chosen, rejected, prefill, context.documents)


def _refuse_one_in_text(columns: Mapping[str, Any], messages: Mapping[str, list[Message] | None]) -> None:
    """Raise `BadRow` where one completion is messages as JSON text and the other plain text; either may be meant."""
    for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if isinstance(columns[one], str) and messages[one] is not None and messages[other] is None:
            raise BadRow(
                one,
                "wrong type",
                f'"{one}" is chat messages as JSON text, but "{other}" is plain text. Give both as messages.',
            )


def _as_messages(text: Any, messages: list[Message] | None, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if messages is None else messages


def _split_prompt(
    columns: Columns, messages: list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected without repeated turns; without a prompt, the completions' shared turns are it."""
    given = columns.values["prompt"]
    prompt = [] if given is None else _as_messages(given, messages, "user")
    if any(message["content"].strip() or "tool_calls" in message for message in prompt):
        return gather_prompt(prompt, chosen, rejected)
    shared = split_shared_messages(chosen, rejected)
    if shared is None and given is not None:
        raise empty_prompt('"prompt" has no messages with text in them')
    return shared or missing_prompt(columns.row, "messages")


def _split_prefill(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], str, list[Message], list[Message]]:
    """Split off the assistant turn at the end of a prompt, if any, and put its text in front of both completions.

    Returns:
      Prompt, prefill ("" for none), chosen and rejected.

    Raises:
      BadRow: "wrong type" where the completions cannot continue that turn.
    """
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt, "", chosen, rejected
    opening = prompt[-1]
    if "tool_calls" in opening or len(chosen) > 1 or len(rejected) > 1:
        raise BadRow(
            "prompt",
            "wrong type",
            '"prompt" ends in an assistant message, which "chosen" and "rejected" can continue only where it is text '
            "and each of them is one assistant message. End the prompt with the turn that is to be answered.",
        )
    prefill = opening["content"]
    if not prefill.strip():
        return prompt[:-1], "", chosen, rejected
    rest = without_repeated_prefill(prefill, chosen=chosen[0]["content"], rejected=rejected[0]["content"])
    sides = (
        [opening | answer | {"content": prefill + text}]
        for answer, text in zip((chosen[0], rejected[0]), rest, strict=True)
    )
    return prompt[:-1], prefill, *sides


def _up_to_last_answer(completion: list[Message], field: str) -> list[Message]:
    """The completion without the turns after its last answer: they carry no loss and change nothing before them."""
    answers = [number for number, message in enumerate(completion) if message["role"] == "assistant"]
    if not answers:
        raise empty_completion(field, f'"{field}" holds no assistant message')
    for number in answers:
        if not completion[number]["content"].strip() and "tool_calls" not in completion[number]:
            raise empty_completion(field, f'"{field}" holds an empty assistant message')
    return completion[: answers[-1] + 1]


@dataclass(frozen=True, slots=True)
class _Context:
    """The context of a pair, from columns of its row.

    Attributes:
      system: the system prompt; None for none.
      system_column: the column that holds it.
      history: turns before the prompt.
      documents: sources of the answers, as `apply_chat_template(documents=...)` takes them.
    """

    system: str | None
    system_column: str
    history: list[Message]
    documents: list[Any] | None

    def before(self, prompt: list[Message]) -> list[Message]:
        """The prompt with the system message and the history in front, unless it has them already.

        Raises:
          BadRow: "bad value" where the prompt has a different system message or history.
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


def _read_context(row: Mapping[str, Any]) -> _Context:
    """Read the columns of `CONTEXT_COLUMNS`; those that are None or empty count as absent.

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
    return _Context(row[column] if given else None, column, _history(row), _documents(row))


def _history(row: Mapping[str, Any]) -> list[Message]:
    """The turns of the column "history": LLaMA-Factory's list of [user, assistant] texts, or a list of messages."""
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
