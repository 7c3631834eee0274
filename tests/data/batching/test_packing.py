"""Where every token of a pair stands in a packed batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easydel.data.batching.packing import PackingLayout, assign_rows, choose_rows, pack, pack_trees, row_lengths
from easydel.data.tree import Branch, PreferencePair, PromptTree
from tests.tiny import random_pair


def one_pair() -> PreferencePair:
    return PreferencePair(
        prompt_ids=np.array([11, 12], np.int32),
        chosen_ids=np.array([21, 22, 23], np.int32),
        rejected_ids=np.array([31, 32], np.int32),
        chosen_loss_mask=np.array([True, False, True]),
        rejected_loss_mask=np.array([True, True]),
        index=5,
        weight=0.5,
        prompt_truncated=1,
    )


def test_a_tree_is_prompt_then_chosen_then_rejected():
    batch = pack([one_pair()], PackingLayout(padding_value=9))
    assert batch["input_ids"][0, :8].tolist() == [11, 12, 21, 22, 23, 31, 32, 9]
    assert batch["position_ids"][0, :7].tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert batch["segment_ids"][0, :8].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert batch["branch_ids"][0, :7].tolist() == [0, 0, 1, 1, 1, 2, 2]
    # Place 1, the prompt's last token, predicts the first token of both; 22 carries no loss.
    assert batch["target_positions"][0, :4].tolist() == [1, 3, 1, 5]
    assert batch["target_ids"][0, :4].tolist() == [21, 23, 31, 32]
    assert batch["target_slots"][0, :5].tolist() == [0, 0, 1, 1, -1]
    assert batch["pair_mask"][0, 0] and batch["pair_mask"].sum() == 1
    assert (batch["pair_index"][0, 0], batch["pair_weight"][0, 0], batch["pair_truncated"][0, 0]) == (5, 0.5, True)


def test_without_sharing_each_completion_has_its_own_prompt_and_segment():
    batch = pack([one_pair()], PackingLayout(padding_value=9, share_prompt=False))
    assert batch["input_ids"][0, :9].tolist() == [11, 12, 21, 22, 23, 11, 12, 31, 32]
    assert batch["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch["segment_ids"][0, :10].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 0]
    assert batch["target_positions"][0, :4].tolist() == [1, 3, 6, 7]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 12),
    packing=st.booleans(),
    share_prompt=st.booleans(),
    row_multiple=st.sampled_from([1, 2, 8]),
)
def test_every_target_is_predicted_by_the_token_before_it_in_its_own_path(
    seed, count, packing, share_prompt, row_multiple
):
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng, index) for index in range(count)]
    batch = pack(pairs, PackingLayout(0, packing, share_prompt, row_multiple))
    assert batch["input_ids"].shape[0] % row_multiple == 0
    assert sorted(batch["pair_index"][batch["pair_mask"]].tolist()) == list(range(count))
    assert batch["pair_order"].tolist() == batch["pair_index"].tolist()
    found = {}
    for row, slot in np.argwhere(batch["pair_mask"]):
        pair = pairs[batch["pair_index"][row, slot]]
        for side, ids, mask in (
            (0, pair.chosen_ids, pair.chosen_loss_mask),
            (1, pair.rejected_ids, pair.rejected_loss_mask),
        ):
            targets = np.flatnonzero(batch["target_slots"][row] == 2 * slot + side)
            assert batch["target_ids"][row, targets].tolist() == ids[mask].tolist()
            places = batch["target_positions"][row, targets]
            before = np.concatenate([pair.prompt_ids[-1:], ids[:-1]])[mask]
            assert batch["input_ids"][row, places].tolist() == before.tolist()
            offsets = np.flatnonzero(mask) + pair.prompt_ids.size - 1
            assert batch["position_ids"][row, places].tolist() == offsets.tolist()
            found[row, slot] = True
    assert len(found) == count


def tree(*completions: list[int]) -> PromptTree:
    branches = [Branch(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in completions]
    return PromptTree(np.array([11, 12], np.int32), tuple(branches))


def test_trees_of_one_and_three_branches_share_a_row():
    batch = pack_trees([tree([21, 22], [31], [41, 42]), tree([51])], PackingLayout(padding_value=9))
    assert batch["input_ids"][0, :11].tolist() == [11, 12, 21, 22, 31, 41, 42, 11, 12, 51, 9]
    assert batch["position_ids"][0, :10].tolist() == [0, 1, 2, 3, 2, 2, 3, 0, 1, 2]
    assert batch["segment_ids"][0, :11].tolist() == [1] * 7 + [2] * 3 + [0]
    assert batch["branch_ids"][0, :10].tolist() == [0, 0, 1, 1, 2, 3, 3, 0, 0, 1]
    # Every slot has room for three branches, as many as the largest tree has.
    assert batch["target_slots"][0, :7].tolist() == [0, 0, 1, 2, 2, 3, -1]
    assert batch["target_positions"][0, :6].tolist() == [1, 2, 1, 1, 5, 8]
    assert batch["branch_mask"][0, :2].tolist() == [[True] * 3, [True, False, False]]
    assert batch["tree_order"][0].tolist() == [0, 1]


def test_without_sharing_each_branch_of_a_tree_is_a_segment():
    batch = pack_trees([tree([21, 22], [31], [41]), tree([51])], PackingLayout(9, share_prompt=False))
    assert batch["input_ids"][0, :13].tolist() == [11, 12, 21, 22, 11, 12, 31, 11, 12, 41, 11, 12, 51]
    assert batch["segment_ids"][0, :14].tolist() == [1] * 4 + [2] * 3 + [3] * 3 + [4] * 3 + [0]
    assert batch["target_positions"][0, :5].tolist() == [1, 2, 5, 8, 11]


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_rows_hold_every_tree_once_and_stay_near_the_best_number(lengths):
    rows = assign_rows(lengths, 100, 5)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 100 for row in rows)
    assert all(len(row) <= 5 for row in rows)
    # No two rows could have been one: every row but the last is full, or over half full.
    assert sum(sum(lengths[i] for i in row) <= 50 and len(row) < 5 for row in rows) <= 1


@given(longest=st.integers(1, 10_000), is_one_micro_batch=st.booleans())
def test_a_row_length_holds_the_longest_tree_and_is_one_of_few(longest, is_one_micro_batch):
    lengths = row_lengths(2048, longest, is_one_micro_batch)
    assert lengths and min(lengths) >= longest and lengths == sorted(lengths)
    assert all(length % 16 == 0 for length in lengths)
    assert len(lengths) <= (12 if is_one_micro_batch else 4)
    assert longest <= 2048 or lengths[0] < 1.25 * longest


def test_without_a_limit_of_micro_batches_the_shapes_are_few_too():
    rng = np.random.default_rng(0)
    layout, shapes = PackingLayout(0, micro_batch_tokens=None), set()
    for _ in range(200):
        lengths = np.clip(rng.lognormal(5.3, 0.5, 32), 40, 1000).astype(int).tolist()
        shapes.add(choose_rows(lengths, layout)[:2])
    assert len(shapes) <= 12


@pytest.mark.parametrize("longest", [100, 600, 2050])
def test_a_row_of_one_pair_is_little_longer_than_the_longest(longest):
    for micro_batch_tokens in (2048, 8192):
        layout = PackingLayout(0, packing=False, micro_batch_tokens=micro_batch_tokens)
        assert choose_rows([40, longest, 50], layout)[1] < 1.25 * longest


def test_a_batch_that_its_micro_batches_do_not_divide_still_goes_through_several_rows_at_once():
    layout = PackingLayout(0, packing=False, micro_batches=4)
    rows, length, _ = choose_rows([100] * 9, layout)
    assert (rows, layout.count_micro_batches(rows, length)) == (10, 5)


def test_real_lengths_give_few_shapes_and_little_padding():
    rng = np.random.default_rng(0)
    shapes, used, area = set(), 0, 0
    for _ in range(200):
        lengths = np.clip(rng.lognormal(5.3, 0.5, 16), 40, 1000).astype(int).tolist()
        rows, row_length, _ = choose_rows(lengths, PackingLayout(0))
        shapes.add(row_length)
        used, area = used + sum(lengths), area + rows * row_length
    print(f"{len(shapes)} shapes, {1 - used / area:.1%} padding")
    assert len(shapes) <= 4
    assert 1 - used / area < 0.1


def test_few_tokens_are_one_row_in_one_micro_batch_whatever_the_rows_there_could_be():
    layout = PackingLayout(0)
    pairs = [random_pair(np.random.default_rng(0), index) for index in range(8)]
    batch = pack(pairs, layout)
    rows, length = batch["input_ids"].shape
    assert layout.count_micro_batches(rows, length) == rows == len(pairs)
    assert batch["pair_mask"].any(axis=1).tolist() == [True] + [False] * 7
    assert layout.positions_in_use(batch) == length < 2 * np.count_nonzero(batch["segment_ids"])


@pytest.mark.parametrize("least", [1, 3])
def test_rows_of_one_pair_go_through_as_many_at_once_as_a_micro_batch_holds(least):
    layout = PackingLayout(0, packing=False, row_multiple=2, micro_batches=least, micro_batch_tokens=256)
    pairs = [random_pair(np.random.default_rng(index), index) for index in range(16)]
    rows, length = pack(pairs, layout)["input_ids"].shape
    count = layout.count_micro_batches(rows, length)
    assert count >= least and rows % (2 * count) == 0
    assert rows // 2 // count * length <= max(256, length)


def test_half_given_reference_log_probs_are_an_error():
    pairs = [random_pair(np.random.default_rng(0), index) for index in range(2)]
    pairs[0] = dataclasses.replace(pairs[0], ref_chosen_logps=-1.0, ref_rejected_logps=-2.0)
    with pytest.raises(ValueError, match="1 of 2 pairs"):
        pack(pairs, PackingLayout(0))
    with pytest.raises(ValueError, match="no pairs"):
        pack([], PackingLayout(0))
