"""Lay one tree out as tokens in a row: positions, branches, and the target that each token predicts."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from easydel.data.tree import PromptTree

PROMPT = 0  # branch id of a prompt's tokens; those of the completions count from 1


@dataclasses.dataclass(frozen=True, slots=True)
class TreeLayout:
    """One tree as it lies in a row, in the arrays of `pack_trees`, with slots counted from the tree's first token."""

    input_ids: Int[np.ndarray, " length"]
    position_ids: Int[np.ndarray, " length"]
    sequence_ids: Int[np.ndarray, " length"]  # all 0, or the completion's number where each has its own prompt
    branch_ids: Int[np.ndarray, " length"]
    target_positions: Int[np.ndarray, " targets"]
    target_ids: Int[np.ndarray, " targets"]
    target_branches: Int[np.ndarray, " targets"]  # the completion's number, from 0

    @property
    def length(self) -> int:
        """Tokens, copies of the prompt included."""
        return self.input_ids.size


def lay_out(tree: PromptTree, share_prompt: bool) -> TreeLayout:
    """Lay a tree out as its prompt and then every completion, or with a copy of the prompt before each completion.

    The token before a completion's token i predicts it; the prompt's last token predicts the first token of every
    completion. Only scored tokens become targets.

    Args:
      tree: the prompt and its completions.
      share_prompt: True lays out one copy of the prompt, False one for each completion.
    """
    prompt = tree.prompt_ids.size
    longest = max(branch.ids.size for branch in tree.branches)
    along_path = np.arange(prompt + longest)
    runs, positions, branches, sequences = [], [], [], []
    predicting, targets, length = [], [], 0
    for number, branch in enumerate(tree.branches):
        if number == 0 or not share_prompt:
            runs.append(tree.prompt_ids)
            positions.append(along_path[:prompt])
            branches.append(PROMPT)
            sequences.append(number)
            length += prompt
            prompt_end = length - 1
        size = branch.ids.size
        runs.append(branch.ids)
        positions.append(along_path[prompt : prompt + size])
        branches.append(1 + number)
        sequences.append(0 if share_prompt else number)
        before = np.arange(length - 1, length + size - 1)
        before[0] = prompt_end
        predicting.append(before[branch.loss_mask])
        targets.append(branch.ids[branch.loss_mask])
        length += size
    sizes = [run.size for run in runs]
    return TreeLayout(
        input_ids=np.concatenate(runs),
        position_ids=np.concatenate(positions),
        sequence_ids=np.repeat(sequences, sizes),
        branch_ids=np.repeat(branches, sizes),
        target_positions=np.concatenate(predicting),
        target_ids=np.concatenate(targets),
        target_branches=np.repeat(np.arange(len(targets)), [ids.size for ids in targets]),
    )
