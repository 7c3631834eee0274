"""Before any training every pair ties, whatever batches, layout and cache make of the last digits."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.data.batching.packing import PackingLayout, pack
from easydel.data.preference.transform import PreferenceTransform
from easydel.data.tree import PreferencePair
from easydel.infra.mesh import create_mesh, put_batch
from easydel.modules.llama import LlamaForCausalLM
from easydel.ops.mesh_axes import data_parallel_size
from easydel.trainers.direct_preference_optimization_trainer.preference_loss import margin_rounding
from easydel.trainers.direct_preference_optimization_trainer.scoring import (
    PairLogps,
    ScoringOptions,
    score_in_micro_batches,
    score_pairs,
)
from tests.tiny import random_pair, tiny_config

QUIET = {"save_directory": None, "progress_bar": False, "total_batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture
def make(tiny_model, tokenizer, rows):
    def make(reference=None, model=None, train_rows=rows, **options):
        data = Dataset.from_list(train_rows)
        return DPOTrainer(DPOConfig(**QUIET | options), model or tiny_model, reference, tokenizer, data, data)

    return make


def copy_of(model):
    return jax.tree.map(lambda leaf: leaf.copy(), model)


def assert_ties(metrics: dict[str, float], prefix: str) -> None:
    assert metrics[f"{prefix}/rewards/accuracies"] == 0.5
    assert metrics[f"{prefix}/rewards/margin_size"] == 0.0


MODES = {
    "batches of 1": {"eval_batch_size": 1},
    "batches of 5": {"eval_batch_size": 5},
    "no packing": {"packing": False, "eval_batch_size": 3},
    "a prompt each": {"packing": False, "share_prompt": False, "eval_batch_size": 7},
    "parts": {"gradient_accumulation_steps": 2},
    "small parts": {"micro_batch_tokens": 128},
    "precomputed": {"precompute_ref_log_probs": True, "packing": False},
    "adapters": {"lora_rank": 2},
    "other divergence": {"f_divergence_type": "js_divergence"},
}


@pytest.mark.devices
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_every_pair_ties_before_training_in_every_mode(make, rows, options):
    # Log-probs of half the pairs are kept already, from another layout and other batches.
    make(packing=False, eval_batch_size=2).evaluate(Dataset.from_list(rows[::2]))
    trainer = make(**options, max_training_steps=1)
    log = trainer.train().log_history
    assert_ties(log[0], "eval")
    assert_ties(log[1], "train")


@pytest.mark.parametrize("kind", ["same object", "copy"])
def test_every_pair_ties_with_the_policy_itself_as_the_reference(make, tiny_model, kind):
    reference = tiny_model if kind == "same object" else copy_of(tiny_model)
    make(packing=False).evaluate()
    for size in (1, 5, 12):
        assert_ties(make(reference, eval_batch_size=size).evaluate(), "eval")


def test_a_margin_after_one_small_update_is_no_tie(make):
    """A step of 1e-4 moves the margins by 1e-2 nats, a thousand times their rounding."""
    trainer = make(max_training_steps=1, learning_rate=1e-4, weight_decay=0.0, total_batch_size=12)
    metrics = trainer.train().metrics
    assert metrics["eval/rewards/accuracies"] > 0.7
    assert metrics["eval/rewards/margin_size"] >= metrics["eval/rewards/margins"] > 0


def test_a_margin_that_is_no_number_is_no_tie(make, tiny_model):
    norm = dataclasses.replace(tiny_model.norm, weight=tiny_model.norm.weight * jnp.nan)
    metrics = make(model=dataclasses.replace(tiny_model, norm=norm)).evaluate()
    assert np.isnan(metrics["eval/rewards/margin_size"]) and np.isnan(metrics["eval/rewards/accuracies"])


def test_an_evaluation_comes_to_the_same_numbers_each_time(make, rows):
    trainer = make(reference=LlamaForCausalLM.init(tiny_config(), jax.random.key(9)), eval_batch_size=5)
    named = {"a": Dataset.from_list(rows), "b": Dataset.from_list(rows)}

    def numbers(metrics, prefix):
        return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}

    first = numbers(trainer.evaluate(), "eval/")
    both = trainer.evaluate(named)
    for again in (numbers(trainer.evaluate(), "eval/"), numbers(both, "eval/a/"), numbers(both, "eval/b/")):
        again.pop("pairs_per_second")
        assert again == {name: value for name, value in first.items() if name != "pairs_per_second"}


LAYOUTS = {
    "packed": PackingLayout(padding_value=0, row_multiple=data_parallel_size(create_mesh())),
    "a row each": PackingLayout(padding_value=0, packing=False, row_multiple=data_parallel_size(create_mesh())),
    "a prompt each": PackingLayout(
        padding_value=0, packing=False, share_prompt=False, row_multiple=data_parallel_size(create_mesh())
    ),
}


def spread_of_margins(model, pairs: list[PreferencePair]) -> tuple[np.ndarray, np.ndarray]:
    """Each pair's largest difference of margins between layouts and programs, and what counts as its rounding."""
    mesh = create_mesh()
    model = model.shard(mesh)

    def with_gradient(model, batch) -> PairLogps:
        def total(model):
            scored = score_pairs(model, batch, ScoringOptions(), remat=True)
            return jnp.sum(scored.chosen - scored.rejected), scored

        (_, scored), gradient = jax.value_and_grad(total, has_aux=True)(model)
        return scored, jax.tree.map(jnp.sum, gradient)

    found = []
    for layout, trains in itertools.product(LAYOUTS.values(), (False, True)):
        batch = pack(pairs, layout)
        sent = {name: value for name, value in put_batch(batch, mesh).items() if name != "pair_keys"}
        with jax.set_mesh(mesh):
            if trains:
                scored, _ = jax.jit(with_gradient)(model, sent)
            else:
                score = jax.jit(
                    lambda model, batch, layout=layout: score_in_micro_batches(
                        model, batch, ScoringOptions(), layout.count_micro_batches
                    )
                )
                scored = score(model, sent)
        order = batch["pair_order"]
        places = np.argsort(order[order >= 0])
        found.append(np.stack([np.asarray(side)[order >= 0][places] for side in (scored.chosen, scored.rejected)]))
    logps = np.stack(found)
    margins = logps[:, 0] - logps[:, 1]
    tokens = np.array([pair.chosen_loss_mask.sum() + pair.rejected_loss_mask.sum() for pair in pairs])
    size = 2 * np.abs(logps).sum(axis=1).max(axis=0)
    return np.ptp(margins, axis=0), np.asarray(margin_rounding(jnp.asarray(size), jnp.asarray(tokens), model.dtype))


