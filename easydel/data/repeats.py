"""Rows that say the same thing twice: chosen equal to rejected, or a completion that begins with its own prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from .faults import BadRow
from .messages import Message

# An answer may open with a few of the question's words by chance; this much of it is a copy.
COPIED_WORDS = 2
COPIED_CHARACTERS = 32
COPIED_TOKENS = 8


def refuse_equal(chosen: object, rejected: object) -> None:
    """Raise `BadRow` when chosen and rejected are the same text or the same messages."""
    if chosen == rejected:
        raise equal_completions()


def equal_completions(how: str = "") -> BadRow:
    """The fault of a pair without a difference; `how` says where it got lost."""
    return BadRow(
        "rejected",
        "chosen equals rejected",
        f'"chosen" and "rejected" are the same{how}, so there is no preference to learn. Remove the row.',
    )


def refuse_repeated_text(prompt: str, **completions: str) -> None:
    """Raise `BadRow` when a completion's text begins with the whole prompt of two words or more."""
    start = prompt.strip()
    if len(start.split()) >= COPIED_WORDS:
        for field, text in completions.items():
            if text.lstrip().startswith(start):
                raise _repeated(field)


def refuse_repeated_messages(prompt: Sequence[Message], **completions: Sequence[Message]) -> None:
    """Raise `BadRow` when a completion's first answer begins with the whole last user message, a long one."""
    question = next((message["content"].strip() for message in reversed(prompt) if message["role"] == "user"), "")
    if len(question) >= COPIED_CHARACTERS:
        for field, messages in completions.items():
            if messages[0]["content"].lstrip().startswith(question):
                raise _repeated(field)


def refuse_repeated_tokens(prompt: Int32[np.ndarray, " prompt"], **completions: Int32[np.ndarray, " tokens"]) -> None:
    """Raise `BadRow` when a completion's tokens begin with the whole prompt, a long one."""
    if len(prompt) >= COPIED_TOKENS:
        for field, ids in completions.items():
            if np.array_equal(ids[: len(prompt)], prompt):
                raise _repeated(field)


def _repeated(field: str) -> BadRow:
    return BadRow(
        field,
        "prompt repeated in completion",
        f'"{field}" begins with the whole prompt, which the model would read twice. Give only the answer as "{field}", '
        'or leave out "prompt" where both completions repeat it.',
    )
