"""Finding the prompt that chosen and rejected share, when it is not given or is given twice."""

from __future__ import annotations

from collections.abc import Sequence

from .faults import BadRow
from .messages import Message


def common_prefix_length(first: str, second: str) -> int:
    """How many characters two texts share from the start; bisection, so that each step is one fast comparison."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def split_shared_text(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """The shared beginning as prompt, and what is left of chosen and rejected; None when they share no whole word.

    The cut falls before white space in both texts, so no word is split and the white space opens the completions.
    """
    for cut in range(common_prefix_length(chosen, rejected), 0, -1):
        both_at_space = chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace()
        if both_at_space and not chosen[cut - 1].isspace() and chosen[cut:].strip() and rejected[cut:].strip():
            return chosen[:cut], chosen[cut:], rejected[cut:]
    return None


def split_shared_messages(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]] | None:
    """The longest shared run of first messages after which both answer, and what is left of chosen and rejected.

    None when there is none.
    """
    shared = shared_messages(chosen, rejected)
    for cut in range(min(shared, len(chosen) - 1, len(rejected) - 1), 0, -1):
        if chosen[cut]["role"] == rejected[cut]["role"] == "assistant":
            return list(chosen[:cut]), list(chosen[cut:]), list(rejected[cut:])
    return None


def gather_prompt(
    prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """A given prompt once, where chosen and rejected repeat it, with every turn they share before their first answer.

    Data sets give chosen as the answer alone, as the whole conversation, or as the whole conversation with more
    before it (a system message, earlier turns) than `prompt` holds; all three come out alike.

    Raises:
      BadRow: "no shared prompt", when chosen and rejected answer different turns.
    """
    prompt, chosen, rejected = _without_repeated_prompt(list(prompt), list(chosen), list(rejected))
    shared = shared_messages(chosen, rejected)
    turns = 0
    while turns < shared and chosen[turns]["role"] != "assistant":
        turns += 1
    prompt, chosen, rejected = prompt + chosen[:turns], chosen[turns:], rejected[turns:]
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages and messages[0]["role"] != "assistant":
            raise BadRow(
                field,
                "no shared prompt",
                f'"{field}" goes on with a {messages[0]["role"]} message that the other completion lacks; '
                "a pair is two answers to one prompt. Give both the same turns before their first answer.",
            )
    return prompt, chosen, rejected


def _without_repeated_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    if prompt and chosen and chosen[0]["role"] != "assistant":
        for cut in range(shared_messages(chosen, rejected), len(prompt) - 1, -1):
            if chosen[cut - len(prompt) : cut] == prompt:
                return chosen[:cut], chosen[cut:], rejected[cut:]
    return prompt, _without_start(chosen, prompt), _without_start(rejected, prompt)


def shared_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many messages two conversations share from the start."""
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        shared += 1
    return shared


def _without_start(messages: list[Message], start: list[Message]) -> list[Message]:
    return messages[len(start) :] if messages[: len(start)] == start else messages
