"""Find the prompt that chosen and rejected share, remove it from both, and refuse rows that repeat themselves.

Turns are compared by their content (`what_is_said`), never by their bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from easydel.data.faults import BadRow
from easydel.data.preference.messages import SYSTEM_ROLES, Message, begins_with, what_is_said

# An answer may begin with a few of the question's words by chance; a repetition this long is a copy.
COPIED_WORDS = 2
COPIED_CHARACTERS = 32
COPIED_TOKENS = 8


def common_prefix_length(first: str, second: str) -> int:
    """Number of first characters that two texts share, by bisection: each step is one fast comparison."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def split_shared_text(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """The shared beginning as prompt, and the rest of chosen and of rejected; None where they share no whole word.

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
    """The longest shared run of first messages after which both answer, and the rest of chosen and of rejected.

    None where there is no such run.
    """
    shared = shared_messages(chosen, rejected)
    for cut in range(min(shared, len(chosen) - 1, len(rejected) - 1), 0, -1):
        if chosen[cut]["role"] == rejected[cut]["role"] == "assistant":
            return list(chosen[:cut]), list(chosen[cut:]), list(rejected[cut:])
    return None


def gather_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Remove a given prompt from chosen and rejected where they repeat it, and move their shared first turns into it.

    Data sets give chosen as the answer alone, as the whole conversation, or as the whole conversation with more
    before it (a system message, earlier turns) than `prompt` holds; all three give the same result.

    Returns:
      Prompt, chosen and rejected.

    Raises:
      BadRow: "no shared prompt", when chosen and rejected answer different turns, or turns that are not the prompt's.
    """
    system, prompt, chosen, rejected = _one_system_message(prompt, chosen, rejected)
    given = len(chosen)
    prompt, chosen, rejected = _without_repeated_prompt(prompt, chosen, rejected)
    shared = shared_messages(chosen, rejected)
    turns = 0
    while turns < shared and chosen[turns]["role"] != "assistant":
        turns += 1
    if turns and prompt and len(chosen) == given and not _may_follow(chosen[0], prompt[-1]):
        raise BadRow(
            "prompt",
            "no shared prompt",
            f'"prompt" ends in a {prompt[-1]["role"]} message, and "chosen" and "rejected" open with a '
            f"{chosen[0]['role']} message that is not it. Give both completions without the prompt, or with exactly "
            "its turns in front.",
        )
    prompt, chosen, rejected = prompt + chosen[:turns], chosen[turns:], rejected[turns:]
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages and messages[0]["role"] != "assistant":
            raise BadRow(
                field,
                "no shared prompt",
                f'"{field}" continues with a {messages[0]["role"]} message that the other completion or the prompt '
                "lacks; a pair is two answers to one prompt. Give both the same turns before their first answer.",
            )
    return system + prompt, chosen, rejected


def shared_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Number of first turns that two conversations share."""
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if what_is_said(ours) != what_is_said(theirs):
            break
        shared += 1
    return shared


def refuse_equal_text(chosen: str, rejected: str) -> None:
    """Raise `BadRow` when chosen and rejected differ in outer white space at most."""
    if chosen.strip() == rejected.strip():
        raise equal_completions()


def refuse_equal_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    """Raise `BadRow` when chosen and rejected have the same turns."""
    if len(chosen) == len(rejected) == shared_messages(chosen, rejected):
        raise equal_completions()


def equal_completions(how: str = "") -> BadRow:
    """The fault of a pair whose completions are equal; `how` says what made them equal."""
    return BadRow(
        "rejected",
        "chosen equals rejected",
        f'"chosen" and "rejected" are the same{how}, so there is no preference to learn. Remove the row.',
    )


def refuse_repeated_text(prompt: str, chosen: str, rejected: str) -> None:
    """Raise `BadRow` when both completions' text begins with the whole prompt of two words or more.

    A single completion may begin by quoting the prompt; the same holds for messages and token ids.
    """
    start = prompt.strip()
    if len(start.split()) >= COPIED_WORDS and all(text.lstrip().startswith(start) for text in (chosen, rejected)):
        raise _repeated("chosen")


