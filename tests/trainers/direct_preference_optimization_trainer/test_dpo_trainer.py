"""The trainer as its users meet it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import operator
import pickle
import time

import absl.flags
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset

import easydel
from easydel import DPOConfig, DPOTrainer, EasyDeLState
from easydel.data.batching.packing import PackingLayout, pack
from easydel.data.faults import DataError
from easydel.data.sources.base import ShardedDataSource
from easydel.data.sources.huggingface import HuggingFaceSource
from easydel.infra.mesh import put_batch
from easydel.modules.llama import LlamaForCausalLM
from easydel.trainers.run.checkpoints import Checkpoints
from easydel.trainers.trainer import Trainer
from easydel.trainers.trainer_protocol import NonFiniteError, SelfCheckError, TrainerConfigureDataloaderOutput
from tests.tiny import tiny_config

QUIET = {"save_directory": None, "progress_bar": False}


def config(**options) -> DPOConfig:
    return DPOConfig(**(QUIET | {"total_batch_size": 4, "learning_rate": 1e-2} | options))


@pytest.fixture
def dataset(rows) -> Dataset:
    return Dataset.from_list(rows)


@pytest.fixture
def make(tiny_model, tokenizer, dataset):
    def make(reference=None, model=None, eval_dataset=None, train_dataset=dataset, collator=None, **options):
        return DPOTrainer(
            config(**options), model or tiny_model, reference, tokenizer, train_dataset, eval_dataset, collator
        )

    return make


def losses(trainer) -> list[float]:
    return [line["train/loss"] for line in trainer.train().log_history if "train/loss" in line]


def copy_of(model):
    return jax.tree.map(lambda leaf: leaf.copy(), model)


def test_path_names_order_and_defaults_are_the_documented_ones():
    from easydel.trainers import DPOTrainer as from_trainers
    from easydel.trainers.direct_preference_optimization_trainer.dpo_trainer import DPOTrainer as from_module

    assert easydel.DPOTrainer is from_trainers is from_module
    parameters = inspect.signature(DPOTrainer).parameters
    documented = ["arguments", "model", "reference_model", "processing_class"]
    documented += ["train_dataset", "eval_dataset", "data_collator"]
    assert [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == documented
    assert [parameters[name].default for name in documented] == [inspect.Parameter.empty] * 2 + [None] * 5
    assert issubclass(DPOTrainer, Trainer)


def test_the_documented_example_runs_as_printed(tmp_path, monkeypatch, tiny_model, tokenizer, dataset):
    monkeypatch.chdir(tmp_path)  # it writes a run folder
    model, reference_model, preference_dataset = tiny_model, copy_of(tiny_model), dataset
    config = DPOConfig(
        beta=0.1,
        loss_type="sigmoid",
        max_length=512,
        learning_rate=5e-6,
    )
    trainer = DPOTrainer(
        arguments=config,
        model=model,
        reference_model=reference_model,
        processing_class=tokenizer,
        train_dataset=preference_dataset,
    )
    trainer.train()
    assert trainer.processing_class is tokenizer
    assert trainer.padding_value == tokenizer.pad_token_id
    assert isinstance(trainer.reference_state, EasyDeLState)
    assert trainer.log_history[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("policy_kind", ["module", "state"])
@pytest.mark.parametrize("reference_kind", ["none", "same object", "module", "state"])
def test_any_combination_of_module_state_and_none_gives_the_same_run(make, tiny_model, policy_kind, reference_kind):
    policy = tiny_model if policy_kind == "module" else tiny_model.to_state()
    other = copy_of(tiny_model)
    reference = {"none": None, "same object": policy, "module": other, "state": other.to_state()}[reference_kind]
    before = np.asarray(tiny_model.embed_tokens.weight).copy()
    trainer = make(reference, policy)
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(losses(make()), abs=1e-6)
    # The caller's objects live on, unchanged; the trainer's own model has moved.
    np.testing.assert_array_equal(np.asarray(tiny_model.embed_tokens.weight), before)
    np.testing.assert_array_equal(np.asarray(other.embed_tokens.weight), before)
    assert np.abs(np.asarray(trainer.model.embed_tokens.weight) - before).max() > 0
    assert trainer.reference_state.opt_state is None


def test_training_learns_the_preference(make, dataset):
    trainer = make(num_train_epochs=4, eval_dataset=dataset)
    output = trainer.train()
    assert output.metrics["eval/rewards/accuracies"] > 0.9
    assert output.metrics["eval/rewards/margins"] > 0.5
    assert output.metrics["train/loss"] < 0.3


def test_another_reference_needs_no_margin_of_zero_but_the_same_vocabulary(make):
    other = LlamaForCausalLM.init(tiny_config(), jax.random.key(9))
    assert losses(make(other))[0] != pytest.approx(math.log(2), abs=1e-3)
    with pytest.raises(ValueError, match="vocabulary of 70 tokens, model has 64"):
        make(LlamaForCausalLM.init(tiny_config(vocab_size=70), jax.random.key(9)))


def test_a_state_gives_its_model_and_the_run_its_own_optimiser(make, tiny_model):
    used_up = make(max_training_steps=2).train().state
    trainer = make(model=used_up, max_training_steps=2, learning_rate=1e-3, scheduler="constant")
    log = trainer.train().log_history
    assert [line["train/learning_rate"] for line in log] == pytest.approx([1e-3, 1e-3])
    assert log[0]["train/rewards/margins"] == 0.0
    with pytest.raises(ValueError, match="has made 2 updates"):
        trainer.train()


@pytest.mark.devices
@pytest.mark.parametrize("options", [{"packing": False}, {"share_prompt": False}, {"gradient_accumulation_steps": 2}])
def test_layout_and_accumulation_change_no_number(make, options, monkeypatch, tmp_path):
    expected = make().train().log_history
    # A cache of its own, so that the reference is scored in this layout as well.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = make(**options).train().log_history
    assert len(found) == len(expected) == 3
    for line, wanted in zip(found, expected):
        for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm", "rewards/accuracies"):
            assert line[f"train/{name}"] == pytest.approx(wanted[f"train/{name}"], rel=1e-4, abs=1e-5)


def index_order(trainer) -> list[int]:
    order = []
    for batch in trainer.dataloaders.train:
        places = np.argsort(batch["pair_order"][batch["pair_mask"]])
        order.append(batch["pair_index"][batch["pair_mask"]][places].tolist())
    return functools.reduce(operator.iadd, order, [])


def test_shuffling_differs_by_epoch_is_reproducible_and_can_be_turned_off(make):
    order = index_order(make(num_train_epochs=2))
    first, second = order[:12], order[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second and first != list(range(12))
    assert index_order(make(num_train_epochs=2)) == order
    assert index_order(make(shuffle_seed_train=1))[:12] != first
    assert index_order(make(shuffle_train_dataset=False, num_train_epochs=2)) == 2 * list(range(12))
    # The layout does not choose which pairs an update sees.
    assert index_order(make(num_train_epochs=2, packing=False)) == order


class Streamed(ShardedDataSource):
    """A source of one's own, which can only be read in order."""

    def __init__(self, rows):
        self.rows = rows

    shard_names = ("first", "second")

    def open_shard(self, name):
        return iter(self.rows[:6] if name == "first" else self.rows[6:])


