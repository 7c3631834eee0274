"""One row of data to one tokenised preference pair: the tree prompt -> {chosen, rejected}."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from easydel.data.faults import BadRow, RowFault, describe, empty_completion
from easydel.data.preference.chat import Answer, ChatTemplate, Rendering
from easydel.data.preference.chat_renderer import ChatRenderer
from easydel.data.preference.columns import (
    RowOptions,
    is_token_ids,
    missing_prompt,
    read_options,
    read_pair_columns,
    read_token_ids,
)
from easydel.data.preference.context import read_context, refuse_context_of_text, refuse_media, refuse_other_names
from easydel.data.preference.message_text import read_message_text
from easydel.data.preference.messages import Message, is_message_list, normalise_messages
from easydel.data.preference.repeats import (
    equal_completions,
    refuse_equal_messages,
    refuse_equal_text,
    refuse_repeated_messages,
    refuse_repeated_text,
    refuse_repeated_tokens,
    without_repeated_prefill,
)
from easydel.data.preference.shared_prompt import gather_prompt, split_shared_messages, split_shared_text
from easydel.data.preference.split import PairTokens, split_renderings
from easydel.data.preference.tokenise import Encoder, Tokenizer
from easydel.data.preference.truncate import Limits, TruncationMode, truncate_pair
from easydel.data.preference.unseen_parts import parts_of_context
from easydel.data.tree import PreferencePair


@dataclass(frozen=True)
class PreferenceTransform:
    """Row to pair, as a pure callable: the same row gives the same pair on any thread.

    A row holds prompt, chosen and rejected as text, as chat messages (or a mix of the two), or as token ids; which,
    is decided row by row. A row that cannot be used comes back as a `RowFault`, never as an exception.

    Args:
      tokenizer: a `transformers` fast tokenizer, or an object with the methods of `Tokenizer`.
      max_length: largest number of tokens of the prompt with either completion; None for no limit.
      max_prompt_length, max_completion_length: limits of the parts in tokens; None for no limit of their own.
      truncation_mode: which end of an over-long prompt survives. Completions lose their tail.
      tools, chat_template_kwargs: handed to the chat template; a row's own columns win.
      now: the time that a chat template which shows the date is told, for every row; by default, that of making this.
    """

    tokenizer: Tokenizer
    max_length: int | None = 512
    max_prompt_length: int | None = 256
    max_completion_length: int | None = None
    truncation_mode: TruncationMode = "keep_end"
    tools: list | None = None
    chat_template_kwargs: dict | None = None
    now: datetime.datetime = dataclasses.field(default_factory=lambda: datetime.datetime.now(), compare=False)

    def __post_init__(self) -> None:
        self._limits  # noqa: B018  a limit out of range is refused here, not at the first row

    def __call__(self, row: Mapping[str, Any], index: int = -1) -> PreferencePair | RowFault:
        """The row's pair, or what is wrong with the row."""
        try:
            return self._pair(row, index)
        except BadRow as bad:
            return bad.at(index)

    # What is the same for every row; a race between threads only works it out twice.
    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self.now)

    @cached_property
    def _limits(self) -> Limits:
        return Limits(self.max_length, self.max_prompt_length, self.max_completion_length, self.truncation_mode)

    def _pair(self, row: Mapping[str, Any], index: int) -> PreferencePair:
        if not isinstance(row, Mapping):
            raise BadRow("row", "wrong type", f"the row is {describe(row)}, expected a mapping from column to value.")
        options = read_options(row, self.tools, self.chat_template_kwargs)
        whole = self._tokenise(row, options)
        kept = truncate_pair(whole, self._limits, self._encoder.bos_id)
        if np.array_equal(kept.chosen, kept.rejected):
            cut = not np.array_equal(whole.chosen, whole.rejected)
            raise equal_completions(" up to where the length limits cut them" if cut else " once tokenised")
        return PreferencePair(
            prompt_ids=kept.prompt,
            chosen_ids=kept.chosen,
            rejected_ids=kept.rejected,
            chosen_loss_mask=kept.chosen_mask,
            rejected_loss_mask=kept.rejected_mask,
            index=index,
            weight=options.weight,
            ref_chosen_logps=options.ref_chosen_logps,
            ref_rejected_logps=options.ref_rejected_logps,
            prompt_truncated=len(whole.prompt) - len(kept.prompt),
            chosen_truncated=len(whole.chosen) - len(kept.chosen),
            rejected_truncated=len(whole.rejected) - len(kept.rejected),
        )

    def _tokenise(self, row: Mapping[str, Any], options: RowOptions) -> PairTokens:
        refuse_media(row)
        refuse_other_names(row)
        columns = read_pair_columns(row)
        if any(is_token_ids(value) for value in columns.values()):
            return self._from_token_ids(columns)
        messages = {field: _read_messages(value, field) for field, value in columns.items()}
        for field, value in columns.items():
            if messages[field] is None and not (isinstance(value, str) or (value is None and field == "prompt")):
                raise BadRow(
                    field, "wrong type", f'"{field}" is {describe(value)}, expected text, chat messages or token ids.'
                )
        _refuse_one_in_text(columns, messages)
        if any(value is not None for value in messages.values()):
            return self._from_messages(row, columns, messages, options)
        return self._from_text(row, **columns)

    def _from_token_ids(self, columns: Mapping[str, Any]) -> PairTokens:
        prompt, chosen, rejected = (read_token_ids(columns[field], field, self._encoder.size) for field in columns)
        refuse_repeated_tokens(prompt, chosen, rejected)
        return PairTokens(prompt, chosen, rejected, np.ones(len(chosen), bool), np.ones(len(rejected), bool))

    def _from_text(self, row: Mapping[str, Any], prompt: str | None, chosen: str, rejected: str) -> PairTokens:
        """Plain text: the prompt and a completion are joined exactly as given, without a template."""
        for field, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise empty_completion(field, f'"{field}" is {describe(text)}')
        refuse_context_of_text(row, chosen if prompt is None else prompt)
        refuse_equal_text(chosen, rejected)
        if prompt is None:
            prompt, chosen, rejected = split_shared_text(chosen, rejected) or missing_prompt(row, "words")
        elif not prompt.strip() and self._encoder.bos_id is None:
            raise _empty_prompt(f'"prompt" is {describe(prompt)}, and the tokenizer has no BOS token to stand for it')
        refuse_repeated_text(prompt, chosen, rejected)
        stop_ids = frozenset() if self._encoder.eos_id is None else frozenset({self._encoder.eos_id})
        return split_renderings(self._encoder, _joined(prompt, chosen), _joined(prompt, rejected), stop_ids)

    def _from_messages(
        self,
        row: Mapping[str, Any],
        columns: Mapping[str, Any],
        messages: Mapping[str, list[Message] | None],
        options: RowOptions,
    ) -> PairTokens:
        """Chat: text stands for one message, and everything goes through the chat template."""
        context = read_context(row)
        chosen = _as_messages(columns["chosen"], messages["chosen"], "assistant")
        rejected = _as_messages(columns["rejected"], messages["rejected"], "assistant")
        refuse_equal_messages(chosen, rejected)
        prompt, chosen, rejected = self._split(row, columns["prompt"], messages["prompt"], chosen, rejected)
        chosen, rejected = _up_to_last_answer(chosen, "chosen"), _up_to_last_answer(rejected, "rejected")
        refuse_equal_messages(chosen, rejected)
        prompt = context.before(prompt)
        prompt, prefill, chosen, rejected = _split_prefill(prompt, chosen, rejected)
        refuse_repeated_messages(prompt, chosen, rejected)
        special_tokens = self._encoder.special_tokens
        documents = {} if context.documents is None else {"documents": context.documents}
        renderer = self._renderer.for_row(options.tools, {**options.chat_template_kwargs, **documents})
        template = ChatTemplate(
            self.tokenizer, special_tokens, renderer, parts_of_context(options.own_tools, context.documents or ())
        )
        return split_renderings(
            self._encoder, *template.render_pair(prompt, chosen, rejected, prefill), frozenset(special_tokens)
        )

    def _split(
        self,
        row: Mapping[str, Any],
        given: object,
        messages: list[Message] | None,
        chosen: list[Message],
        rejected: list[Message],
    ) -> tuple[list[Message], list[Message], list[Message]]:
        """Prompt, chosen and rejected, each turn once; an empty prompt is one that the completions share."""
        prompt = [] if given is None else _as_messages(given, messages, "user")
        if any(message["content"].strip() or "tool_calls" in message for message in prompt):
            return gather_prompt(prompt, chosen, rejected)
        shared = split_shared_messages(chosen, rejected)
        if shared is None and given is not None:
            raise _empty_prompt('"prompt" has no messages with text in them')
        return shared or missing_prompt(row, "messages")


