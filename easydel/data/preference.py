"""One row of data to one tokenised preference pair: the tree prompt -> {chosen, rejected}."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32

from .chat import ChatTemplate, Rendering
from .columns import RowOptions, is_token_ids, read_options, read_pair_columns, read_token_ids
from .faults import BadRow, RowFault, describe
from .messages import Message, is_message_list, normalise_messages
from .prompt import gather_prompt, split_shared_messages, split_shared_text
from .tokenise import Encoder, Encoding, Tokenizer

TRUNCATION_MODES = ("keep_end", "keep_start")

# A shorter beginning that answer and question share may be chance ("What is ..."); this much is a copy.
REPEATED_CHARACTERS = 32
REPEATED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One tokenised row; prompt ‖ chosen and prompt ‖ rejected are what the model reads.

    Attributes:
      prompt_ids, chosen_ids, rejected_ids: token ids, at least one each.
      chosen_loss_mask, rejected_loss_mask: which completion tokens are scored, at least one each.
      index: the row's place in the data, -1 when unknown.
      weight: the row's share in the loss.
      ref_chosen_logps, ref_rejected_logps: ready-made reference log-probs in nats, both or neither.
      prompt_truncated, chosen_truncated, rejected_truncated: tokens cut from each part.
    """

    prompt_ids: Int32[np.ndarray, " prompt"]
    chosen_ids: Int32[np.ndarray, " chosen"]
    rejected_ids: Int32[np.ndarray, " rejected"]
    chosen_loss_mask: Bool[np.ndarray, " chosen"]
    rejected_loss_mask: Bool[np.ndarray, " rejected"]
    index: int = -1
    weight: float = 1.0
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    prompt_truncated: int = 0
    chosen_truncated: int = 0
    rejected_truncated: int = 0


@dataclass(frozen=True, slots=True)
class _Parts:
    """The three runs of tokens of a row, before truncation."""

    prompt: Int32[np.ndarray, " prompt"]
    chosen: Int32[np.ndarray, " chosen"]
    rejected: Int32[np.ndarray, " rejected"]
    chosen_mask: Bool[np.ndarray, " chosen"]
    rejected_mask: Bool[np.ndarray, " rejected"]