STREAMS = {
    "IterableDataset": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "filtered": lambda rows: HuggingFaceSource(Dataset.from_list(rows)).filter(lambda row: True),
    "own": Streamed,
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_trains_and_evaluates_like_the_same_rows_by_number(make, rows, kind):
    stream = STREAMS[kind](rows)
    options = {"shuffle_train_dataset": False, "num_train_epochs": 2, "max_training_steps": 6}
    streamed = make(train_dataset=stream, eval_dataset=stream, **options)
    by_number = make(eval_dataset=Dataset.from_list(rows), **options)
    first, second = (trainer.train().log_history for trainer in (streamed, by_number))
    assert len(first) == len(second)
    for line, other in zip(first, second):
        timeless = {key for key in line if not any(word in key for word in ("per_second", "mfu"))}
        # A stream has no known epoch.
        assert timeless == {key for key in other if not any(w in key for w in ("per_second", "mfu", "epoch"))}
        for key in timeless:
            assert line[key] == pytest.approx(other[key], abs=1e-6), key


def test_a_shuffled_stream_trains_on_every_row_each_epoch(make, rows):
    def order(**options):
        trainer = make(train_dataset=Streamed(rows), max_training_steps=6, num_train_epochs=2, **options)
        return [index for batch in trainer.dataloaders.train for index in batch["pair_index"][batch["pair_mask"]]]

    one = order(shuffle_buffer_size=5)
    assert sorted(one) == sorted([*range(12), *range(12)]) and one[:12] != one[12:]
    assert one == order(shuffle_buffer_size=5) != order(shuffle_buffer_size=5, shuffle_seed_train=1)


def test_options_that_do_not_go_with_the_data_are_refused(make, rows):
    with pytest.raises(ValueError, match="set max_training_steps"):
        make(train_dataset=Streamed(rows))
    with pytest.raises(ValueError, match="shuffle_buffer_size=5 has no effect.*shuffled whole"):
        make(shuffle_buffer_size=5)


def test_evaluation_before_on_schedule_and_at_the_end_on_named_sets(make, rows):
    sets = {"all": Dataset.from_list(rows), "few": Dataset.from_list(rows[:3])}
    trainer = make(eval_dataset=sets, evaluation_steps=2, num_train_epochs=1)
    log = trainer.train().log_history
    assert [line["step"] for line in log if "eval/all/loss" in line] == [0, 2, 3]
    assert all("eval/few/rewards/accuracies" in line for line in log if "eval/all/loss" in line)
    assert log[0]["eval/all/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["eval/all/rewards/accuracies"] == 0.5  # ties count one half
    assert [line["step"] for line in log if "train/loss" in line] == [1, 2, 3]


@pytest.mark.devices
def test_evaluation_is_exact_whatever_the_batch_size_and_counts_the_tail(make, rows):
    other = LlamaForCausalLM.init(tiny_config(), jax.random.key(9))
    results = [make(other, eval_batch_size=size).evaluate(Dataset.from_list(rows[:7])) for size in (1, 3, 7, 32)]
    for result in results[1:]:
        for name, value in results[0].items():
            if name != "eval/pairs_per_second" and "padding" not in name:
                assert result[name] == pytest.approx(value, rel=1e-5), name


def test_evaluating_needs_no_training_set_and_changes_nothing(make, rows):
    trainer = make(train_dataset=None, eval_dataset=Dataset.from_list(rows))
    first = trainer.evaluate()
    assert trainer.evaluate()["eval/loss"] == first["eval/loss"]
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()


def test_log_lines_are_means_over_their_pairs_and_are_kept_in_a_file(make, tmp_path):
    every = make().train().log_history
    trainer = make(log_steps=3, save_directory=str(tmp_path), report_to=("tensorboard",))
    output = trainer.train()
    (line,) = output.log_history
    assert line["step"] == 3
    for name in ("train/loss", "train/logps/chosen", "train/grad_norm"):
        assert line[name] == pytest.approx(np.mean([one[name] for one in every]), rel=1e-5)
    assert line["train/num_tokens"] == sum(one["train/num_tokens"] for one in every)
    assert line["train/epoch"] == 1.0
    assert output.run_folder == tmp_path / "dpo"
    written = [json.loads(text) for text in (output.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert written == output.log_history
    assert list(output.run_folder.glob("events.out.tfevents.*"))
    assert make(save_directory=str(tmp_path)).train().run_folder == tmp_path / "dpo-2"


def test_every_promised_metric_is_logged(make, dataset):
    metrics = make(eval_dataset=dataset).train().metrics
    promised = ["loss", "padding_fraction", "truncated_fraction", "dropped_rows", "pairs_per_second"]
    promised += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "margin_size", "accuracies")]
    promised += [f"{name}/{side}" for name in ("logps", "completion_length") for side in ("chosen", "rejected")]
    training = ["grad_norm", "learning_rate", "epoch", "num_tokens", "tokens_per_second", "mfu"]
    # And no other: a perplexity, say, would mean nothing here.
    assert metrics.keys() == {f"train/{name}" for name in promised + training} | {f"eval/{name}" for name in promised}
    assert metrics["train/completion_length/chosen"] > 10
    assert 0 < metrics["train/padding_fraction"] < 1


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"scheduler": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"scheduler": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"scheduler": "cosine"}, [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
        ({"scheduler": "constant", "warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
        ({"scheduler": "linear", "warmup_ratio": 0.5}, [0.5, 1.0, 1.0, 0.5]),
    ],
)
def test_schedules(make, options, expected):
    log = make(num_train_epochs=2, total_batch_size=6, learning_rate=1e-3, **options).train().log_history
    assert [line["train/learning_rate"] for line in log] == pytest.approx(
        [1e-3 * value for value in expected], abs=1e-9
    )


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("lion", marks=pytest.mark.slow), "adafactor"])
def test_weights_stand_still_as_the_learning_rate_goes_to_zero_and_only_matrices_decay(make, tiny_model, optimizer):
    still = make(optimizer=optimizer, learning_rate=1e-12, weight_decay=1.0, max_training_steps=2)
    still.train()
    for new, old in zip(jax.tree.leaves(still.model), jax.tree.leaves(tiny_model)):
        np.testing.assert_allclose(new, old, atol=1e-6)
    runs = [
        make(optimizer=optimizer, weight_decay=decay, max_training_steps=1, learning_rate=1e-3) for decay in (0.0, 0.5)
    ]
    for run in runs:
        run.train()
    plain, decayed = (run.model for run in runs)
    shrunk = plain.layers.mlp.up_proj.weight - 1e-3 * 0.5 * tiny_model.layers.mlp.up_proj.weight
    np.testing.assert_allclose(decayed.layers.mlp.up_proj.weight, shrunk, atol=1e-7)
    np.testing.assert_array_equal(decayed.norm.weight, plain.norm.weight)


