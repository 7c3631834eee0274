"""Refuse rows of which the chat template leaves something out: every part that carries meaning must be rendered.

Without a part, training would use another row than the data set has. White space, JSON's escapes and the layout of a
call's arguments may differ.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from easydel.data.faults import BadRow, in_quotes
from easydel.data.preference.messages import REASONING_KEYS, Message
from easydel.data.preference.tools import read_call

END_OF_THINKING, THINKING = "</think>", "<think>"
MOST_LEAVES = 100  # of a call's arguments: a template that writes so many writes them all
FIXES = {
    "text": "Use a role the template knows, or set another tokenizer.chat_template.",
    "reasoning": "Set a tokenizer.chat_template that keeps the reasoning of an answer, or remove it from the row.",
    "tool call": "Set a tokenizer.chat_template that writes tool calls and the text beside them.",
    "tool": "Set a tokenizer.chat_template that lists tools, or remove them from the row.",
    "document": "Set a tokenizer.chat_template that writes documents, or put them into the prompt.",
}


class Part(NamedTuple):
    """A part of a row that the rendered text must contain.

    Attributes:
      kind: a key of `FIXES`.
      name: its name in an error message.
      text: its characters.
      field: the column that holds it.
    """

    kind: str
    name: str
    text: str
    field: str

    @property
    def fault(self) -> BadRow:
        """The fault of a row whose rendering lacks this part."""
        return BadRow(
            self.field,
            "template error",
            f"{self.name} does not appear in what the chat template renders: the template leaves it out. "
            f"{FIXES[self.kind]}",
        )


def thoughts_and_answer(content: str) -> tuple[str, str]:
    """The reasoning inside `<think>` at the beginning of an assistant's text, "" where there is none, and the rest."""
    head, end, tail = content.rpartition(END_OF_THINKING)
    return (head.strip().removeprefix(THINKING).strip(), tail.strip()) if end else ("", content.strip())


def parts_of(message: Message, field: str, number: int, *, scored: bool) -> list[Part]:
    """The parts of a message that must be rendered; templates may drop the reasoning of a turn that is not scored."""
    where = f'"{field}" message {number} (role {message["role"]})'
    found = []
    content = message["content"]
    if message["role"] == "assistant":
        thoughts, content = thoughts_and_answer(content)
        if scored:
            found += [("reasoning", f'"{key}" of {where}', message[key]) for key in REASONING_KEYS if key in message]
            found.append(("reasoning", f"the reasoning in the text of {where}", thoughts))
    found.append(("text", f"the text of {where}", content))
    for call in message.get("tool_calls", ()):
        name, arguments = read_call(call)
        called = f"{in_quotes([name])} of {where}"
        found.append(("tool call", f"the call of {called}", name))
        found += [("tool call", f"an argument of {called}", leaf) for leaf in islice(_leaves(arguments), MOST_LEAVES)]
    return [Part(*part, field) for part in found if part[-1].strip()]


def parts_of_context(tools: Sequence[Any], documents: Sequence[Any]) -> list[Part]:
    """The parts of a row's own tools and documents that must be rendered: names of tools, texts of documents."""
    parts = []
    for tool in tools:
        name = tool.get("name", tool["function"].get("name") if isinstance(tool.get("function"), Mapping) else None)
        if isinstance(name, str) and name.strip():
            parts.append(Part("tool", f"the tool {in_quotes([name])}", name, "tools"))
    for number, document in enumerate(documents):
        texts = [document] if isinstance(document, str) else document.values()
        longest = max((text for text in texts if isinstance(text, str)), key=len, default="")
        parts.append(Part("document", f"document {number}", longest, "documents"))
    return parts


def refuse_unseen(parts: Sequence[Part], text: str) -> None:
    """Raise `BadRow` for the first part that occurs less often in a text than in all the parts together.

    Counting tells apart words that also occur elsewhere: a question about the weather does not show a tool "weather".
    """
    wanted = "\0".join(part.text for part in parts)
    checked = set()
    for part in parts:
        piece = part.text.strip()
        if piece not in checked and not _is_seen(piece, wanted.count(piece), text):
            raise part.fault
        checked.add(piece)


def is_printed_by_python(messages: Iterable[Message], text: str) -> bool:
    """True where the text contains the arguments of a call as Python prints a dict, which is no JSON."""
    return any(
        (printed := str(arguments)) in text and printed != json.dumps(arguments, ensure_ascii=False)
        for message in messages
        for _, arguments in map(read_call, message.get("tool_calls", ()))
        if arguments
    )


def _leaves(value: object) -> Iterator[str]:
    """Keys, texts and integers of a call's arguments, as any notation writes them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _is_seen(piece: str, times: int, text: str) -> bool:
    """True where a text contains a piece `times` times: unchanged, escaped, or with other white space inside."""
    if text.count(piece) >= times:
        return True
    spellings = {piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1], html.escape(piece)}
    if sum(map(text.count, spellings)) >= times:
        return True
    return any(_unspaced(text).count(_unspaced(spelling)) >= times for spelling in spellings)


def _unspaced(text: str) -> str:
    return "".join(text.split())
