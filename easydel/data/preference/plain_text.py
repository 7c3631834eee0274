"""Read a row of plain text: the prompt and each completion are joined exactly as given, without a template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.data.faults import BadRow, describe, empty_completion, empty_prompt
from easydel.data.preference.columns import (
    CONTEXT_COLUMNS,
    SYSTEM_COLUMNS,
    TEMPLATE_COLUMNS,
    Columns,
    missing_prompt,
)
from easydel.data.preference.json_values import is_given
from easydel.data.preference.shared_prompt import refuse_equal_text, refuse_repeated_text, split_shared_text
from easydel.data.preference.split import Answer, Rendering


def join_plain_text(columns: Columns, has_bos: bool) -> dict[str, Rendering]:
    """Join each completion to the prompt; without a prompt, the completions' shared first words are it.

    Args:
      columns: of a row whose prompt, chosen and rejected are text.
      has_bos: whether the tokenizer has a BOS token, which can stand for an empty prompt.

    Raises:
      BadRow: "empty completion", "empty prompt", "unused column", or a fault of the pair.

    Example:
      >>> from easydel.data.preference.columns import read_columns
      >>> row = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
      >>> sides = join_plain_text(read_columns(row, None, None), has_bos=False)
      >>> sides["chosen"].text, sides["chosen"].cut
      ('2 + 2 = 4', 8)
    """
    prompt, chosen, rejected = columns.values.values()
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise empty_completion(field, f'"{field}" is {describe(text)}')
    _refuse_context(columns.row, chosen if prompt is None else prompt)
    refuse_equal_text(chosen, rejected)
    if prompt is None:
        prompt, chosen, rejected = split_shared_text(chosen, rejected) or missing_prompt(columns.row, "words")
    elif not prompt.strip() and not has_bos:
        raise empty_prompt(f'"prompt" is {describe(prompt)}, and the tokenizer has no BOS token to stand for it')
    refuse_repeated_text(prompt, chosen, rejected)
    return {"chosen": _joined(prompt, chosen), "rejected": _joined(prompt, rejected)}


def _joined(prompt: str, completion: str) -> Rendering:
    text = prompt + completion
    return Rendering(text, len(prompt), (Answer(len(prompt), len(text)),))


def _refuse_context(row: Mapping[str, Any], read: str) -> None:
    """Raise `BadRow` for what only a chat template could put in front of plain text, which uses none.

    A system prompt that the text itself (`read`) contains is allowed.
    """
    for column in (*CONTEXT_COLUMNS, *TEMPLATE_COLUMNS):
        value = row.get(column)
        if not is_given(value):
            continue
        if column in SYSTEM_COLUMNS and isinstance(value, str) and value.strip() in read:
            continue
        raise BadRow(
            column,
            "unused column",
            f'"{column}" is {describe(value)}, but the row is plain text, for which no chat template is used. Give the '
            f"prompt as chat messages, or write it into the text and remove the column.",
        )