@pytest.mark.parametrize("log_steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_an_evaluation_takes_nothing_from_the_training_speed(make, rows, monkeypatch, log_steps):
    trainer = make(eval_dataset=Dataset.from_list(rows), evaluation_steps=2, num_train_epochs=4, log_steps=log_steps)
    measure = trainer.measure
    monkeypatch.setattr(trainer, "measure", lambda sets: (time.sleep(2), measure(sets))[1])
    started = time.perf_counter()
    log = [line for line in trainer.train().log_history if "train/loss" in line]
    seconds = sum(4 * log_steps / line["train/pairs_per_second"] for line in log)
    # Seven evaluations slept two seconds each.
    assert seconds < time.perf_counter() - started - 13
    assert all(line["train/pairs_per_second"] < 4 * log_steps / 0.0005 for line in log)


def test_max_training_steps_ends_the_run(make):
    trainer = make(num_train_epochs=10, max_training_steps=2)
    assert len(losses(trainer)) == 2 == trainer.total_steps


@pytest.mark.devices
def test_reference_log_probs_come_in_the_order_of_the_rows(make, rows, tiny_model):
    trainer = make()
    collate = trainer.create_grain_collect_function(512)
    chosen, rejected = trainer.compute_reference_log_probs(trainer.state, collate(rows))
    assert chosen.shape == rejected.shape == (12,) and chosen.dtype == jnp.float32
    one_by_one = [trainer.compute_reference_log_probs(trainer.state, collate([row])) for row in rows]
    np.testing.assert_allclose(chosen, [c[0] for c, _ in one_by_one], rtol=1e-5)
    np.testing.assert_allclose(rejected, [r[0] for _, r in one_by_one], rtol=1e-5)


def test_ready_made_reference_columns_are_used_and_checked(make, rows):
    trainer = make()
    batch = trainer.create_grain_collect_function(512)(rows)
    chosen, rejected = (np.asarray(side) for side in trainer.compute_reference_log_probs(trainer.state, batch))
    ready = [
        row | {"ref_chosen_logps": float(c), "ref_rejected_logps": float(r)}
        for row, c, r in zip(rows, chosen, rejected)
    ]
    assert losses(make(train_dataset=Dataset.from_list(ready))) == pytest.approx(losses(make()), abs=1e-5)
    # Another model's log-probs are taken as they are; half a set of them is an error.
    foreign = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -9.0} for row in rows]
    assert losses(make(train_dataset=Dataset.from_list(foreign)))[0] != pytest.approx(math.log(2), abs=1e-3)
    with pytest.raises(DataError, match="give both columns in every row or in none"):
        make(train_dataset=Dataset.from_list(foreign[:6] + rows[6:])).train()