def refuse_repeated_messages(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    """Raise `BadRow` when both first answers begin with the whole last user message, of `COPIED_CHARACTERS` or more."""
    question = next((message["content"].strip() for message in reversed(prompt) if message["role"] == "user"), "")
    answers = (messages[0]["content"].lstrip() for messages in (chosen, rejected))
    if len(question) >= COPIED_CHARACTERS and all(answer.startswith(question) for answer in answers):
        raise _repeated("chosen")


def refuse_repeated_tokens(
    prompt: Int32[np.ndarray, " prompt"],
    chosen: Int32[np.ndarray, " chosen"],
    rejected: Int32[np.ndarray, " rejected"],
) -> None:
    """Raise `BadRow` when both completions begin with the whole prompt, of `COPIED_TOKENS` or more."""
    begins = (np.array_equal(ids[: len(prompt)], prompt) for ids in (chosen, rejected))
    if len(prompt) >= COPIED_TOKENS and all(begins):
        raise _repeated("chosen")


def without_repeated_prefill(prefill: str, **completions: str) -> list[str]:
    """The completions' texts without the prefill, where both repeat it.

    Raises:
      BadRow: "prompt repeated in completion" where only one repeats it, and it has at least `COPIED_WORDS` words.
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


def _may_follow(message: Message, before: Message) -> bool:
    """True where a turn can follow another: two user turns in a row would be one turn in two spellings."""
    return message["role"] != "system" and (before["role"] != "user" or message["role"] != "user")


def _one_system_message(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message], list[Message]]:
    """The system messages that open any of the three, and the three without them.

    Raises:
      BadRow: "no shared prompt" where they differ, or only one completion has them.
    """
    given = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    systems = {field: _opening_system(messages) for field, messages in given.items()}
    rest = {field: messages[len(systems[field]) :] for field, messages in given.items()}
    found = [(field, system) for field, system in systems.items() if system]
    for field, system in found:
        if [*map(_text, system)] != [*map(_text, found[0][1])]:
            raise BadRow(
                field,
                "no shared prompt",
                f'"{field}" opens with another system message than "{found[0][0]}"; a pair is two answers to one '
                "prompt. Give both the same one.",
            )
    for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
        lacks = rest[other] and not systems[other] and rest[other][0]["role"] != "assistant"
        if systems[one] and lacks and not systems["prompt"]:
            raise BadRow(
                other,
                "no shared prompt",
                f'"{one}" opens with a system message that "{other}" and the prompt lack; a pair is two answers to one '
                "prompt. Give both the same one.",
            )
    return (found[0][1] if found else []), rest["prompt"], rest["chosen"], rest["rejected"]


def _opening_system(messages: list[Message]) -> list[Message]:
    turns = 0
    while turns < len(messages) and messages[turns]["role"] in SYSTEM_ROLES:
        turns += 1
    return messages[:turns]


def _text(message: Message) -> str:
    return message["content"].strip()


def _without_repeated_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    said = [what_is_said(message) for message in prompt]
    if prompt and prompt[-1]["role"] == "assistant" and chosen and chosen[0]["role"] != "assistant":
        # The answers continue this turn: whole conversations contain it as the beginning of their answer.
        sides, earlier = (chosen, rejected), said[:-1]
        if not all(begins_with(side, said) for side in sides) and all(begins_with(side, earlier) for side in sides):
            return prompt, chosen[len(earlier) :], rejected[len(earlier) :]
    if prompt and chosen and chosen[0]["role"] != "assistant":
        for cut in range(shared_messages(chosen, rejected), len(prompt) - 1, -1):
            if begins_with(chosen[cut - len(prompt) :], said):
                return chosen[:cut], chosen[cut:], rejected[cut:]
    return prompt, _without_start(chosen, said), _without_start(rejected, said)


def _without_start(messages: list[Message], said: list[tuple[object, ...]]) -> list[Message]:
    return messages[len(said) :] if begins_with(messages, said) else messages


def _repeated(field: str) -> BadRow:
    return BadRow(
        field,
        "prompt repeated in completion",
        f'"{field}" begins with the whole prompt, which the model would read twice. Give only the answer as "{field}", '
        'or leave out "prompt" where both completions repeat it.',
    )