@dataclass(frozen=True)
class PreferenceTransform:
    """Row to pair, as a pure callable: the same row gives the same pair on any thread.

    A row that cannot be used comes back as a `RowFault`, never as an exception.

    Args:
      tokenizer: a `transformers` fast tokenizer, or an object with the methods of `Tokenizer`.
      max_length: largest number of tokens of the prompt with either completion; None for no limit.
      max_prompt_length, max_completion_length: limits of the parts in tokens; None for no limit of their own.
      truncation_mode: which end of an over-long prompt survives. Completions lose their tail.
      tools, chat_template_kwargs: handed to the chat template; a row's own columns win.
    """

    tokenizer: Tokenizer
    max_length: int | None = 512
    max_prompt_length: int | None = 256
    max_completion_length: int | None = None
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    tools: list | None = None
    chat_template_kwargs: dict | None = None

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode={self.truncation_mode!r}, expected one of {TRUNCATION_MODES}.")
        for name, value, least in (
            ("max_length", self.max_length, 2),
            ("max_prompt_length", self.max_prompt_length, 1),
            ("max_completion_length", self.max_completion_length, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}, expected None for no limit or a number of tokens from {least} up.")

    def __call__(self, row: Mapping[str, Any], index: int = -1) -> PreferencePair | RowFault:
        """The row's pair, or what is wrong with the row."""
        try:
            options = read_options(_as_row(row), self.tools, self.chat_template_kwargs)
            return self._limit(self._tokenise(row, options), options, index)
        except BadRow as bad:
            return bad.at(index)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def _tokenise(self, row: Mapping[str, Any], options: RowOptions) -> _Parts:
        columns = read_pair_columns(row)
        if any(is_token_ids(value) for value in columns.values()):
            return self._from_token_ids(columns)
        for field, value in columns.items():
            if not (isinstance(value, str) or is_message_list(value) or (value is None and field == "prompt")):
                raise BadRow(
                    field, "wrong type", f'"{field}" is {describe(value)}, expected text, chat messages or token ids.'
                )
        if any(is_message_list(value) for value in columns.values()):
            return self._from_messages(columns, options)
        return self._from_text(**columns)

    def _from_token_ids(self, columns: Mapping[str, Any]) -> _Parts:
        if columns["prompt"] is None:
            raise BadRow("prompt", "missing value", 'token-id rows need a prompt: fill in "prompt" or "prompt_ids".')
        prompt, chosen, rejected = (read_token_ids(columns[field], field, self._encoder.size) for field in columns)
        if len(prompt) >= REPEATED_TOKENS:
            for field, ids in (("chosen", chosen), ("rejected", rejected)):
                if np.array_equal(ids[: len(prompt)], prompt):
                    raise _repeated(field)
        return _Parts(prompt, chosen, rejected, np.ones(len(chosen), bool), np.ones(len(rejected), bool))

    def _from_text(self, prompt: str | None, chosen: str, rejected: str) -> _Parts:
        for field, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise _empty_completion(field, f'"{field}" is {describe(text)}')
        if prompt is None:
            prompt, chosen, rejected = split_shared_text(chosen, rejected)
        if chosen == rejected:
            raise _equal()
        if not prompt.strip() and self._encoder.bos_id is None:
            raise BadRow("prompt", "empty prompt", '"prompt" is empty, and the tokenizer has no BOS token to stand for it.')
        start = prompt.strip()
        # One word may open an answer by chance; more than one is a copy.
        if len(start.split()) > 1:
            for field, text in (("chosen", chosen), ("rejected", rejected)):
                if text.lstrip().startswith(start):
                    raise _repeated(field)
        stops = frozenset() if self._encoder.eos_id is None else frozenset({self._encoder.eos_id})
        sides = [_plain(prompt, chosen), _plain(prompt, rejected)]
        return self._from_renderings(*sides, stops)

    def _from_messages(self, columns: Mapping[str, Any], options: RowOptions) -> _Parts:
        prompt, chosen, rejected = (_as_messages(columns[field], field) for field in columns)
        if chosen == rejected:
            raise _equal()
        if columns["prompt"] is None:
            prompt, chosen, rejected = split_shared_messages(chosen, rejected)
        else:
            prompt, chosen, rejected = gather_prompt(prompt, chosen, rejected)
        if not prompt:
            raise BadRow("prompt", "empty prompt", '"prompt" holds no messages. Give at least one, such as a user message.')
        chosen, rejected = _answers(chosen, "chosen"), _answers(rejected, "rejected")
        question = next((m["content"].strip() for m in reversed(prompt) if m["role"] == "user"), "")
        if len(question) >= REPEATED_CHARACTERS:
            for field, messages in (("chosen", chosen), ("rejected", rejected)):
                if messages[0]["content"].lstrip().startswith(question):
                    raise _repeated(field)
        template = ChatTemplate(self.tokenizer, options.tools, options.chat_template_kwargs)
        return self._from_renderings(
            *template.render_pair(prompt, chosen, rejected), frozenset(self._encoder.special_tokens)
        )

    def _from_renderings(self, chosen: Rendering, rejected: Rendering, stops: frozenset[int]) -> _Parts:
        """Both sides tokenised with their prompt; the prompt is the first tokens they share inside its text."""
        encodings = [self._encoder.encode(side.text) for side in (chosen, rejected)]
        bound = min(
            self._encoder.first_token_past(encoding, side.cut)
            for encoding, side in zip(encodings, (chosen, rejected), strict=True)
        )
        prompt_length = _common_prefix(encodings[0].ids[:bound], encodings[1].ids[:bound])
        prompt = np.array(encodings[0].ids[:prompt_length], np.int32)
        if prompt_length == 0:
            if self._encoder.bos_id is None:
                raise BadRow(
                    "prompt",
                    "empty prompt",
                    "no token lies wholly inside the prompt's text, and the tokenizer has no BOS token to stand for it.",
                )
            prompt = np.array([self._encoder.bos_id], np.int32)
        sides = [
            self._completion(encoding, side, prompt_length, stops, field)
            for encoding, side, field in zip(encodings, (chosen, rejected), ("chosen", "rejected"), strict=True)
        ]
        (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = sides
        return _Parts(prompt, chosen_ids, rejected_ids, chosen_mask, rejected_mask)

    def _completion(
        self, encoding: Encoding, side: Rendering, start: int, stops: frozenset[int], field: str
    ) -> tuple[Int32[np.ndarray, " completion"], Bool[np.ndarray, " completion"]]:
        """The tokens from `start` to the stop token, and which of them are scored."""
        mask = np.zeros(len(encoding.ids) + 1, bool)
        stop, last = None, len(encoding.ids)
        for number, (begin, end) in enumerate(side.answers):
            first = start if number == 0 else self._encoder.first_token_past(encoding, begin)
            last = len(encoding.ids) if end == len(side.text) else self._encoder.first_token_past(encoding, end)
            stop = self._encoder.stop_token(encoding, first, last, stops)
            words = last if stop is None else stop
            if all(encoding.is_blank(token) for token in range(self._encoder.first_token_past(encoding, begin), words)):
                raise _empty_completion(field, f'"{field}" is empty after the chat template')
            mask[first : words + 1 if stop is not None else last] = True
        ids = list(encoding.ids)
        if stop is not None:
            last = stop + 1
        else:
            if self._encoder.eos_id is None:
                raise BadRow(
                    "processing_class",
                    "unfit tokenizer",
                    "the tokenizer has no EOS token, so completions cannot end. Set tokenizer.eos_token = ...",
                    structural=True,
                )
            ids.append(self._encoder.eos_id)
            mask[last] = True
            last += 1
        return np.array(ids[start:last], np.int32), mask[start:last]

    def _limit(self, parts: _Parts, options: RowOptions, index: int) -> PreferencePair:
        """The pair cut to the limits: first the prompt, then each completion's tail."""
        prompt = self._truncate_prompt(parts.prompt)
        room = self.max_completion_length
        if self.max_length is not None:
            left = self.max_length - len(prompt)
            if left < 1:
                raise BadRow(
                    "prompt",
                    "prompt over the limit",
                    f'"prompt" is {len(prompt)} tokens, which leaves no room for a completion in '
                    f"max_length={self.max_length}. Raise max_length or lower max_prompt_length.",
                )
            room = left if room is None else min(room, left)
        chosen, rejected = parts.chosen[:room], parts.rejected[:room]
        chosen_mask, rejected_mask = parts.chosen_mask[:room], parts.rejected_mask[:room]
        for field, mask in (("chosen", chosen_mask), ("rejected", rejected_mask)):
            if not mask.any():
                raise BadRow(
                    field,
                    "completion truncated to nothing",
                    f'none of the {room} tokens left of "{field}" carries loss. Raise max_length or '
                    "max_completion_length, or lower max_prompt_length.",
                )
        if np.array_equal(chosen, rejected):
            cut = len(chosen) < max(len(parts.chosen), len(parts.rejected))
            raise _equal(f" in their first {room} tokens, and the rest is cut off by the limits" if cut else " as tokens")
        return PreferencePair(
            prompt_ids=prompt,
            chosen_ids=chosen,
            rejected_ids=rejected,
            chosen_loss_mask=chosen_mask,
            rejected_loss_mask=rejected_mask,
            index=index,
            weight=options.weight,
            ref_chosen_logps=options.ref_chosen_logps,
            ref_rejected_logps=options.ref_rejected_logps,
            prompt_truncated=len(parts.prompt) - len(prompt),
            chosen_truncated=len(parts.chosen) - len(chosen),
            rejected_truncated=len(parts.rejected) - len(rejected),
        )

    def _truncate_prompt(self, prompt: Int32[np.ndarray, " prompt"]) -> Int32[np.ndarray, " kept"]:
        limit = self.max_prompt_length
        if limit is None or len(prompt) <= limit:
            return prompt
        if self.truncation_mode == "keep_start":
            return prompt[:limit]
        if prompt[0] == self._encoder.bos_id:
            return np.concatenate([prompt[:1], prompt[len(prompt) - limit + 1 :]])
        return prompt[-limit:]


def _as_row(row: object) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise BadRow("row", "wrong type", f"the row is {describe(row)}, expected a mapping from column to value.")
    return row


def _plain(prompt: str, completion: str) -> Rendering:
    text = prompt + completion
    return Rendering(text, len(prompt), ((len(prompt), len(text)),))


def _as_messages(value: Any, field: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user" if field == "prompt" else "assistant", "content": value}]
    return [] if value is None else normalise_messages(value, field)


def _answers(completion: list[Message], field: str) -> list[Message]:
    """The completion up to its last answer; what follows carries no loss and changes nothing before it."""
    answers = [number for number, message in enumerate(completion) if message["role"] == "assistant"]
    if not answers:
        raise _empty_completion(field, f'"{field}" holds no assistant message')
    for number in answers:
        message = completion[number]
        if not message["content"].strip() and "tool_calls" not in message:
            raise _empty_completion(field, f'assistant message {number} of "{field}" is empty')
    return completion[: answers[-1] + 1]


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    differs = np.array(first[:length]) != np.array(second[:length])
    return int(differs.argmax()) if differs.any() else length


def _empty_completion(field: str, found: str) -> BadRow:
    return BadRow(field, "empty completion", f"{found}. Give the answer's text, or remove the row.")


def _equal(how: str = "") -> BadRow:
    return BadRow(
        "rejected",
        "chosen equals rejected",
        f'"chosen" and "rejected" are the same{how}, so there is no preference to learn. Remove the row.',
    )


def _repeated(field: str) -> BadRow:
    return BadRow(
        field,
        "prompt repeated in completion",
        f'"{field}" begins with the whole prompt, which would be read twice. Give only the answer as "{field}", or leave '
        'out "prompt" where both completions repeat it.',
    )