def test_the_self_check_catches_a_reference_scored_differently(make, tiny_model):
    trainer = make()
    other = LlamaForCausalLM.init(tiny_config(), jax.random.key(9))
    trainer.reference_state = trainer.reference_state.replace(model=other)
    with pytest.raises(SelfCheckError, match="self-check failed"):
        trainer.train()


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_bfloat16_passes_the_self_check(make, gradient_checkpointing, rows):
    bigger = tiny_config(hidden_size=64, head_dim=16, num_hidden_layers=4, layer_windows=(None,) * 4)
    model = LlamaForCausalLM.init(bigger, jax.random.key(0), dtype=jnp.bfloat16)
    log = make(model=model, gradient_checkpointing=gradient_checkpointing).train().log_history
    assert log[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_the_grain_collate_function_works_in_a_real_pipeline_and_honours_both_arguments(make, rows):
    trainer = make()
    pipeline = grain.MapDataset.source(rows).batch(4, batch_fn=trainer.create_grain_collect_function(512))
    batches = list(pipeline)
    assert [batch["pair_mask"].sum() for batch in batches] == [4, 4, 4]
    whole = batches[0]
    short = trainer.create_grain_collect_function(60)(rows[:4])
    assert (short["target_slots"] >= 0).sum() < (whole["target_slots"] >= 0).sum()
    trainer = make(max_prompt_length=30)
    ends, starts = (trainer.create_grain_collect_function(60, mode)(rows[:1]) for mode in ("keep_end", "keep_start"))
    assert (ends["input_ids"] != starts["input_ids"]).any()


def assert_same(batch: dict, other: dict) -> None:
    assert batch.keys() == other.keys()
    for key, value in batch.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_the_collate_functions_work_in_the_worker_processes_of_grain(make, rows):
    absl.flags.FLAGS.mark_as_parsed()  # Grain reads its flags when it starts processes
    collate = make().create_grain_collect_function(64)
    batches = grain.MapDataset.source(rows).batch(4, batch_fn=collate).to_iter_dataset()
    in_workers = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    for here, there in zip(batches, in_workers, strict=True):
        assert_same(here, there)
    assert b"jax" not in pickle.dumps(make().create_tfds_collect_function(64))


def test_the_tfds_collate_function_gives_the_batch_of_the_grain_function(make, rows, tokenizer):
    trainer = make()
    from_rows, from_columns = trainer.create_grain_collect_function(64), trainer.create_tfds_collect_function(64)
    text = [{"prompt": f"tell me {i} ", "chosen": f"please {i}.", "rejected": f"no {i}?"} for i in range(4)]
    as_bytes = {key: np.array([row[key].encode() for row in text], object) for key in text[0]}
    assert_same(from_columns(as_bytes), from_rows(text))
    ids = [{key: tokenizer(row[key])["input_ids"] for key in row} for row in text]
    as_arrays = {key: [np.array(row[key], np.int64) for row in ids] for key in ids[0]}
    assert_same(from_columns(as_arrays), from_rows(ids))
    as_features = {
        key: [{name: [message[name].encode() for message in row[key]] for name in ("role", "content")} for row in rows]
        for key in ("prompt", "chosen", "rejected")
    }
    assert_same(from_columns(as_features), from_rows(rows))
    with pytest.raises(DataError, match="differ in length"):
        from_columns({"prompt": ["a"], "chosen": ["b", "c"], "rejected": ["d"]})


@pytest.mark.devices
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_reference_follows_the_policy_by_exactly_the_mixup(make, tiny_model, alpha):
    policies = []

    class Keep(easydel.TrainerCallback):
        def on_step_end(self, trainer, step):
            policies.append(np.asarray(trainer.model.norm.weight))

    trainer = make(sync_ref_model=True, ref_model_mixup_alpha=alpha, ref_model_sync_steps=2, num_train_epochs=2)
    trainer.add_callback(Keep())
    log = trainer.train().log_history
    expected = np.asarray(tiny_model.norm.weight)
    for policy in policies[1::2]:
        expected = alpha * policy + (1 - alpha) * expected
    np.testing.assert_allclose(trainer.reference_state.model.norm.weight, expected, rtol=1e-6)
    if alpha == 1.0:  # the reference is the policy again, so the next update starts at margin 0
        assert log[2]["train/rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    plain = make(num_train_epochs=2).train().log_history
    assert [line["train/loss"] for line in log[:2]] == pytest.approx([line["train/loss"] for line in plain[:2]])
    assert log[2]["train/loss"] != pytest.approx(plain[2]["train/loss"], rel=1e-3)


def test_a_moving_or_free_reference_refuses_fixed_log_probs(make, rows):
    ready = Dataset.from_list([row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows])
    for options in ({"sync_ref_model": True}, {"reference_free": True}):
        with pytest.raises(ValueError, match="drop the columns"):
            make(train_dataset=ready, **options).train()


def test_a_data_collator_gets_pairs_and_gives_the_batch(make):
    from easydel.data.batching.packing import PackingLayout, pack

    sizes = []

    def collator(pairs):
        sizes.append(len(pairs))
        return pack(pairs, PackingLayout(padding_value=1, packing=False, row_multiple=8))

    assert losses(make(collator=collator)) == pytest.approx(losses(make()), abs=1e-5)
    assert sizes == [4, 4, 4]


def test_row_weights_scale_the_loss(make, rows):
    weighted = [row | {"weight": 0.5} for row in rows]
    found = losses(make(train_dataset=Dataset.from_list(weighted), max_training_steps=1))
    assert found[0] == pytest.approx(math.log(2) / 2, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"packing": False, "share_prompt": False}])
