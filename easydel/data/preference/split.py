"""Split rendered conversations into tokens of the shared prompt and of each completion, and mark scored tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from easydel.data.faults import BadRow, empty_completion
from easydel.data.preference.tokenise import Encoder, Encoding
from easydel.data.tree import Branch, PromptTree


class Answer(NamedTuple):
    """Characters [start, end) that carry loss.

    Attributes:
      start, end: the characters.
      words: [start, end) of the message's own text, without what the template writes around it; None where that is not
        known, as for tool calls.
    """

    start: int
    end: int
    words: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Rendering:
    """A prompt with one of its completions as text.

    Attributes:
      text: prompt and completion together.
      cut: number of its first characters that are prompt.
      answers: characters that carry loss, in order; the last answer ends the text.
    """

    text: str
    cut: int
    answers: tuple[Answer, ...]


def split_renderings(encoder: Encoder, sides: Mapping[str, Rendering], stop_ids: frozenset[int]) -> PromptTree:
    """Tokenise each side as one text, and split it after the shared first tokens that lie inside the prompt's text.

    A token that straddles the end of the prompt belongs to the completion. The text that it covers then belongs to the
    completion on all sides, so that all completions are scored over the same characters.

    Args:
      encoder: the tokenizer.
      sides: column name -> prompt with one completion, as text.
      stop_ids: token ids that close an answer; EOS is added where the text ends in none of them.

    Raises:
      BadRow: "empty prompt", "empty completion", or "bad value" for text that no tokenizer can read.
    """
    encodings = encoder.encode({field: side.text for field, side in sides.items()})
    whole = [*zip(sides.items(), encodings, strict=True)]
    inside = min(encoder.first_token_past(encoding, side.cut) for (_, side), encoding in whole)
    first, *others = (encoding.ids[:inside] for encoding in encodings)
    shared = min((_common_prefix_length(first, other) for other in others), default=len(first))
    branches = tuple(_completion(encoder, encoding, side, shared, stop_ids, field) for (field, side), encoding in whole)
    return PromptTree(np.array(first[:shared] or _bos_alone(encoder), np.int32), branches)


def _bos_alone(encoder: Encoder) -> list[int]:
    if encoder.bos_id is None:
        raise BadRow(
            "prompt",
            "empty prompt",
            '"prompt" is empty: no token lies wholly inside it, and the tokenizer has no BOS token to stand for it. '
            "Give the prompt some text.",
        )
    return [encoder.bos_id]


def _completion(
    encoder: Encoder, encoding: Encoding, side: Rendering, start: int, stop_ids: frozenset[int], field: str
) -> Branch:
    """The tokens from `start` to the stop token, with their loss mask."""
    scored = np.zeros(len(encoding.ids) + 1, bool)
    for number, (begin, end, words) in enumerate(side.answers):
        first = encoder.first_token_past(encoding, begin)
        last = len(encoding.ids) if end == len(side.text) else encoder.first_token_past(encoding, end)
        stop = encoder.stop_token(encoding, first, last, stop_ids, words)
        if all(encoding.is_blank(token) for token in range(first, last if stop is None else stop)):
            raise empty_completion(field, f'"{field}" is empty after the chat template')
        last = last if stop is None else stop + 1
        scored[start if number == 0 else first : last] = True
    # Cut by position, not by id: a stop token inside the text, or a pad token with the same id, changes nothing.
    ids = encoding.ids[start:last]
    if stop is None:
        ids.append(_eos(encoder))
        scored[last] = True
    return Branch(np.array(ids, np.int32), scored[start : start + len(ids)])


def _eos(encoder: Encoder) -> int:
    if encoder.eos_id is None:
        raise BadRow(
            "processing_class",
            "unfit tokenizer",
            "the tokenizer has no EOS token, so a completion cannot end. Set tokenizer.eos_token = ...",
            structural=True,
        )
    return encoder.eos_id


def _common_prefix_length(first: list[int], second: list[int]) -> int:
    if first == second:
        return len(first)
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
