"""A tree of any number of branches scores as so many separate sequences do."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.data.batching.packing import PackingLayout, pack, pack_trees
from easydel.data.tree import Branch, PromptTree
from easydel.trainers.direct_preference_optimization_trainer.scoring import (
    ScoringOptions,
    branch_lengths,
    score_pairs,
    score_trees,
)
from tests.tiny import VOCABULARY

LAYOUTS = [
    PackingLayout(0, packing, share_prompt) for packing, share_prompt in itertools.product([True, False], [True, False])
]
score = jax.jit(score_trees)


def random_tree(rng: np.random.Generator, branches: int, index: int = -1) -> PromptTree:
    def branch() -> Branch:
        size = int(rng.integers(1, 30))
        mask = rng.random(size) < 0.8
        mask[-1] = True
        return Branch(rng.integers(1, VOCABULARY, size).astype(np.int32), mask)

    prompt = rng.integers(1, VOCABULARY, rng.integers(1, 30)).astype(np.int32)
    return PromptTree(prompt, tuple(branch() for _ in range(branches)), index)


@pytest.fixture(scope="module")
def trees() -> list[PromptTree]:
    rng = np.random.default_rng(5)
    return [random_tree(rng, branches, index) for index, branches in enumerate((5, 1, 2, 5, 2, 1, 3))]


def one_by_one(model, tree: PromptTree) -> list[float]:
    """The log-prob of each completion alone in a batch of its own, through plain logits."""
    found = []
    for branch in tree.branches:
        sequence = np.concatenate([tree.prompt_ids, branch.ids])
        log_probs = jax.nn.log_softmax(model(jnp.array(sequence)[None])[0])
        predicted = log_probs[np.arange(tree.prompt_ids.size - 1, sequence.size - 1), branch.ids]
        found.append(float(predicted[branch.loss_mask].sum()))
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_trees_of_one_to_five_branches_score_as_separate_sequences(tiny_model, trees, layout):
    batch = pack_trees(trees, layout)
    sums = np.asarray(score(tiny_model, batch))
    lengths = np.asarray(branch_lengths(batch["target_slots"], *batch["branch_mask"].shape[1:]))
    seen = set()
    for row, slot in np.argwhere(batch["tree_order"] >= 0):
        index = int(batch["tree_order"][row, slot])
        tree, there = trees[index], batch["branch_mask"][row, slot]
        assert there.sum() == len(tree.branches)
        np.testing.assert_allclose(sums[row, slot, there], one_by_one(tiny_model, tree), rtol=1e-5, atol=1e-5)
        assert lengths[row, slot, there].tolist() == [branch.loss_mask.sum() for branch in tree.branches]
        seen.add(index)
    assert seen == set(range(len(trees)))
    assert not sums[~batch["branch_mask"]].any()


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_changing_any_token_of_another_tree_or_branch_changes_nothing(tiny_model, trees, layout):
    batch = pack_trees(trees[:3], layout)
    before = np.asarray(score(tiny_model, batch))
    spans = {}  # by segment: the slot, and the only branch it can move where each has its own prompt
    for slot, order in enumerate(batch["tree_order"][0][batch["tree_order"][0] >= 0]):
        branches = range(len(trees[order].branches))
        for segment in [None] if layout.share_prompt else branches:
            spans[len(spans) + 1] = slot, segment
    for position in range(0, batch["input_ids"].shape[1], 5):
        segment, branch = int(batch["segment_ids"][0, position]), int(batch["branch_ids"][0, position])
        changed = dict(batch, input_ids=batch["input_ids"].copy())
        changed["input_ids"][0, position] = (batch["input_ids"][0, position] + 1) % VOCABULARY
        after = np.asarray(score(tiny_model, changed))
        may_move = np.zeros(before.shape, bool)
        if segment:
            slot, own = spans[segment]
            only = own if own is not None else branch - 1 if branch else slice(None)
            may_move[0, slot, only] = True
        assert not (before != after)[~may_move].any(), position


def test_pairs_are_the_trees_of_two(tiny_model, pairs):
    layout = PackingLayout(0)
    batch, of_trees = pack(pairs, layout), pack_trees([pair.tree for pair in pairs], layout)
    scored = score_pairs(tiny_model, batch, ScoringOptions())
    sums = np.asarray(score(tiny_model, of_trees))
    np.testing.assert_array_equal(batch["target_slots"], of_trees["target_slots"])
    np.testing.assert_allclose(sums, np.stack([scored.chosen, scored.rejected], axis=-1), rtol=1e-5, atol=1e-5)


def test_the_key_of_a_tree_knows_every_token_every_mask_and_where_branches_end(trees):
    tree = trees[0]
    others = [
        PromptTree(tree.prompt_ids, tree.branches[:-1]),
        PromptTree(tree.prompt_ids, tree.branches[::-1]),
        PromptTree(tree.prompt_ids[::-1], tree.branches),
        PromptTree(tree.prompt_ids, (Branch(tree.branches[0].ids, ~tree.branches[0].loss_mask), *tree.branches[1:])),
        *trees[1:],
    ]
    assert len({tree.key, *(other.key for other in others)}) == 1 + len(others)
    assert PromptTree(tree.prompt_ids, tree.branches, index=99, prompt_truncated=3).key == tree.key


@pytest.mark.parametrize(
    ("prompt", "branches", "message"),
    [
        (0, [(2, 2)], "0 prompt tokens and 1 branches"),
        (3, [], "3 prompt tokens and 0 branches"),
        (3, [(2, 2), (0, 0)], "branch 1 of a tree has 0 tokens"),
        (3, [(3, 2)], "branch 0 of a tree has 3 tokens and a loss mask of 2"),
    ],
)
def test_a_tree_has_a_prompt_and_branches_of_tokens(prompt, branches, message):
    made = tuple(Branch(np.ones(size, np.int32), np.ones(mask, np.bool_)) for size, mask in branches)
    with pytest.raises(ValueError, match=message):
        PromptTree(np.ones(prompt, np.int32), made)