def test_rpo_alpha_adds_the_mean_token_loss_of_the_chosen_completions(make, options):
    plain, added = (
        make(max_training_steps=1, rpo_alpha=rpo_alpha, **options).train().log_history[0] for rpo_alpha in (None, 0.5)
    )
    sft = -plain["train/logps/chosen"] / plain["train/completion_length/chosen"]
    assert added["train/loss"] == pytest.approx(plain["train/loss"] + 0.5 * sft, rel=1e-5)
    assert added["train/grad_norm"] != pytest.approx(plain["train/grad_norm"], rel=1e-3)


def test_reference_free_takes_a_uniform_reference_and_keeps_no_model(make, tiny_model):
    trainer = make(reference_free=True, max_training_steps=1)
    assert trainer.reference_state is None
    (line,) = trainer.train().log_history
    assert line["train/rewards/chosen"] == pytest.approx(0.1 * line["train/logps/chosen"], rel=1e-5)
    with pytest.raises(ValueError, match="reference_model has no effect with reference_free=True"):
        make(tiny_model, reference_free=True)


def test_bad_rows_stop_a_run_before_it_starts_or_are_counted_once(make, rows):
    with pytest.raises(DataError, match="rejected"):
        make(train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b"}] * 4))
    with pytest.raises(DataError, match="no rows"):
        make(train_dataset=open_source_of([]))
    empty = dict(rows[0], chosen=[{"role": "assistant", "content": ""}])
    mostly_bad = Dataset.from_list([*rows, empty, empty])
    with pytest.raises(DataError, match="2 of 14 rows cannot be used, over the limit of 5 %"):
        make(train_dataset=mostly_bad)
    trainer = make(train_dataset=mostly_bad, eval_dataset=mostly_bad, max_dropped_share=0.2, num_train_epochs=3)
    metrics = trainer.train().metrics
    assert metrics["train/dropped_rows"] == metrics["eval/dropped_rows"] == 2
    assert metrics["train/epoch"] <= 3
    assert trainer.tally.dropped == {"empty completion": 2}
    assert trainer.tally.rows_seen == 14


def open_source_of(rows: list[dict]) -> easydel.ShardedDataSource:
    class Rows(easydel.ShardedDataSource):
        shard_names = ("rows",)
        has_random_access = True

        def open_shard(self, name):
            return iter(rows)

        def shard_length(self, name):
            return len(rows)

        def read_row(self, name, row):
            return rows[row]

    return Rows()


def test_a_tokenizer_of_another_model_is_noticed(make, tiny_model):
    small = LlamaForCausalLM.init(tiny_config(vocab_size=40), jax.random.key(0))
    with pytest.raises(DataError, match="not this model's tokenizer"):
        make(model=small).train()
    with pytest.raises(ValueError, match="token id 999"):
        tiny_model.generate([[5, 999]])


def test_nonfinite_updates_are_skipped_then_end_the_run(make, rows, tiny_model):
    broken = dataclasses.replace(
        tiny_model, norm=dataclasses.replace(tiny_model.norm, weight=tiny_model.norm.weight * jnp.nan)
    )
    with pytest.raises(NonFiniteError, match="2 in a row"):
        make(model=broken, max_nonfinite_steps=2).train()
    spoilt = [row | {"weight": 1e38 if index > 3 else 1.0} for index, row in enumerate(rows)]
    trainer = make(train_dataset=Dataset.from_list(spoilt), shuffle_train_dataset=False, max_nonfinite_steps=2)
    with pytest.raises(NonFiniteError, match="rows 8, 9, 10, 11"):
        trainer.train()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(trainer.model))


