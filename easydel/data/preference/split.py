"""Two rendered sides to token ids: which are the shared prompt, which are scored, and where each side stops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from easydel.data.faults import BadRow, empty_completion
from easydel.data.preference.chat import Rendering
from easydel.data.preference.tokenise import Encoder, Encoding


@dataclass(frozen=True, slots=True)
class PairTokens:
    """The three runs of tokens of a row, whole, and which completion tokens are scored."""

    prompt: Int32[np.ndarray, " prompt"]
    chosen: Int32[np.ndarray, " chosen"]
    rejected: Int32[np.ndarray, " rejected"]
    chosen_mask: Bool[np.ndarray, " chosen"]
    rejected_mask: Bool[np.ndarray, " rejected"]


def split_renderings(encoder: Encoder, chosen: Rendering, rejected: Rendering, stop_ids: frozenset[int]) -> PairTokens:
    """Each side tokenised as one text; the prompt is the first tokens they share that lie inside the prompt's text.

    A token that straddles the end of the prompt belongs to the completion, and so does, on the other side, the text
    it covers: both completions are scored over the same characters.

    Args:
      encoder: the tokenizer.
      chosen, rejected: prompt and completion as text.
      stop_ids: the token ids that close an answer; EOS is added where the text ends in none of them.

    Raises:
      BadRow: "empty prompt", "empty completion", or "bad value" for text that no tokenizer can read.
    """
    ours, theirs = encoder.encode({"chosen": chosen.text, "rejected": rejected.text})
    inside = min(encoder.first_token_past(ours, chosen.cut), encoder.first_token_past(theirs, rejected.cut))
    shared = _common_prefix_length(ours.ids[:inside], theirs.ids[:inside])
    chosen_ids, chosen_mask = _completion(encoder, ours, chosen, shared, stop_ids, "chosen")
    rejected_ids, rejected_mask = _completion(encoder, theirs, rejected, shared, stop_ids, "rejected")
    prompt = np.array(ours.ids[:shared] or _bos_alone(encoder), np.int32)
    return PairTokens(prompt, chosen_ids, rejected_ids, chosen_mask, rejected_mask)


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
) -> tuple[Int32[np.ndarray, " completion"], Bool[np.ndarray, " completion"]]:
    """The tokens from `start` to the stop token, and which of them are scored."""
    scored = np.zeros(len(encoding.ids) + 1, bool)
    for number, (begin, end, words) in enumerate(side.answers):
        first = encoder.first_token_past(encoding, begin)
        last = len(encoding.ids) if end == len(side.text) else encoder.first_token_past(encoding, end)
        stop = encoder.stop_token(encoding, first, last, stop_ids, words)
        if all(encoding.is_blank(token) for token in range(first, last if stop is None else stop)):
            raise empty_completion(field, f'"{field}" is empty after the chat template')
        last = last if stop is None else stop + 1
        scored[start if number == 0 else first : last] = True
    # Position, not id: a stop token inside the text, or a pad token with the same id, changes nothing here.
    ids = encoding.ids[start:last]
    if stop is None:
        ids.append(_eos(encoder))
        scored[last] = True
    return np.array(ids, np.int32), scored[start : start + len(ids)]


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