def _joined(prompt: str, completion: str) -> Rendering:
    text = prompt + completion
    return Rendering(text, len(prompt), (Answer(len(prompt), len(text)),))


def _read_messages(value: Any, field: str) -> list[Message] | None:
    """The messages of a column, also where it holds them as JSON text; None where it holds something else."""
    if is_message_list(value):
        return normalise_messages(value, field)
    if isinstance(value, str) and (found := read_message_text(value, field)) is not None:
        return normalise_messages(found, field, nulls_are_own=True)
    return None


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


def _split_prefill(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], str, list[Message], list[Message]]:
    """A prompt that ends in an assistant turn, without that turn, its text, and completions that hold it in front.

    Raises:
      BadRow: "wrong type" where the completions cannot go on with that turn.
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
    """The completion without the turns behind its last answer: they carry no loss and change nothing before them."""
    answers = [number for number, message in enumerate(completion) if message["role"] == "assistant"]
    if not answers:
        raise empty_completion(field, f'"{field}" holds no assistant message')
    for number in answers:
        if not completion[number]["content"].strip() and "tool_calls" not in completion[number]:
            raise empty_completion(field, f'"{field}" holds an empty assistant message')
    return completion[: answers[-1] + 1]


def _empty_prompt(found: str) -> BadRow:
    return BadRow("prompt", "empty prompt", f"{found}. Give a prompt, or remove the row.")
