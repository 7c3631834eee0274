"""Cut a tokenised row to its limits, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32

from easydel.data.faults import BadRow
from easydel.data.tree import PAIR_BRANCHES, PromptTree

TruncationMode = Literal["keep_end", "keep_start"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest numbers of tokens of prompt and completions; None for no limit.

    Attributes:
      length: of the prompt with any completion.
      prompt, completion: of each by itself.
      truncation_mode: the end of an over-long prompt that is kept. Completions lose their tail.

    Raises:
      ValueError: a limit or the mode is out of range.
    """

    length: int | None
    prompt: int | None
    completion: int | None
    truncation_mode: TruncationMode

    def __post_init__(self) -> None:
        if self.truncation_mode not in get_args(TruncationMode):
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r}, expected one of {', '.join(get_args(TruncationMode))}."
            )
        for name, value, least in (
            ("max_length", self.length, 2),
            ("max_prompt_length", self.prompt, 1),
            ("max_completion_length", self.completion, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}, expected a number of tokens from {least} up, or None for no limit.")


def truncate_tree(
    tree: PromptTree, limits: Limits, bos_id: int | None, names: Sequence[str] = PAIR_BRANCHES
) -> PromptTree:
    """Cut the prompt to its own limit, then each completion's tail to its own limit and to what the prompt leaves.

    A BOS that opens the prompt is kept.

    Args:
      tree: the tokenised row.
      limits: in tokens.
      bos_id: None where the tokenizer has none.
      names: the columns that a fault names, one for each branch.

    Raises:
      BadRow: "prompt over the limit", or "completion truncated to nothing" where no scored token is left.
    """
    prompt = _truncate_prompt(tree.prompt_ids, limits, bos_id)
    room = limits.completion
    if limits.length is not None:
        left = limits.length - len(prompt)
        if left < 1:
            raise BadRow(
                "prompt",
                "prompt over the limit",
                f'"prompt" alone is {len(prompt)} tokens, which leaves no room for a completion in '
                f"max_length={limits.length}. Raise max_length or lower max_prompt_length.",
            )
        room = left if room is None else min(room, left)
    for field, branch in zip(names, tree.branches, strict=True):
        if not branch.loss_mask[:room].any():
            raise BadRow(
                field,
                "completion truncated to nothing",
                f'none of the {room} tokens that are left of "{field}" carries loss. Raise max_length or '
                "max_completion_length, or lower max_prompt_length.",
            )
    if len(prompt) == len(tree.prompt_ids) and all(room is None or len(branch.ids) <= room for branch in tree.branches):
        return tree
    branches = tuple(
        replace(
            branch,
            ids=branch.ids[:room],
            loss_mask=branch.loss_mask[:room],
            truncated=len(branch.ids) - len(branch.ids[:room]),
        )
        for branch in tree.branches
    )
    return replace(tree, prompt_ids=prompt, branches=branches, prompt_truncated=len(tree.prompt_ids) - len(prompt))


def _truncate_prompt(
    prompt: Int32[np.ndarray, " prompt"], limits: Limits, bos_id: int | None
) -> Int32[np.ndarray, " kept"]:
    if limits.prompt is None or len(prompt) <= limits.prompt:
        return prompt
    if limits.truncation_mode == "keep_start":
        return prompt[: limits.prompt]
    cut = len(prompt) - limits.prompt
    if bos_id is not None and prompt[0] == bos_id:
        return np.concatenate([prompt[:1], prompt[cut + 1 :]])
    return prompt[cut:]
