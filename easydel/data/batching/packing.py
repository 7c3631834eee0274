"""Pack preference trees into the rows of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from easydel.data.batching.pair_keys import KEY_BYTES, pair_key
from easydel.data.faults import DataError
from easydel.data.preference.transform import PreferencePair

PROMPT, CHOSEN, REJECTED = 0, 1, 2

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PackingLayout:
    """How pairs become rows. Log-probabilities do not depend on it, only time and memory do.

    Attributes:
      padding_value: token id that fills the rest of a row; never read, whatever it is.
      packing: several pairs share a row; otherwise one pair a row.
      share_prompt: chosen and rejected hang off one copy of the prompt; otherwise each has its own.
      row_multiple: the number of rows is a multiple of this (devices).
      micro_batches: the batch goes through the model in at least so many micro-batches, one after the other.
      micro_batch_tokens: positions of a micro-batch per device, a multiple of 128, unless one pair needs more; None is
        no limit, so that ``micro_batches`` is their number.
    """

    padding_value: int
    packing: bool = True
    share_prompt: bool = True
    row_multiple: int = 1
    micro_batches: int = 1
    micro_batch_tokens: int | None = 2048

    def count_micro_batches(self, rows: int, length: int) -> int:
        """Micro-batches of a batch of so many rows: number i of n holds the rows i, i + n, …; the last may be empty.

        A micro-batch holds one packed row per device, since rows in use are full; of other rows, as many as the limits
        allow.
        """
        if self.micro_batch_tokens is None:
            return self.micro_batches
        of_device = rows // self.row_multiple
        most = 1 if self.packing else min(max(1, self.micro_batch_tokens // length), of_device // self.micro_batches)
        return of_device // next(at_once for at_once in range(most, 0, -1) if of_device % at_once == 0)

    def positions_in_use(self, batch: Batch) -> int:
        """Positions, tokens and padding, of the micro-batches that hold any pair."""
        rows, length = batch["input_ids"].shape
        count = self.count_micro_batches(rows, length)
        last = np.flatnonzero(batch["pair_mask"].any(axis=1)) % count
        return (last.max() + 1) * (rows // count) * length


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """One pair laid out as it will stand in a row: the tokens of `pack`'s batch keys, places counted from 0."""

    pair: PreferencePair
    input_ids: Int[np.ndarray, " length"]
    position_ids: Int[np.ndarray, " length"]
    sequence_ids: Int[np.ndarray, " length"]  # 0, or 0 and 1 where each completion has its own prompt
    branch_ids: Int[np.ndarray, " length"]
    target_positions: Int[np.ndarray, " targets"]
    target_ids: Int[np.ndarray, " targets"]
    target_sides: Int[np.ndarray, " targets"]  # 0 chosen, 1 rejected

    @property
    def length(self) -> int:
        return self.input_ids.size