@pytest.mark.devices
def test_saving_writes_model_and_tokenizer(make, tmp_path, tokenizer):
    trainer = make(max_training_steps=1)
    trainer.train()
    trainer.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


def test_callbacks_hear_of_everything_and_their_exceptions_arrive(tiny_model, tokenizer, dataset):
    heard = []

    class Listener(easydel.TrainerCallback):
        def on_train_begin(self, trainer):
            heard.append(("begin", trainer.total_steps))

        def on_step_end(self, trainer, step):
            heard.append(("step", step))

        def on_log(self, trainer, line):
            heard.append(("log", line["step"]))
            if line["step"] == 2:
                raise KeyError("from the callback")

        def on_train_end(self, trainer):
            heard.append(("end",))

    trainer = DPOTrainer(config(), tiny_model, None, tokenizer, dataset, callbacks=[Listener()])
    with pytest.raises(KeyError, match="from the callback"):
        trainer.train()
    assert heard[0] == ("begin", 3) and heard[-1] == ("end",) and ("log", 1) in heard


@pytest.mark.parametrize(
    "options, words",
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": math.inf}, "beta=inf, expected a finite number"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"scheduler": "polynomial"}, "scheduler='polynomial', expected one of 'constant', 'linear', 'cosine'"),
        ({"optimizer": "adagrad"}, "optimizer='adagrad'"),
        ({"report_to": "tensorboard"}, "report_to='tensorboard', expected a tuple"),
        ({"total_batch_size": 4.5}, "total_batch_size=4.5, expected a whole number"),
        ({"packing": 1}, "packing=1, expected True or False"),
        ({"max_length": 256}, "max_prompt_length=128"),
        ({"max_length": -1}, "max_length=-1"),
        ({"max_prompt_length": -1}, "max_prompt_length=-1"),
        ({"max_completion_length": -1}, "max_completion_length=-1"),
        ({"padding_value": -1}, "padding_value=-1"),
        ({"extra_optimizer_kwargs": {"b1": "abc"}}, "b1='abc'"),
        ({"rpo_alpha": 0.0}, "rpo_alpha=0.0"),
        ({"ref_model_sync_steps": 8}, "sync_ref_model=False"),
        ({"sync_ref_model": True, "reference_free": True}, "no effect with reference_free=True"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha=0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"loss_type": "sigmoyd"}, "loss_type='sigmoyd'"),
        ({"max_prompt_length": 512}, "max_prompt_length=512 leaves no room"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle'"),
        ({"max_prompt_length": None, "truncation_mode": "keep_start"}, "has no effect"),
        ({"total_batch_size": 0}, "total_batch_size=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "both set the warm-up"),
        ({"extra_optimizer_kwargs": {"beta1": 0.9}}, "beta1"),
        ({"report_to": ("tensorboard",)}, "save_directory"),
        ({"do_eval": False, "evaluation_steps": 3}, "no effect"),
        ({"shuffle_train_dataset": False, "shuffle_seed_train": 1}, "shuffle_seed_train=1 has no effect"),
        ({"shuffle_train_dataset": False, "shuffle_buffer_size": 5}, "shuffle_buffer_size=5 has no effect"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size=0"),
        ({"shuffle_seed_train": -1}, "shuffle_seed_train=-1, expected a whole number from 0"),
    ],
)
def test_bad_options_are_refused_when_the_config_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_options_that_need_an_evaluation_set_say_so(make, tiny_model, dataset):
    for options in ({"do_eval": True}, {"evaluation_steps": 3}):
        with pytest.raises(ValueError, match="eval_dataset"):
            make(**options)


def test_a_tokenizer_without_padding_needs_a_padding_value(tiny_model, dataset, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    bare.chat_template = tokenizer.chat_template
    with pytest.raises(ValueError, match="padding_value"):
        DPOTrainer(config(), tiny_model, None, bare, dataset)
    assert DPOTrainer(config(padding_value=2), tiny_model, None, bare, dataset).padding_value == 2
    with pytest.raises(ValueError, match="processing_class"):
        DPOTrainer(config(), tiny_model, None, None, dataset)


def test_the_documented_methods_have_the_documented_parameters():
    required = inspect.Parameter.empty
    collect = {"max_sequence_length": required, "truncation_mode": "keep_end"}
    documented = {
        "compute_reference_log_probs": {"state": required, "padded_batch": required},
        "configure_dataloaders": {},
        "configure_functions": {},
        "create_grain_collect_function": collect,
        "create_tfds_collect_function": collect,
        "on_step_end": {"state": required, "metrics": required, "step": required},
    }
    for method, parameters in documented.items():
        _, *found = inspect.signature(getattr(DPOTrainer, method)).parameters.values()
        assert [(parameter.name, parameter.default) for parameter in found] == list(parameters.items()), method


class MadeWhenRead(ShardedDataSource):
    """So many rows, made when they are read, and how many were."""

    shard_names = ("rows",)
    has_random_access = True

    def __init__(self, rows, length):
        self.rows, self.length, self.read = rows, length, 0

    def open_shard(self, name):
        return (self.read_row(name, number) for number in range(self.length))

    def shard_length(self, name):
        return self.length

    def read_row(self, name, row):
        self.read += 1
        return self.rows[row % len(self.rows)]


@pytest.mark.parametrize("length", [1_000, 1_000_000])
def test_the_first_update_reads_a_few_rows_of_however_many(make, rows, tmp_path, length):
    source = MadeWhenRead(rows, length)
    # With a folder, so that the run's identity is taken too.
    trainer = make(train_dataset=source, max_training_steps=1, save_directory=str(tmp_path))
    assert source.read < 40
    trainer.train()
    assert source.read < 300


@pytest.mark.devices
def test_configured_functions_are_steps_that_can_be_called_the_mesh_and_the_checkpoints(make, rows):
    trainer = make()
    functions = trainer.configure_functions()
    assert functions.mesh is trainer.mesh and isinstance(functions.checkpoint_manager, Checkpoints)
    batch = trainer.create_grain_collect_function(512)(rows[:4])
    with jax.set_mesh(functions.mesh):
        prepared = trainer.prepare_batch(trainer.state, batch, put_batch(batch, functions.mesh))
        evaluated = functions.sharded_evaluation_step_function(trainer.state, prepared)
        state, metrics = functions.sharded_training_step_function(trainer.state, prepared)
    assert isinstance(state, EasyDeLState) and int(state.step) == 1
    assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(evaluated["loss"]) == pytest.approx(math.log(2), abs=1e-6)


def test_configured_dataloaders_give_every_batch_of_the_run_and_each_set(make, dataset):
    loaders = make(eval_dataset={"few": dataset.select(range(5))}, num_train_epochs=2).configure_dataloaders()
    assert isinstance(loaders, TrainerConfigureDataloaderOutput)
    assert (loaders.steps, loaders.steps_per_epoch) == (6, 3.0)
    for _ in range(2):  # as often as they are iterated
        assert [int(batch["pair_mask"].sum()) for batch in loaders.train] == [4] * 6
        assert [int(batch["pair_mask"].sum()) for batch in loaders.evaluation["few"]] == [4, 1]


def test_what_on_step_end_gives_back_is_logged_and_trained_on(tiny_model, tokenizer, dataset):
    seen = []

    class Own(DPOTrainer):
        def on_step_end(self, state, metrics, step):
            state, metrics = super().on_step_end(state, metrics, step)
            seen.append((type(metrics), step, float(metrics["loss"])))
            if step == 3:
                state = state.replace(model=jax.tree.map(jnp.zeros_like, state.model))
            return state, {"loss": metrics["loss"], "twice the step": 2.0 * step}

    output = Own(config(), tiny_model, None, tokenizer, dataset).train()
    assert [(kind, step) for kind, step, _ in seen] == [(dict, 1), (dict, 2), (dict, 3)]
    assert [line["train/twice the step"] for line in output.log_history] == [2.0, 4.0, 6.0]
    assert [line["train/loss"] for line in output.log_history] == pytest.approx([loss for *_, loss in seen])
    assert "train/rewards/margins" not in output.log_history[0]
    assert not any(leaf.any() for leaf in jax.tree.leaves(output.state.model))


@pytest.mark.parametrize("value", [[1.0, 2.0], (1.0, 2.0), np.arange(2.0)], ids=["list", "tuple", "array"])
def test_a_metric_of_several_numbers_is_logged_as_it_was_given(tiny_model, tokenizer, dataset, tmp_path, value):
    class Own(DPOTrainer):
        def on_step_end(self, state, metrics, step):
            return state, metrics | {"several": value}

    trainer = Own(config(save_directory=str(tmp_path)), tiny_model, None, tokenizer, dataset)
    log = trainer.train().log_history
    assert list(log[0]["train/several"]) == list(value)


class FewMethods:
    """A tokenizer that is no `transformers` one: `tokenizers` behind the few methods that are needed."""

    bos_token_id = None

    def __init__(self, tokenizer):
        self._backend, self.apply_chat_template = tokenizer.backend_tokenizer, tokenizer.apply_chat_template
        self.pad_token_id, _, self.eos_token_id = self.all_special_ids = [0, 1, 2]

    def __len__(self):
        return self._backend.get_vocab_size()

    def __call__(self, text, *, add_special_tokens, return_offsets_mapping):
        one = isinstance(text, str)
        found = self._backend.encode_batch([text] if one else text, add_special_tokens=add_special_tokens)
        ids, offsets = [encoding.ids for encoding in found], [encoding.offsets for encoding in found]
        return {"input_ids": ids[0] if one else ids, "offset_mapping": offsets[0] if one else offsets}

    def decode(self, ids):
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def convert_ids_to_tokens(self, ids):
        return [self._backend.id_to_token(token) for token in ids]


def test_an_object_with_the_few_methods_of_a_tokenizer_will_do(make, tiny_model, tokenizer, dataset):
    assert losses(DPOTrainer(config(), tiny_model, None, FewMethods(tokenizer), dataset)) == losses(make())


def test_means_over_a_window_weigh_a_small_last_update_by_its_pairs(make):
    other = LlamaForCausalLM.init(tiny_config(), jax.random.key(9))
    still = {"learning_rate": 1e-30, "weight_decay": 0.0}
    (whole,) = make(other, total_batch_size=12, **still).train().log_history
    (ragged,) = make(other, total_batch_size=5, log_steps=3, **still).train().log_history  # 5, 5 and 2 pairs
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "completion_length/rejected"):
        assert ragged[f"train/{name}"] == pytest.approx(whole[f"train/{name}"], rel=1e-4), name


def test_tokens_are_counted_without_padding_and_truncated_pairs_are_told(make, rows, tokenizer):
    def count(messages, **options) -> int:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return len(tokenizer(text)["input_ids"])

    # A tree is the prompt, once, and two answers; no line break follows their stop token.
    prompts = [count(row["prompt"], add_generation_prompt=True) for row in rows]
    paths = [count(row["prompt"] + row[side]) - 1 for row in rows for side in ("chosen", "rejected")]
    for packing in (True, False):
        (line,) = make(packing=packing, log_steps=3).train().log_history
        assert line["train/num_tokens"] == sum(paths) - sum(prompts)
        assert line["train/truncated_fraction"] == 0.0
    too_long = [len(row["rejected"][0]["content"]) + 1 > 30 for row in rows]
    assert 0 < sum(too_long) < len(rows)
    (line,) = make(max_completion_length=30, log_steps=3).train().log_history
    assert line["train/truncated_fraction"] == pytest.approx(sum(too_long) / len(rows))


def test_useful_arithmetic_leaves_padding_and_the_reference_out(make, rows):
    trainer = make()
    batches = [make(packing=packing).create_grain_collect_function(512)(rows) for packing in (True, False)]
    assert batches[0]["input_ids"].size != batches[1]["input_ids"].size
    head = 2 * trainer.model.config.vocab_size * trainer.model.config.hidden_size
    for batch in batches:
        tokens, targets = int((batch["segment_ids"] > 0).sum()), int((batch["target_slots"] >= 0).sum())
        found = trainer.batch_statistics(batch)
        assert found.flops == tokens * trainer.model.training_flops_per_token + 3 * targets * head
    assert trainer.batch_statistics(batches[0]).flops == trainer.batch_statistics(batches[1]).flops


def test_a_run_says_at_its_end_which_rows_were_dropped(make, rows, caplog):
    empty = dict(rows[0], chosen=[{"role": "assistant", "content": ""}])
    make(train_dataset=Dataset.from_list([*rows, empty]), max_dropped_share=0.2).train()
    assert "train_dataset: dataset, row 12: " in caplog.text
    assert "1 of 13 rows was dropped for this reason (empty completion" in caplog.text


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_both_arguments_reach_the_tfds_collate_function(make, mode):
    trainer = make(max_prompt_length=None)
    text = [
        {"prompt": f"tell me about number {i} ", "chosen": f"please {i}.", "rejected": f"no {i}?"} for i in range(4)
    ]
    columns = {name: [row[name].encode() for row in text] for name in text[0]}
    batch = trainer.create_tfds_collect_function(24, mode)(columns)
    assert batch["pair_truncated"][batch["pair_mask"]].all()
    assert_same(batch, trainer.create_grain_collect_function(24, mode)(text))


def test_a_processor_stands_for_its_tokenizer(make, tiny_model, tokenizer, dataset):
    class Processor:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    processor = Processor(tokenizer)
    trainer = DPOTrainer(config(), tiny_model, None, processor, dataset)
    assert trainer.processing_class is processor and trainer.padding_value == tokenizer.pad_token_id
    assert losses(trainer) == losses(make())


@pytest.mark.devices
def test_a_collate_function_that_loses_pairs_or_gives_an_odd_number_of_rows_is_named(make):
    even = PackingLayout(padding_value=0, row_multiple=jax.device_count())
    with pytest.raises(DataError, match="was given 4 pairs and gave a batch of 2"):
        make(collator=lambda pairs: pack(pairs[:2], even)).train()
    odd = PackingLayout(padding_value=0, packing=False)
    with pytest.raises(DataError, match="a multiple of"):
        make(collator=lambda pairs: pack(pairs, odd), gradient_accumulation_steps=3, total_batch_size=5).train()
