"""Rows that say the same thing twice: chosen equal to rejected, or a completion that begins with its own prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from easydel.data.faults import BadRow
from easydel.data.preference.messages import Message
from easydel.data.preference.shared_prompt import shared_messages

# An answer may open with a few of the question's words by chance; this much of it is a copy.
COPIED_WORDS = 2
COPIED_CHARACTERS = 32
COPIED_TOKENS = 8


def refuse_equal_text(chosen: str, rejected: str) -> None:
    """Raise `BadRow` when chosen and rejected differ in outer white space at most."""
    if chosen.strip() == rejected.strip():
        raise equal_completions()


def refuse_equal_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    """Raise `BadRow` when chosen and rejected are turns that say the same."""
    if len(chosen) == len(rejected) == shared_messages(chosen, rejected):
        raise equal_completions()


def equal_completions(how: str = "") -> BadRow:
    """The fault of a pair without a difference; `how` says where it got lost."""
    return BadRow(
        "rejected",
        "chosen equals rejected",
        f'"chosen" and "rejected" are the same{how}, so there is no preference to learn. Remove the row.',
    )


def refuse_repeated_text(prompt: str, chosen: str, rejected: str) -> None:
    """Raise `BadRow` when both completions' text begins with the whole prompt of two words or more.

    One completion alone may well begin by quoting the prompt; the same holds for messages and token ids.
    """
    start = prompt.strip()
    if len(start.split()) >= COPIED_WORDS and all(text.lstrip().startswith(start) for text in (chosen, rejected)):
        raise _repeated("chosen")


def refuse_repeated_messages(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    """Raise `BadRow` when both completions' first answer begins with the whole last user message, a long one."""
    question = next((message["content"].strip() for message in reversed(prompt) if message["role"] == "user"), "")
    answers = (messages[0]["content"].lstrip() for messages in (chosen, rejected))
    if len(question) >= COPIED_CHARACTERS and all(answer.startswith(question) for answer in answers):
        raise _repeated("chosen")


def refuse_repeated_tokens(
    prompt: Int32[np.ndarray, " prompt"],
    chosen: Int32[np.ndarray, " chosen"],
    rejected: Int32[np.ndarray, " rejected"],
) -> None:
    """Raise `BadRow` when both completions' tokens begin with the whole prompt, a long one."""
    begins = (np.array_equal(ids[: len(prompt)], prompt) for ids in (chosen, rejected))
    if len(prompt) >= COPIED_TOKENS and all(begins):
        raise _repeated("chosen")


def without_repeated_prefill(prefill: str, **completions: str) -> list[str]:
    """The completions without the words they go on from, where both repeat them.

    Raises:
      BadRow: "prompt repeated in completion" where only one does, and the words are enough to tell.
    """
    start = prefill.strip()
    begins = {field: text.lstrip().startswith(start) for field, text in completions.items()}
    if all(begins.values()):
        return [text.lstrip().removeprefix(start) for text in completions.values()]
    if len(start.split()) >= COPIED_WORDS:
        for field, repeats in begins.items():
            if repeats:
                raise _repeated(field)
    return list(completions.values())


def _repeated(field: str) -> BadRow:
    return BadRow(
        field,
        "prompt repeated in completion",
        f'"{field}" begins with the whole prompt, which the model would read twice. Give only the answer as "{field}", '
        'or leave out "prompt" where both completions repeat it.',
    )
