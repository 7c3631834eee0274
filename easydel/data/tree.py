"""Define the tree that a row becomes, a prompt and the completions that branch from it, and the pair, a tree of two."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int32

KEY_BYTES = 16
PAIR_BRANCHES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Branch:
    """One completion of a prompt.

    Attributes:
      ids: token ids, at least one.
      loss_mask: which of them are scored, at least one.
      truncated: number of tokens cut from its end.
    """

    ids: Int32[np.ndarray, " completion"]
    loss_mask: Bool[np.ndarray, " completion"]
    truncated: int = 0


@dataclass(frozen=True)
class PromptTree:
    """A prompt and any number of completions; of each completion, the model reads prompt ‖ completion.

    Attributes:
      prompt_ids: token ids, at least one.
      branches: the completions, at least one.
      index: the row's position in the data, -1 when unknown.
      prompt_truncated: number of tokens cut from the prompt.

    Raises:
      ValueError: there are no prompt tokens, no branches, or a branch of no tokens or with a mask of another length.

    Example:
      >>> answers = [Branch(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in ([7, 2], [8, 9, 2], [2])]
      >>> tree = PromptTree(np.array([5, 6], np.int32), tuple(answers))
      >>> [branch.ids.size for branch in tree.branches], tree.is_truncated
      ([2, 3, 1], False)
    """

    prompt_ids: Int32[np.ndarray, " prompt"]
    branches: tuple[Branch, ...]
    index: int = -1
    prompt_truncated: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_ids.size or not self.branches:
            raise ValueError(
                f"a tree of {self.prompt_ids.size} prompt tokens and {len(self.branches)} branches, expected at least "
                "one of each."
            )
        for number, branch in enumerate(self.branches):
            if not branch.ids.size or branch.ids.shape != branch.loss_mask.shape:
                raise ValueError(
                    f"branch {number} of a tree has {branch.ids.size} tokens and a loss mask of "
                    f"{branch.loss_mask.size}, expected at least one token and as many entries."
                )

    @property
    def is_truncated(self) -> bool:
        """Whether any token was cut from the prompt or a completion."""
        return bool(self.prompt_truncated or any(branch.truncated for branch in self.branches))

    @cached_property
    def key(self) -> bytes:
        """Digest of all that a model reads and scores: the number of branches, every token id, every loss mask.

        Reference log-probs are cached by it, so it does not depend on layout, index, or the other rows of a batch.
        """
        digest = hashlib.blake2b(len(self.branches).to_bytes(8, "little"), digest_size=KEY_BYTES)
        for ids in (self.prompt_ids, *(branch.ids for branch in self.branches)):
            # Lengths go in as well, so that moving a token from one completion to the next gives another key.
            digest.update(ids.size.to_bytes(8, "little") + np.asarray(ids, "<i4").tobytes())
        for branch in self.branches:
            digest.update(np.asarray(branch.loss_mask, np.bool_).tobytes())
        return digest.digest()


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One tokenised row; the model reads prompt ‖ chosen and prompt ‖ rejected.

    Attributes:
      prompt_ids, chosen_ids, rejected_ids: token ids, at least one each.
      chosen_loss_mask, rejected_loss_mask: which completion tokens are scored, at least one each.
      index: the row's position in the data, -1 when unknown.
      weight: factor of the row in the loss.
      margin: difference, in nats, that the pair's scores should reach; None where no objective reads it.
      ref_chosen_logps, ref_rejected_logps: ready-made reference log-probs in nats, both or neither.
      prompt_truncated, chosen_truncated, rejected_truncated: number of tokens cut from each.
    """

    prompt_ids: Int32[np.ndarray, " prompt"]
    chosen_ids: Int32[np.ndarray, " chosen"]
    rejected_ids: Int32[np.ndarray, " rejected"]
    chosen_loss_mask: Bool[np.ndarray, " chosen"]
    rejected_loss_mask: Bool[np.ndarray, " rejected"]
    index: int = -1
    weight: float = 1.0
    margin: float | None = None
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    prompt_truncated: int = 0
    chosen_truncated: int = 0
    rejected_truncated: int = 0

    @property
    def tree(self) -> PromptTree:
        """The pair as a tree of two branches, chosen first."""
        chosen = Branch(self.chosen_ids, self.chosen_loss_mask, self.chosen_truncated)
        rejected = Branch(self.rejected_ids, self.rejected_loss_mask, self.rejected_truncated)
        return PromptTree(self.prompt_ids, (chosen, rejected), self.index, self.prompt_truncated)
