"""Preference training of adapters alone."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from datasets import Dataset

import easydel
from easydel import DPOConfig, DPOTrainer, EasyDeLState
from easydel.data.batching.packing import PackingLayout, pack
from easydel.layers.lora import adapters, split_trainable
from easydel.modules.llama import LlamaForCausalLM
from easydel.trainers.direct_preference_optimization_trainer.preference_loss import PreferenceLoss
from easydel.trainers.direct_preference_optimization_trainer.scoring import ScoringOptions
from easydel.trainers.step import training_step
from tests.layers.test_lora import moved
from tests.tiny import tiny_config
from tests.trainers.direct_preference_optimization_trainer.test_layouts import LAYOUTS, SIGMOID, reference_of

LN2 = math.log(2)


@pytest.fixture
def make(tiny_model, tokenizer, rows):
    def make(reference=None, model=None, eval_dataset=None, callbacks=(), **options):
        options = {"lora_rank": 4, "total_batch_size": 4, "learning_rate": 3e-2} | options
        config = DPOConfig(save_directory=None, progress_bar=False, **options)
        dataset = Dataset.from_list(rows)
        return DPOTrainer(config, model or tiny_model, reference, tokenizer, dataset, eval_dataset, callbacks=callbacks)

    return make


def losses(trainer) -> list[float]:
    return [line["train/loss"] for line in trainer.train().log_history if "train/loss" in line]


def pointers(model) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)]


def values(model) -> list[np.ndarray]:
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(model)]


def assert_same_bits(model, expected: list[np.ndarray]) -> None:
    for leaf, wanted in zip(jax.tree.leaves(model), expected, strict=True):
        np.testing.assert_array_equal(leaf, wanted)


def test_adapters_learn_the_preference_from_ln_2_on(make, rows):
    output = make(num_train_epochs=4, eval_dataset=Dataset.from_list(rows)).train()
    first = next(line for line in output.log_history if "train/loss" in line)
    assert first["train/loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["train/rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert output.metrics["eval/rewards/accuracies"] > 0.9
    assert output.metrics["train/loss"] < 0.3


@pytest.mark.skipif(jax.device_count() > 1, reason="compares the buffers of one device")
def test_the_base_is_shared_with_the_caller_and_never_changes_by_a_bit(make, tiny_model):
    before, where = values(tiny_model), pointers(tiny_model)
    trainer = make(num_train_epochs=2)
    assert pointers(trainer.model.without_lora()) == where
    adapters_before = values(split_trainable(trainer.model)[0])
    state = trainer.train().state
    assert pointers(state.model.without_lora()) == where == pointers(tiny_model)
    assert_same_bits(tiny_model, before)
    for leaf, start in zip(jax.tree.leaves(split_trainable(state.model)[0]), adapters_before, strict=True):
        assert np.abs(np.asarray(leaf) - start).max() > 1e-4
    assert tiny_model.generate([[5, 6]], max_new_tokens=2)  # the caller's model lives on


def test_the_optimiser_knows_of_the_adapters_alone(make, tiny_model):
    trainer = make(lora_pattern="q_proj|v_proj")
    trainable = split_trainable(trainer.model)[0]
    moments = [leaf for leaf in jax.tree.leaves(trainer.state.opt_state) if leaf.ndim]
    assert sorted(leaf.shape for leaf in moments) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(trainable)])
    assert sum(leaf.size for leaf in moments) == 2 * trainer.model.num_trainable_parameters


def test_decay_and_clipping_concern_the_adapters_alone(tiny_model, pairs):
    model, batch = moved(tiny_model.apply_lora_to_layers(4)), pack(pairs, PackingLayout(0))
    state = EasyDeLState.create(model, optax.adamw(0.5, b1=0.0, b2=0.0, eps=1e30, weight_decay=0.2))
    after, metrics = step_of(batch)(state)
    # An update of decay alone: what is trained shrinks by a tenth, the base stays.
    for path, adapter in adapters(after.model).items():
        np.testing.assert_allclose(adapter.b, 0.9 * adapters(model)[path].b, rtol=1e-6)
    assert_same_bits(after.model.without_lora(), values(tiny_model))
    gradient = jax.tree.leaves(split_trainable(step_of(batch)(EasyDeLState.create(model, optax.sgd(1.0)))[0].model)[0])
    before = jax.tree.leaves(split_trainable(model)[0])
    norm = math.sqrt(sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(before, gradient)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def step_of(batch, micro_batches=1, **options):
    step = functools.partial(
        training_step,
        loss=PreferenceLoss(SIGMOID, ScoringOptions(), np.dtype(np.float32)),
        count_micro_batches=lambda *_: micro_batches,
        remat=False,
        **options,
    )
    compiled = jax.jit(step)
    return lambda state: compiled(state, batch | reference_of(batch))


@pytest.mark.parametrize("layout", LAYOUTS[::3], ids=str)
def test_layout_and_accumulation_change_no_gradient_of_an_adapter(tiny_model, pairs, layout):
    state = EasyDeLState.create(moved(tiny_model.apply_lora_to_layers(4)), optax.sgd(1.0))
    expected, metrics = step_of(pack(pairs, PackingLayout(0, packing=False, share_prompt=False)))(state)
    for micro_batches in (1, layout.row_multiple):
        found, numbers = step_of(pack(pairs, layout), micro_batches)(state)
        assert float(numbers["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
        for leaf, wanted in zip(jax.tree.leaves(found.model), jax.tree.leaves(expected.model), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_policy_with_adapters_off_and_no_second_model(make, tiny_model, rows):
    trainer = make()
    assert trainer.reference_state is None
    batch = trainer.create_grain_collect_function(512)(rows)
    whole = make(lora_rank=None)
    expected = whole.compute_reference_log_probs(whole.state, batch)
    trainer.train()
    for found, wanted in zip(trainer.compute_reference_log_probs(trainer.state, batch), expected):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # The state passed in is the one that counts.
    other = LlamaForCausalLM.init(tiny_config(), jax.random.key(9)).to_state()
    assert np.abs(trainer.compute_reference_log_probs(other, batch)[0] - expected[0]).max() > 1
    assert losses(make(tiny_model)) == pytest.approx(losses(make()), abs=1e-6)
    assert losses(make(jax.tree.map(jnp.copy, tiny_model))) == pytest.approx(losses(make()), abs=1e-5)


@pytest.mark.skipif(jax.device_count() > 1, reason="compares the buffers of one device")
def test_adapters_that_have_learnt_are_their_own_reference(make, tiny_model):
    model = moved(tiny_model.apply_lora_to_layers(4))
    trainer = make(model=model, lora_rank=None)
    before = values(model)
    assert pointers(trainer.reference_state.model.without_lora()) == pointers(tiny_model)
    log = trainer.train().log_history
    assert log[0]["train/loss"] == pytest.approx(LN2, abs=1e-6)
    assert log[-1]["train/rewards/margins"] > 0
    assert_same_bits(trainer.reference_state.model, before)
    assert_same_bits(model, before)
    # Another reference may be given; the policy as it was before the adapters is one.
    assert losses(make(tiny_model, model, lora_rank=None))[0] != pytest.approx(LN2, abs=1e-3)


def test_new_adapters_on_top_of_old_ones_need_a_merge(make, tiny_model):
    old = moved(tiny_model.apply_lora_to_layers(4))
    with pytest.raises(ValueError, match="lora_rank=4, but the model has adapters already"):
        make(model=old)
    assert losses(make(model=old.merge_lora()))[0] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_reference_that_follows_adapters_is_mixed_in_the_weights(make, tiny_model, alpha):
    kept = []

    class Keep(easydel.TrainerCallback):
        def on_step_end(self, trainer, step):
            adapter = trainer.model.layers.mlp.up_proj.lora
            kept.append((np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)))

    trainer = make(
        callbacks=[Keep()],
        sync_ref_model=True,
        ref_model_mixup_alpha=alpha,
        ref_model_sync_steps=2,
        num_train_epochs=2,
        lora_alpha=6,
        lora_pattern="up_proj",
    )
    log = trainer.train().log_history
    base = np.asarray(tiny_model.layers.mlp.up_proj.weight, np.float64)
    expected = base
    for a, b in kept[1::2]:
        expected = alpha * (base + 6 / 4 * b @ a) + (1 - alpha) * expected
    reference = trainer.reference_state.model
    np.testing.assert_allclose(reference.layers.mlp.up_proj.weight, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - base).max() > 1e-2
    # Everything else is the policy's own array.
    same = [x is y for x, y in zip(jax.tree.leaves(reference), jax.tree.leaves(trainer.model.without_lora()))]
    assert same.count(False) == 1
    if alpha == 1.0:
        assert log[2]["train/rewards/margins"] == pytest.approx(0.0, abs=1e-4)


def test_a_following_reference_starts_from_the_adapters_that_were_loaded(make, tiny_model):
    model = moved(tiny_model.apply_lora_to_layers(4, pattern="up_proj"))
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 3}
    trainer = make(model=model, lora_rank=None, **options)
    trainer.train()
    start, end = (m.merge_lora().layers.mlp.up_proj.weight for m in (model, trainer.model))
    reference = trainer.reference_state.model
    np.testing.assert_allclose(reference.layers.mlp.up_proj.weight, (start + end) / 2, rtol=1e-5, atol=1e-6)
    assert reference.embed_tokens.weight is trainer.model.embed_tokens.weight


def test_dropout_changes_training_but_no_evaluation_and_can_be_repeated(make, tiny_model, rows):
    plain, dropped, again = losses(make()), losses(make(lora_dropout=0.5)), losses(make(lora_dropout=0.5))
    assert plain[0] == dropped[0] == pytest.approx(LN2, abs=1e-6)  # a fresh adapter adds nothing, dropped or not
    assert dropped == again
    assert np.abs(np.subtract(plain, dropped)).max() > 1e-3
    assert losses(make(lora_dropout=0.5, lora_seed=1)) != dropped
    model = moved(tiny_model.apply_lora_to_layers(4, dropout=0.5))
    steady = moved(tiny_model.apply_lora_to_layers(4))
    found, expected = (make(tiny_model, m, lora_rank=None).evaluate(Dataset.from_list(rows)) for m in (model, steady))
    assert found["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-6)
    assert make(model=model, lora_rank=None).train().state is not None  # no self-check where the first step drops


def test_dropout_is_drawn_anew_each_step_and_micro_batch(tiny_model, pairs):
    model = moved(tiny_model.apply_lora_to_layers(4, dropout=0.5))
    state = EasyDeLState.create(model, optax.sgd(1.0))
    batch = pack(pairs, PackingLayout(0, row_multiple=2))
    step = step_of(batch, dropout_seed=3)
    loss = float(step(state)[1]["loss"])
    assert float(step(state)[1]["loss"]) == loss
    assert abs(float(step(state.replace(step=jnp.int32(1)))[1]["loss"]) - loss) > 1e-4
    # Twice the same row: in two micro-batches it sees two draws.
    row = pack(pairs[:1], PackingLayout(0))
    twice = {key: np.repeat(value, 2, axis=0) for key, value in row.items()}
    one, two = (step_of(rows, count)(state)[1]["logps/chosen"] for rows, count in ((row, 1), (twice, 2)))
    assert abs(float(one) - float(two)) > 1e-3


def test_a_state_with_adapters_saves_and_loads(make, tmp_path):
    trained = make().train().state
    trained.save_state(tmp_path / "state")
    fresh = make().state
    loaded = fresh.load_state(tmp_path / "state")
    assert jax.tree.structure(loaded.model) == jax.tree.structure(trained.model)
    assert_same_bits(loaded, values(trained))
    with pytest.raises(ValueError, match="lora"):
        make(lora_rank=2).state.load_state(tmp_path / "state")


def test_saving_writes_the_merged_model_or_the_adapter(make, tmp_path, tiny_model):
    trainer = make(max_training_steps=1)
    trainer.train()
    trainer.save_adapter(tmp_path / "adapter", base_model_name_or_path="some/model")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    loaded = tiny_model.load_adapter(tmp_path / "adapter")
    assert_same_bits(split_trainable(loaded)[0], values(split_trainable(trainer.model)[0]))


def test_adapters_learn_beside_a_base_of_8_bits(make, rows, tmp_path, tiny_model):
    trainer = make(quantize_base="int8", num_train_epochs=4, eval_dataset=Dataset.from_list(rows))
    assert trainer.reference_state is None and trainer.model.is_quantized
    base = values(trainer.model.without_lora())
    output = trainer.train()
    first = next(line for line in output.log_history if "train/loss" in line)
    assert first["train/loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["train/rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert output.metrics["eval/rewards/accuracies"] > 0.9
    assert_same_bits(trainer.model.without_lora(), base)
    output.state.save_state(tmp_path / "state")
    loaded = make(quantize_base="int8").state.load_state(tmp_path / "state")
    assert_same_bits(loaded.model, values(trainer.model))


def test_a_model_may_come_quantised(make, tiny_model):
    model = tiny_model.quantize()
    assert losses(make(model=model)) == pytest.approx(losses(make(quantize_base="int8")), abs=1e-6)
    with pytest.raises(ValueError, match="quantised already"):
        make(model=model, quantize_base="int8")
    with pytest.raises(ValueError, match="no optimiser can train"):
        make(model=model, lora_rank=None)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"quantize_base": "int8", "sync_ref_model": True}, "keeps in 8 bits"),
        ({"quantize_base": "int4"}, "quantize_base='int4', expected one of 'int8' or None"),
        ({"lora_rank": 0}, "lora_rank=0, expected None or a whole number of at least 1"),
        ({"lora_alpha": -1.0}, "lora_alpha=-1.0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0, expected a share from 0 to below 1"),
        ({"lora_pattern": "q_proj("}, "is no regular expression"),
        ({"lora_seed": -1}, "lora_seed=-1"),
        *(
            ({"lora_rank": None, name: value}, f"{name}={value!r} has no effect with lora_rank=None")
            for name, value in {
                "lora_alpha": 8.0,
                "lora_dropout": 0.1,
                "lora_pattern": "q_proj",
                "use_rslora": True,
                "lora_seed": 1,
                "quantize_base": "int8",
            }.items()
        ),
    ],
)
def test_bad_options_are_refused_when_the_config_is_made(options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        DPOConfig(**({"lora_rank": 4} | options))


def test_every_option_reaches_the_adapters(make):
    options = {"lora_rank": 2, "lora_alpha": 5.0, "lora_dropout": 0.1, "lora_pattern": "k_proj", "use_rslora": True}
    ((path, adapter),) = adapters(make(**options).model).items()
    assert path == "layers.self_attn.k_proj"
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.use_rslora) == (2, 5.0, 0.1, True)
    seeds = [adapters(make(lora_seed=seed).model)["layers.self_attn.k_proj"].a for seed in (0, 1)]
    assert not np.array_equal(*seeds)
    with pytest.raises(ValueError, match="matches none of the layers"):
        make(lora_pattern="query")