@pytest.mark.parametrize(
    ("dtype", "longest"),
    [
        ("float32", 40),
        ("bfloat16", 40),
        *(pytest.param(dtype, 2000, marks=pytest.mark.slow) for dtype in ("float32", "bfloat16")),
    ],
)
def test_the_rule_covers_what_layouts_make_of_a_margin(dtype, longest):
    model = LlamaForCausalLM.init(tiny_config(max_position_embeddings=8192), jax.random.key(0), dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    spread, rounding = spread_of_margins(model, [random_pair(rng, index, longest) for index in range(8)])
    print(f"{dtype}, up to {longest} tokens: at most {(spread / rounding).max():.2f} of the rule")
    assert (spread <= rounding).all()
    # The rule is not arbitrarily wide: deep models need far more of it than this one of two layers.
    assert (spread / rounding).max() > 1 / 100


@pytest.mark.slow
def test_the_rule_covers_a_real_model(smollm2):
    """In float32: the settings under which tests compile know no bfloat16 product of this size."""
    model, tokenizer = smollm2
    transform = PreferenceTransform(tokenizer)
    rows = [
        {
            "prompt": f"Tell me about {thing}. ",
            "chosen": f"{thing} is good. " * n,
            "rejected": f"I know no {thing}. " * n,
        }
        for n, thing in enumerate(("tea", "the sea", "chess", "ink"), start=1)
    ]
    pairs = [transform(row, index) for index, row in enumerate(rows)]
    spread, rounding = spread_of_margins(model, pairs)
    print(f"SmolLM2: at most {(spread / rounding).max():.2f} of the rule, {spread.max():.2g} nats")
    assert (spread <= rounding).all()
