"""Turn one row of data into one tokenised preference pair, step by step.

Read in this order: `columns` (what the row holds), `conversation` or `plain_text` (prompt and completions), then
`chat_template` (messages as text), `split` (text as tokens, by `tokenise`), and `truncate`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from easydel.data.faults import BadRow, RowFault
from easydel.data.preference.chat_template import ChatTemplate
from easydel.data.preference.columns import Columns, read_columns
from easydel.data.preference.conversation import Conversation, read_conversation
from easydel.data.preference.plain_text import join_plain_text
from easydel.data.preference.shared_prompt import equal_completions, refuse_repeated_tokens
from easydel.data.preference.split import split_renderings
from easydel.data.preference.template_check import parts_of_context
from easydel.data.preference.template_renderer import TemplateRenderer
from easydel.data.preference.tokenise import Encoder, Tokenizer, is_token_ids, read_token_ids
from easydel.data.preference.truncate import Limits, TruncationMode, truncate_tree
from easydel.data.tree import Branch, PreferencePair, PromptTree

# A row and its index -> the pair it becomes, or the fault that prevents it.
Transform: TypeAlias = Callable[[Any, int], PreferencePair | RowFault]


@dataclass(frozen=True)
class PreferenceTransform:
    """Turn a row into a pair, as a pure callable: the same row gives the same pair on any thread.

    A row holds prompt, chosen and rejected as text, as chat messages (or a mix of the two), or as token ids; rows of
    one data set may differ. A row that cannot be used gives a `RowFault`, never an exception.

    Args:
      tokenizer: a `transformers` fast tokenizer, or an object with the methods of `Tokenizer`.
      max_length: largest number of tokens of the prompt with either completion; None for no limit.
      max_prompt_length, max_completion_length: limits of each by itself, in tokens; None for no limit.
      truncation_mode: the end of an over-long prompt that is kept. Completions lose their tail.
      tools, chat_template_kwargs: handed to the chat template; a row's own columns win.
      reads_margin: True reads a column "margin" in every row, for an objective.
      now: the time given to a chat template that shows the date, the same for every row; by default, the current one.

    Raises:
      ValueError: a limit is out of range.

    Example:
      >>> transform = PreferenceTransform(tokenizer, max_completion_length=10)
      >>> pair = transform(rows[0])
      >>> tokenizer.decode(pair.chosen_ids), pair.chosen_truncated
      ('please, te', 11)
      >>> transform({"prompt": "tell me", "chosen": "", "rejected": "no"}).reason
      'empty completion'
    """

    tokenizer: Tokenizer
    max_length: int | None = 512
    max_prompt_length: int | None = 256
    max_completion_length: int | None = None
    truncation_mode: TruncationMode = "keep_end"
    tools: list | None = None
    chat_template_kwargs: dict | None = None
    reads_margin: bool = False
    now: datetime.datetime = dataclasses.field(default_factory=lambda: datetime.datetime.now(), compare=False)

    def __post_init__(self) -> None:
        self._limits  # noqa: B018  refuse a limit out of range here, not at the first row

    def __call__(self, row: Mapping[str, Any], index: int = -1) -> PreferencePair | RowFault:
        """The row's pair, or what is wrong with the row."""
        try:
            return self._pair(row, index)
        except BadRow as bad:
            return bad.at(index)

    # Computed once for all rows; in a race between threads, twice.
    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def _renderer(self) -> TemplateRenderer:
        return TemplateRenderer(self.tokenizer, self.now)

    @cached_property
    def _limits(self) -> Limits:
        return Limits(self.max_length, self.max_prompt_length, self.max_completion_length, self.truncation_mode)

    def _pair(self, row: Mapping[str, Any], index: int) -> PreferencePair:
        columns = read_columns(row, self.tools, self.chat_template_kwargs, reads_margin=self.reads_margin)
        whole = self._tokenise(columns)
        kept = truncate_tree(whole, self._limits, self._encoder.bos_id)
        chosen, rejected = kept.branches
        if _has_equal_branches(kept):
            is_cut = not _has_equal_branches(whole)
            raise equal_completions(" up to where the length limits cut them" if is_cut else " once tokenised")
        return PreferencePair(
            prompt_ids=kept.prompt_ids,
            chosen_ids=chosen.ids,
            rejected_ids=rejected.ids,
            chosen_loss_mask=chosen.loss_mask,
            rejected_loss_mask=rejected.loss_mask,
            index=index,
            prompt_truncated=kept.prompt_truncated,
            chosen_truncated=chosen.truncated,
            rejected_truncated=rejected.truncated,
            **columns.numbers,
        )

    def _tokenise(self, columns: Columns) -> PromptTree:
        encoder = self._encoder
        if any(is_token_ids(value) for value in columns.values.values()):
            ids = [read_token_ids(value, field, encoder.size) for field, value in columns.values.items()]
            refuse_repeated_tokens(*ids)
            prompt, *completions = ids
            return PromptTree(prompt, tuple(Branch(tokens, np.ones(len(tokens), bool)) for tokens in completions))
        conversation = read_conversation(columns)
        if conversation is None:
            stop_ids = frozenset() if encoder.eos_id is None else frozenset({encoder.eos_id})
            return split_renderings(encoder, join_plain_text(columns, encoder.bos_id is not None), stop_ids)
        sides = self._template(columns, conversation).render_sides(
            conversation.prompt,
            {"chosen": conversation.chosen, "rejected": conversation.rejected},
            conversation.prefill,
        )
        return split_renderings(encoder, sides, frozenset(encoder.special_tokens))

    def _template(self, columns: Columns, conversation: Conversation) -> ChatTemplate:
        """The chat template with the variables that it gets for a row beside the messages."""
        documents = conversation.documents
        own = {} if documents is None else {"documents": documents}
        return ChatTemplate(
            self.tokenizer,
            self._encoder.special_tokens,
            self._renderer.for_row(columns.tools, {**columns.chat_template_kwargs, **own}),
            parts_of_context(columns.own_tools, documents or ()),
        )


def _has_equal_branches(tree: PromptTree) -> bool:
    chosen, rejected = tree.branches
    return np.array_equal(chosen.ids, rejected.ids)
