"""Layout changes time and memory, never a number."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easydel.data.batching.packing import PackingLayout, pack
from easydel.infra.base_state import EasyDeLState
from easydel.trainers.direct_preference_optimization_trainer.objectives.combined import make_objective
from easydel.trainers.direct_preference_optimization_trainer.preference_loss import PreferenceLoss
from easydel.trainers.direct_preference_optimization_trainer.scoring import (
    ScoringOptions,
    completion_lengths,
    score_pairs,
)
from easydel.trainers.step import training_step
from tests.tiny import VOCABULARY

LAYOUTS = [
    PackingLayout(0, packing, share_prompt, row_multiple)
    for packing, share_prompt, row_multiple in itertools.product([True, False], [True, False], [1, 4])
]
PLAIN = ScoringOptions()
score = jax.jit(functools.partial(score_pairs, options=PLAIN))
SIGMOID = make_objective(["sigmoid"], {"beta": 0.1, "label_smoothing": 0.1})


def in_order(batch, values):
    """Per-pair values in the order of the pairs, whatever the layout."""
    out = np.empty(batch["pair_mask"].sum())
    out[batch["pair_order"][batch["pair_mask"]]] = np.asarray(values)[batch["pair_mask"]]
    return out


def one_by_one(model, pairs):
    """Log-probs of each completion alone in a batch of its own, through plain logits."""
    chosen, rejected = [], []
    for pair in pairs:
        for ids, mask, out in (
            (pair.chosen_ids, pair.chosen_loss_mask, chosen),
            (pair.rejected_ids, pair.rejected_loss_mask, rejected),
        ):
            sequence = np.concatenate([pair.prompt_ids, ids])
            log_probs = jax.nn.log_softmax(model(jnp.array(sequence)[None])[0])
            predicted = log_probs[np.arange(pair.prompt_ids.size - 1, sequence.size - 1), ids]
            out.append(float(predicted[mask].sum()))
    return np.array(chosen), np.array(rejected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_log_probs_of_plain_sequences(tiny_model, pairs, layout):
    expected = one_by_one(tiny_model, pairs)
    batch = pack(pairs, layout)
    scored = score(tiny_model, batch)
    for side, wanted in zip((scored.chosen, scored.rejected), expected):
        np.testing.assert_allclose(in_order(batch, side), wanted, rtol=1e-5, atol=1e-4)


def test_order_and_company_of_pairs_change_no_log_prob(tiny_model, pairs):
    layout = PackingLayout(0)
    batch = pack(pairs, layout)
    whole = in_order(batch, score(tiny_model, batch).chosen)
    shuffled = pack(pairs[::-1], layout)
    np.testing.assert_allclose(
        in_order(shuffled, score(tiny_model, shuffled).chosen)[::-1], whole, rtol=1e-5, atol=1e-5
    )
    alone = pack(pairs[2:3], layout)
    np.testing.assert_allclose(in_order(alone, score(tiny_model, alone).chosen), whole[2:3], rtol=1e-5, atol=1e-5)


def test_changing_any_token_of_another_pair_or_branch_changes_nothing(tiny_model, pairs):
    """The leak test through the whole model: each token in turn is replaced; only its own paths may move."""
    batch = pack(pairs[:3], PackingLayout(0))
    before = score(tiny_model, batch)
    for row, place in np.argwhere(batch["segment_ids"] >= 0):
        segment, branch = batch["segment_ids"][row, place], batch["branch_ids"][row, place]
        if place % 5 and segment:  # every fifth token is enough; padding is cheap to check in full
            continue
        changed = dict(batch, input_ids=batch["input_ids"].copy())
        changed["input_ids"][row, place] = (batch["input_ids"][row, place] + 1) % VOCABULARY
        after = score(tiny_model, changed)
        sides = ((after.chosen, before.chosen), (after.rejected, before.rejected))
        for side, (a, b) in enumerate(sides, start=1):
            moved = set(map(tuple, np.argwhere(np.asarray(a) != np.asarray(b))))
            assert moved <= ({(row, segment - 1)} if segment and branch in (0, side) else set())


def reference_of(batch):
    noise = np.random.default_rng(3).normal(-30, 5, (2, 64)).astype(np.float32)
    order = np.maximum(batch["pair_order"], 0)
    return {"ref_chosen_logps": noise[0][order], "ref_rejected_logps": noise[1][order]}


def update(model, batch, micro_batches=1, remat=False, objective=SIGMOID, scoring=PLAIN):
    state = EasyDeLState.create(model, optax.sgd(1.0))
    step = jax.jit(
        functools.partial(
            training_step,
            loss=PreferenceLoss(objective, scoring, model.dtype),
            count_micro_batches=lambda *_: micro_batches,
            remat=remat,
        )
    )
    return step(state, batch | reference_of(batch))


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_and_accumulation_gives_the_same_loss_and_gradient(tiny_model, pairs, layout, remat):
    expected_state, expected = update(tiny_model, pack(pairs, PackingLayout(0, packing=False, share_prompt=False)))
    for micro_batches in (1, layout.row_multiple):
        state, metrics = update(tiny_model, pack(pairs, layout), micro_batches, remat)
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
        for leaf, wanted in zip(jax.tree.leaves(state.model), jax.tree.leaves(expected_state.model)):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-5)


def test_a_sliding_window_is_counted_along_the_path_in_every_layout(pairs):
    from easydel.modules.llama import LlamaForCausalLM
    from tests.tiny import tiny_config

    model = LlamaForCausalLM.init(tiny_config(layer_windows=(None, 6)), jax.random.key(1))
    chosen, rejected = one_by_one(model, pairs)
    for layout in LAYOUTS[::2]:
        batch = pack(pairs, layout)
        scored = score(model, batch)
        np.testing.assert_allclose(in_order(batch, scored.chosen), chosen, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(in_order(batch, scored.rejected), rejected, rtol=1e-5, atol=1e-4)


def test_completion_lengths_count_scored_tokens(pairs):
    batch = pack(pairs, PackingLayout(0))
    chosen, rejected = completion_lengths(batch)
    np.testing.assert_array_equal(in_order(batch, chosen), [pair.chosen_loss_mask.sum() for pair in pairs])
    np.testing.assert_array_equal(in_order(batch, rejected), [pair.rejected_loss_mask.sum() for pair in pairs])


def test_a_nonfinite_loss_skips_the_update(tiny_model, pairs):
    batch = pack(pairs, PackingLayout(0))
    spoilt = batch | {"pair_weight": np.where(batch["pair_mask"], np.nan, 0).astype(np.float32)}
    state, metrics = update(tiny_model, spoilt)
    assert metrics["nonfinite"] and not np.isfinite(metrics["loss"])
    assert int(state.step) == 1
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state.model, tiny_model))


OBJECTIVES = {
    "ld_alpha": (SIGMOID, ScoringOptions(ld_alpha=0.3)),
    "weighting": (SIGMOID, ScoringOptions(with_weight=True)),
    "list": (
        make_objective(["ipo", "sft"], {"beta": 0.1, "f_divergence_type": "js_divergence"}, [1.0, 0.5], rpo_alpha=0.7),
        ScoringOptions(),
    ),
    "aot": (make_objective(["aot"], {"beta": 0.1, "label_smoothing": 0.1}), ScoringOptions()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_or_knob_sees_the_layout_or_the_accumulation(tiny_model, pairs, name):
    objective, scoring = OBJECTIVES[name]
    _, expected = update(tiny_model, pack(pairs, LAYOUTS[-1]), objective=objective, scoring=scoring)
    for micro_batches in (1,) if name == "aot" else (1, 4):
        _, metrics = update(tiny_model, pack(pairs, LAYOUTS[1]), micro_batches, objective=objective, scoring=scoring)
        for metric in ("loss", "grad_norm", "rewards/margins"):
            np.testing.assert_allclose(metrics[metric], expected[metric], rtol=1e-5, atol=1e-5, err_msg=metric)


def test_ld_alpha_discounts_what_lies_beyond_the_shorter_completion(tiny_model, pairs):
    batch = pack(pairs, PackingLayout(0))
    alpha = 0.25
    discounted = score_pairs(tiny_model, batch, ScoringOptions(ld_alpha=alpha))
    for index, pair in enumerate(pairs):
        shorter = min(pair.chosen_loss_mask.sum(), pair.rejected_loss_mask.sum())
        for ids, mask, found in (
            (pair.chosen_ids, pair.chosen_loss_mask, discounted.chosen),
            (pair.rejected_ids, pair.rejected_loss_mask, discounted.rejected),
        ):
            sequence = np.concatenate([pair.prompt_ids, ids])
            log_probs = jax.nn.log_softmax(tiny_model(jnp.array(sequence)[None])[0])
            logps = np.asarray(log_probs[np.arange(pair.prompt_ids.size - 1, sequence.size - 1), ids])[mask]
            weights = np.where(np.arange(logps.size) < shorter, 1.0, alpha)
            assert in_order(batch, found)[index] == pytest.approx((weights * logps).sum(), rel=1e-4)


def test_the_weight_of_a_pair_is_that_of_the_paper(tiny_model, pairs):
    batch = pack(pairs, PackingLayout(0))
    found = in_order(batch, score_pairs(tiny_model, batch, ScoringOptions(with_weight=True)).log_weight)
    for index, pair in enumerate(pairs):
        log_weight = 0.0
        for ids, mask in ((pair.chosen_ids, pair.chosen_loss_mask), (pair.rejected_ids, pair.rejected_loss_mask)):
            sequence = np.concatenate([pair.prompt_ids, ids])
            log_probs = jax.nn.log_softmax(tiny_model(jnp.array(sequence)[None])[0])
            log_probs = log_probs[pair.prompt_ids.size - 1 : -1][mask]
            picked = log_probs[np.arange(len(log_probs)), ids[mask]]
            log_weight += float(jnp.mean(picked - jnp.log(jnp.sum(jnp.exp(2 * log_probs), axis=-1))))
        assert found[index] == pytest.approx(log_weight, rel=1e-4)