def lay_out(pair: PreferencePair, share_prompt: bool) -> Tree:
    """Write one pair as ``prompt, chosen, rejected``, or as ``prompt, chosen, prompt, rejected``.

    A completion's token i is predicted where the token before it stands; the prompt's last token predicts the first
    token of both completions. Only tokens that carry loss become targets.
    """
    prompt, chosen, rejected = pair.prompt_ids.size, pair.chosen_ids.size, pair.rejected_ids.size
    after_prompt = np.arange(prompt, prompt + max(chosen, rejected))
    if share_prompt:
        parts = [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        branches, sequences = [PROMPT, CHOSEN, REJECTED], [0, 0, 0]
        positions = [np.arange(prompt), after_prompt[:chosen], after_prompt[:rejected]]
        rejected_prompt_end, rejected_start = prompt - 1, prompt + chosen
    else:
        parts = [pair.prompt_ids, pair.chosen_ids, pair.prompt_ids, pair.rejected_ids]
        branches, sequences = [PROMPT, CHOSEN, PROMPT, REJECTED], [0, 0, 1, 1]
        positions = [np.arange(prompt), after_prompt[:chosen], np.arange(prompt), after_prompt[:rejected]]
        rejected_prompt_end, rejected_start = 2 * prompt + chosen - 1, 2 * prompt + chosen
    sizes = [part.size for part in parts]
    predicts_chosen = np.concatenate([[prompt - 1], np.arange(prompt, prompt + chosen - 1)])
    predicts_rejected = np.concatenate(
        [[rejected_prompt_end], np.arange(rejected_start, rejected_start + rejected - 1)]
    )
    chosen_mask, rejected_mask = pair.chosen_loss_mask, pair.rejected_loss_mask
    return Tree(
        pair=pair,
        input_ids=np.concatenate(parts),
        position_ids=np.concatenate(positions),
        sequence_ids=np.repeat(sequences, sizes),
        branch_ids=np.repeat(branches, sizes),
        target_positions=np.concatenate([predicts_chosen[chosen_mask], predicts_rejected[rejected_mask]]),
        target_ids=np.concatenate([pair.chosen_ids[chosen_mask], pair.rejected_ids[rejected_mask]]),
        target_sides=np.repeat([0, 1], [chosen_mask.sum(), rejected_mask.sum()]),
    )


def _is_truncated(pair: PreferencePair) -> bool:
    return bool(pair.prompt_truncated or pair.chosen_truncated or pair.rejected_truncated)


# Where micro-batches know no limit, rows are about this long: shorter ones pack badly, longer ones gain nothing.
TARGET_ROW_LENGTH = 2048
LENGTH_UNIT = 16
TOKENS_PER_SLOT = 16


def round_up(number: int, unit: int = 1) -> int:
    """The next of few numbers: units, and from 8 of them on eighths to quarters of the number."""
    units = -(-number // unit)
    step = 1 << max(0, (units - 1).bit_length() - 3)
    return -(-units // step) * step * unit


def row_lengths(micro_batch_tokens: int, longest: int, is_one_micro_batch: bool) -> list[int]:
    """Row lengths to choose from, of which each compiles a program of its own.

    Quarters of a micro-batch, or its eighths and smaller halves where all fits in one; for a tree that is longer than
    a micro-batch, its own length, rounded up.
    """
    if longest > micro_batch_tokens:
        return [round_up(longest, LENGTH_UNIT)]
    lengths = [micro_batch_tokens * share // 4 for share in range(1, 5)]
    if is_one_micro_batch:
        lengths = [micro_batch_tokens * share // 8 for share in range(1, 9)]
        while lengths[0] >= 2 * LENGTH_UNIT:
            lengths.insert(0, lengths[0] // 2 // LENGTH_UNIT * LENGTH_UNIT)
    return [length for length in lengths if length >= longest]


def assign_rows(lengths: Sequence[int], row_length: int, slots: int) -> list[list[int]]:
    """First-fit decreasing: indices of the trees of each row, at most `slots` and no longer than `row_length` in all.

    Never needs more than 11/9 of the best number of rows, plus one (Johnson 1973).
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
    """Number of rows in use, their length, and the trees of each, so that there is the least padding.

    Where micro-batches know no limit, all rows are computed and compiled for, so their number is one of few.
    """
    micro_batch_tokens, longest = layout.micro_batch_tokens or TARGET_ROW_LENGTH, max(lengths)
    least = layout.row_multiple * layout.micro_batches
    if layout.packing:
        to_try = row_lengths(micro_batch_tokens, longest, sum(lengths) <= micro_batch_tokens * layout.row_multiple)
    else:
        to_try = [round_up(longest, LENGTH_UNIT)]
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


def pack(pairs: Sequence[PreferencePair], layout: PackingLayout) -> Batch:
    """Pack pairs into one batch of the tree layout.

    Returns:
      int32 arrays ``input_ids, position_ids, segment_ids, branch_ids`` [rows, length];
      ``target_positions, target_ids, target_slots`` [rows, targets], filled from the left (``target_slots`` is
      ``2 * slot + side``, -1 where there is no target);
      ``pair_mask`` [rows, slots] bool; ``pair_index`` (the row's place in the data) and ``pair_order`` (its place in
      `pairs`) [rows, slots] int32, -1 where there is none; ``pair_truncated`` (any part was cut) [rows, slots] bool;
      ``pair_weight`` [rows, slots] float32; ``pair_keys`` [rows, slots, 16] uint8, by which what is known of a pair is
      looked up (`easydel.data.batching.pair_keys`);
      ``ref_chosen_logps, ref_rejected_logps`` [rows, slots] float32 when every pair brings them.

    Raises:
      ValueError: no pairs.
      DataError: some with ready-made reference log-probs and some without.
    """
    if not pairs:
        raise ValueError("pack got no pairs; a batch needs at least one.")
    trees = [lay_out(pair, layout.share_prompt) for pair in pairs]
    lengths = [tree.length for tree in trees]
    in_use, row_length, members = choose_rows(lengths, layout)
    rows = in_use
    if layout.packing and layout.micro_batch_tokens is not None:
        # As many as there could ever be: the rows in use change from batch to batch, and must not be compiled for.
        rows = max(in_use, layout.row_multiple * -(-len(pairs) // layout.row_multiple))
    count = layout.count_micro_batches(rows, row_length)
    at_once = rows // count
    slots = row_length // TOKENS_PER_SLOT if layout.packing else 1
    # Every token but a prompt's first ones is predicted once at most, so a row's length bounds its targets too.
    targets = row_length

    def empty(width: int, fill: float = 0, dtype: type = np.int32) -> np.ndarray:
        return np.full((rows, width), fill, dtype)

    batch: Batch = {
        "input_ids": empty(row_length, layout.padding_value),
        "position_ids": empty(row_length),
        "segment_ids": empty(row_length),
        "branch_ids": empty(row_length),
        "target_positions": empty(targets),
        "target_ids": empty(targets),
        "target_slots": empty(targets, -1),
        "pair_mask": empty(slots, False, np.bool_),
        "pair_index": empty(slots, -1),
        "pair_order": empty(slots, -1),
        "pair_truncated": empty(slots, False, np.bool_),
        "pair_weight": empty(slots, 0, np.float32),
        "pair_keys": np.zeros((rows, slots, KEY_BYTES), np.uint8),
    }
    known = [pair.ref_chosen_logps is not None for pair in pairs]
    if any(known) and not all(known):
        raise DataError(
            f"{sum(known)} of {len(pairs)} pairs of one batch bring ref_chosen_logps and ref_rejected_logps; "
            "give both columns in every row or in none."
        )
    if all(known):
        batch["ref_chosen_logps"] = empty(slots, 0, np.float32)
        batch["ref_rejected_logps"] = empty(slots, 0, np.float32)

    for number, indices in enumerate(members):
        micro_batch, row_of_it = divmod(number, at_once)
        row = row_of_it * count + micro_batch
        start = target_start = 0
        for slot, index in enumerate(indices):
            tree = trees[index]
            span = (row, slice(start, start + tree.length))
            target_span = (row, slice(target_start, target_start + tree.target_ids.size))
            sequences = 1 if layout.share_prompt else 2
            batch["input_ids"][span] = tree.input_ids
            batch["position_ids"][span] = tree.position_ids
            batch["segment_ids"][span] = 1 + sequences * slot + tree.sequence_ids
            batch["branch_ids"][span] = tree.branch_ids
            batch["target_positions"][target_span] = start + tree.target_positions
            batch["target_ids"][target_span] = tree.target_ids
            batch["target_slots"][target_span] = 2 * slot + tree.target_sides
            batch["pair_mask"][row, slot] = True
            batch["pair_index"][row, slot] = tree.pair.index
            batch["pair_order"][row, slot] = index
            batch["pair_truncated"][row, slot] = _is_truncated(tree.pair)
            batch["pair_weight"][row, slot] = tree.pair.weight
            batch["pair_keys"][row, slot] = np.frombuffer(pair_key(tree.pair), np.uint8)
            if all(known):
                batch["ref_chosen_logps"][row, slot] = tree.pair.ref_chosen_logps
                batch["ref_rejected_logps"][row, slot] = tree.pair.ref_rejected_logps
            start += tree.length
            target_start += tree.target_ids.size
    return batch
