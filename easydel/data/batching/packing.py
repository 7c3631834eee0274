"""Pack trees into the rows of a batch: positions, segments, branches and targets of every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from easydel.data.batching.tree_layout import PROMPT, lay_out
from easydel.data.faults import DataError
from easydel.data.tree import KEY_BYTES, PreferencePair, PromptTree

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PackingLayout:
    """Options of packing trees into rows; they change time and memory, not log-probabilities.

    Attributes:
      padding_value: token id that fills the rest of a row; never read, whatever it is.
      packing: True lets several trees share a row; False puts one tree in each row.
      share_prompt: True puts all completions of a prompt behind one copy of it; False gives each its own copy.
      row_multiple: the number of rows is a multiple of this, the data-parallel size.
      micro_batches: smallest number of micro-batches in which the model runs the batch, one after the other.
      micro_batch_tokens: positions of a micro-batch per device, a multiple of 128, unless one tree needs more; None is
        no limit, and then there are exactly ``micro_batches`` micro-batches.
    """

    padding_value: int
    packing: bool = True
    share_prompt: bool = True
    row_multiple: int = 1
    micro_batches: int = 1
    micro_batch_tokens: int | None = 2048

    def count_micro_batches(self, rows: int, length: int) -> int:
        """Number n of micro-batches of a batch; number i holds the rows i, i + n, …, and the last ones may be empty.

        A micro-batch holds one row per device where rows are packed, since they are full then; otherwise as many rows
        as the limits allow.

        Args:
          rows: number of rows of the batch.
          length: positions of a row.
        """
        if self.micro_batch_tokens is None:
            return self.micro_batches
        of_device = rows // self.row_multiple
        most = 1 if self.packing else min(max(1, self.micro_batch_tokens // length), of_device // self.micro_batches)
        return of_device // next(at_once for at_once in range(most, 0, -1) if of_device % at_once == 0)

    def positions_in_use(self, batch: Batch) -> int:
        """Number of positions, tokens and padding, of the micro-batches that hold any token."""
        rows, length = batch["input_ids"].shape
        count = self.count_micro_batches(rows, length)
        last = np.flatnonzero(batch["segment_ids"].any(axis=1)) % count
        return (last.max() + 1) * (rows // count) * length


# Row length where micro-batches have no limit: shorter rows pack badly, longer ones gain nothing.
TARGET_ROW_LENGTH = 2048
ROW_LENGTH_UNIT = 16
TOKENS_PER_SLOT = 16


def round_up(number: int, unit: int = 1) -> int:
    """Round up to a multiple of `unit` and, above 8 units, to one of four numbers per doubling.

    Example:
      >>> [round_up(number) for number in (7, 9, 17, 33)]
      [7, 10, 20, 40]
    """
    units = -(-number // unit)
    step = 1 << max(0, (units - 1).bit_length() - 3)
    return -(-units // step) * step * unit


def row_lengths(micro_batch_tokens: int, longest: int, is_one_micro_batch: bool) -> list[int]:
    """Row lengths to choose from, in ascending order; few, since each compiles a program of its own.

    Args:
      micro_batch_tokens: positions of a micro-batch per device.
      longest: length of the longest tree. One that exceeds a micro-batch sets the row length, rounded up.
      is_one_micro_batch: whether all trees fit in one micro-batch. Then the lengths are eighths of a micro-batch, and
        halves of the smallest; otherwise they are quarters.
    """
    if longest > micro_batch_tokens:
        return [round_up(longest, ROW_LENGTH_UNIT)]
    lengths = [micro_batch_tokens * share // 4 for share in range(1, 5)]
    if is_one_micro_batch:
        lengths = [micro_batch_tokens * share // 8 for share in range(1, 9)]
        while lengths[0] >= 2 * ROW_LENGTH_UNIT:
            lengths.insert(0, lengths[0] // 2 // ROW_LENGTH_UNIT * ROW_LENGTH_UNIT)
    return [length for length in lengths if length >= longest]


def assign_rows(lengths: Sequence[int], row_length: int, slots: int) -> list[list[int]]:
    """Assign trees to rows by first-fit decreasing; needs at most 11/9 of the fewest possible rows, plus one.

    Args:
      lengths: tokens of each tree.
      row_length: most tokens of a row.
      slots: most trees of a row.

    Returns:
      The indices of the trees of each row.

    References:
      Johnson, Near-Optimal Bin Packing Algorithms, 1973 (without a limit on trees per row).

    Example:
      >>> assign_rows([3, 5, 2, 4], row_length=8, slots=4)
      [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = (row for row, left in enumerate(space) if left >= lengths[index] and len(rows[row]) < slots)
        row = next(fits, None)
        if row is None:
            row = len(rows)
            rows.append([])
            space.append(row_length)
        rows[row].append(index)
        space[row] -= lengths[index]
    return rows


def choose_rows(lengths: Sequence[int], layout: PackingLayout) -> tuple[int, int, list[list[int]]]:
    """Choose the number of rows in use, their length, and the trees of each, for the least padding.

    Where micro-batches have no limit, all rows are computed and compiled for, so their number is one of few.

    Args:
      lengths: tokens of each tree.
      layout: options of packing.

    Returns:
      Number of rows, positions of a row, and the indices of the trees of each row.
    """
    micro_batch_tokens, longest = layout.micro_batch_tokens or TARGET_ROW_LENGTH, max(lengths)
    least = layout.row_multiple * layout.micro_batches
    if layout.packing:
        to_try = row_lengths(micro_batch_tokens, longest, sum(lengths) <= micro_batch_tokens * layout.row_multiple)
    else:
        to_try = [round_up(longest, ROW_LENGTH_UNIT)]
    choices = []
    for row_length in to_try:
        if layout.packing:
            members = assign_rows(lengths, row_length, row_length // TOKENS_PER_SLOT)
            multiple = layout.row_multiple
        else:
            members = [[index] for index in range(len(lengths))]
            share = max(1, len(members) // least)
            multiple = layout.row_multiple * min(share, max(1, micro_batch_tokens // row_length))
        rows = -(-max(len(members), least) // multiple)
        rows = multiple * (round_up(rows) if layout.micro_batch_tokens is None else rows)
        choices.append((rows * row_length, -row_length, rows, members))
    _, negative_length, rows, members = min(choices)
    return rows, -negative_length, members


def pack_trees(trees: Sequence[PromptTree], layout: PackingLayout) -> Batch:
    """Pack trees, of any number of branches each, into one batch.

    Returns:
      int32 arrays ``input_ids, position_ids, segment_ids, branch_ids`` [rows, length];
      ``target_positions, target_ids, target_slots`` [rows, targets], filled from the left (``target_slots`` is
      ``branches * slot + branch``, both from 0, with ``branches`` the most that any tree has; -1 where there is no
      target);
      ``branch_mask`` [rows, slots, branches] bool, True where there is a branch;
      ``tree_order`` [rows, slots] int32, the tree's position in `trees`, -1 where a slot holds none.

    Raises:
      ValueError: no trees.

    Example:
      >>> from easydel.data.tree import Branch
      >>> answers = [Branch(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in ([7, 2], [8, 9, 2], [2])]
      >>> batch = pack_trees([PromptTree(np.array([5, 6], np.int32), tuple(answers))], PackingLayout(padding_value=0))
      >>> batch["input_ids"][0, :9].tolist(), batch["branch_ids"][0, :9].tolist()
      ([5, 6, 7, 2, 8, 9, 2, 2, 0], [0, 0, 1, 1, 2, 2, 2, 3, 0])
      >>> batch["branch_mask"][0, 0].tolist()
      [True, True, True]
    """
    if not trees:
        raise ValueError("pack got no trees; a batch needs at least one.")
    laid_out = [lay_out(tree, layout.share_prompt) for tree in trees]
    in_use, row_length, members = choose_rows([tree.length for tree in laid_out], layout)
    rows = in_use
    if layout.packing and layout.micro_batch_tokens is not None:
        # The largest possible number: the rows in use change from batch to batch, and must not force a compilation.
        rows = max(in_use, layout.row_multiple * -(-len(trees) // layout.row_multiple))
    count = layout.count_micro_batches(rows, row_length)
    at_once = rows // count
    slots = row_length // TOKENS_PER_SLOT if layout.packing else 1
    branches = max(len(tree.branches) for tree in trees)
    # Every token is predicted at most once, so a row's length bounds the number of its targets too.
    batch: Batch = {
        name: np.full((rows, row_length), fill, np.int32)
        for name, fill in (
            ("input_ids", layout.padding_value),
            ("position_ids", 0),
            ("segment_ids", 0),
            ("branch_ids", PROMPT),
            ("target_positions", 0),
            ("target_ids", 0),
            ("target_slots", -1),
        )
    }
    batch["branch_mask"] = np.zeros((rows, slots, branches), np.bool_)
    batch["tree_order"] = np.full((rows, slots), -1, np.int32)
    for number, indices in enumerate(members):
        micro_batch, row_of_it = divmod(number, at_once)
        row = row_of_it * count + micro_batch
        start = target_start = segment = 0
        for slot, index in enumerate(indices):
            tree, number_of_branches = laid_out[index], len(trees[index].branches)
            span = (row, slice(start, start + tree.length))
            target_span = (row, slice(target_start, target_start + tree.target_ids.size))
            batch["input_ids"][span] = tree.input_ids
            batch["position_ids"][span] = tree.position_ids
            batch["segment_ids"][span] = 1 + segment + tree.sequence_ids
            batch["branch_ids"][span] = tree.branch_ids
            batch["target_positions"][target_span] = start + tree.target_positions
            batch["target_ids"][target_span] = tree.target_ids
            batch["target_slots"][target_span] = branches * slot + tree.target_branches
            batch["branch_mask"][row, slot, :number_of_branches] = True
            batch["tree_order"][row, slot] = index
            segment += 1 if layout.share_prompt else number_of_branches
            start += tree.length
            target_start += tree.target_ids.size
    return batch


def pack(pairs: Sequence[PreferencePair], layout: PackingLayout) -> Batch:
    """Pack pairs into one batch of the tree layout.

    Returns:
      int32 arrays ``input_ids, position_ids, segment_ids, branch_ids`` [rows, length];
      ``target_positions, target_ids, target_slots`` [rows, targets], filled from the left (``target_slots`` is
      ``2 * slot + side`` with 0 for chosen and 1 for rejected, -1 where there is no target);
      ``pair_mask`` [rows, slots] bool; ``pair_index`` (the row's position in the data) and ``pair_order`` (its
      position in `pairs`) [rows, slots] int32, -1 where there is none; ``pair_truncated`` (anything was cut)
      [rows, slots] bool; ``pair_weight`` [rows, slots] float32; ``pair_keys`` [rows, slots, 16] uint8, the digests of
      the pairs (`easydel.data.tree.PromptTree.key`);
      ``ref_chosen_logps, ref_rejected_logps`` [rows, slots] float32, in nats, when every pair brings them;
      ``pair_margin`` [rows, slots] float32, in nats, when the pairs have margins.

    Raises:
      ValueError: no pairs.
      DataError: some with ready-made reference log-probs and some without.

    Example:
      >>> batch = pack(pairs, PackingLayout(padding_value=0))
      >>> int(batch["pair_mask"].sum()) == len(pairs), batch["pair_mask"].shape == batch["pair_weight"].shape
      (True, True)
    """
    if not pairs:
        raise ValueError("pack got no pairs; a batch needs at least one.")
    trees = [pair.tree for pair in pairs]
    batch = pack_trees(trees, layout)
    order = batch.pop("tree_order")
    del batch["branch_mask"]  # a pair always has both branches

    def column(values: Sequence[Any], dtype: type, absent: float = 0) -> np.ndarray:
        """The value of each slot's pair; `absent` where a slot is empty."""
        return np.array([*values, absent], dtype)[order]  # order is -1 in an empty slot, which indexes the last entry

    batch |= {
        "pair_mask": order >= 0,
        "pair_index": column([pair.index for pair in pairs], np.int32, -1),
        "pair_order": order,
        "pair_weight": column([pair.weight for pair in pairs], np.float32),
        "pair_truncated": column([tree.is_truncated for tree in trees], np.bool_),
        "pair_keys": np.frombuffer(b"".join(tree.key for tree in trees) + bytes(KEY_BYTES), np.uint8).reshape(
            -1, KEY_BYTES
        )[order],
    }
    if all(pair.margin is not None for pair in pairs):
        batch["pair_margin"] = column([pair.margin for pair in pairs], np.float32)
    known = [pair.ref_chosen_logps is not None for pair in pairs]
    if any(known) and not all(known):
        raise DataError(
            f"{sum(known)} of {len(pairs)} pairs of one batch bring ref_chosen_logps and ref_rejected_logps; "
            "give both columns in every row or in none."
        )
    if all(known):
        batch["ref_chosen_logps"] = column([pair.ref_chosen_logps for pair in pairs], np.float32)
        batch["ref_rejected_logps"] = column([pair.ref_rejected_logps for pair in pairs], np.float32)
    return batch
