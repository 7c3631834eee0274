"""Runs that look reference log-probs up: the same numbers, fewer forward passes, less memory."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import tempfile
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset

import easydel
from easydel import DPOConfig, DPOTrainer
from easydel.data.batching.packing import PackingLayout, pack
from easydel.data.tree import PreferencePair
from easydel.infra.mesh import create_mesh
from easydel.modules.llama import LlamaForCausalLM
from easydel.trainers.direct_preference_optimization_trainer.reference import scorer as reference_scorer
from easydel.trainers.direct_preference_optimization_trainer.reference.cache import ReferenceCache
from easydel.trainers.direct_preference_optimization_trainer.reference.scorer import ReferenceScorer
from easydel.trainers.trainer_protocol import SelfCheckError
from tests.tiny import tiny_config
from tests.trainers.direct_preference_optimization_trainer.test_dpo_trainer import STREAMS

OPTIONS = {"total_batch_size": 4, "learning_rate": 1e-2, "save_directory": None, "progress_bar": False}


class Counted:
    """A trainer whose runs of the reference over a batch are counted."""

    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer

    @property
    def passes(self) -> int:
        return self.trainer.reference_statistics.passes

    @property
    def stored(self) -> int:
        return self.trainer.reference_statistics.stored

    def losses(self) -> list[float]:
        return [line["train/loss"] for line in self.trainer.train().log_history if "train/loss" in line]


@pytest.fixture
def make(tiny_model, tokenizer, rows):
    def make(reference=None, model=None, train=None, evaluation=None, collator=None, tokenizer=tokenizer, **options):
        train = Dataset.from_list(rows) if train is None else train
        config = DPOConfig(**(OPTIONS | options))
        return Counted(
            DPOTrainer(config, model or tiny_model, reference, tokenizer, train, evaluation, data_collator=collator)
        )

    return make


def other_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.init(tiny_config(), jax.random.key(9))


def live_embeddings() -> int:
    """How many models' embeddings, or arrays of their shape, are in memory."""
    gc.collect()
    config = tiny_config()
    return sum(array.shape == (config.vocab_size, config.hidden_size) for array in jax.live_arrays())


def with_keys(pairs: list[PreferencePair]) -> dict[str, np.ndarray]:
    """A collate function that packs trees."""
    return pack(pairs, PackingLayout(padding_value=0, row_multiple=jax.device_count()))


def without_keys(pairs: list[PreferencePair]) -> dict[str, np.ndarray]:
    """The same, but its pairs can't be looked up."""
    return {name: value for name, value in with_keys(pairs).items() if name != "pair_keys"}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_token_ids(rows: list[dict], tokenizer) -> list[dict]:
    return [
        {field: tokenizer(row[field][0]["content"])["input_ids"] for field in ("prompt", "chosen", "rejected")}
        for row in rows
    ]


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ["Dataset", "ShardedDataSource", "token ids"])
def test_a_second_run_scores_nothing_and_has_the_same_trace(make, rows, tokenizer, tmp_path, kind, precompute):
    train = {
        "Dataset": lambda: Dataset.from_list(rows),
        "ShardedDataSource": lambda: easydel.open_source(write(tmp_path / "rows.jsonl", rows)),
        "token ids": lambda: Dataset.from_list(as_token_ids(rows, tokenizer)),
    }[kind]()
    first = make(other_model(), train=train, precompute_ref_log_probs=precompute, num_train_epochs=2)
    expected = first.losses()
    assert first.passes == 3  # twelve rows; the second epoch needs none
    second = make(other_model(), train=train, precompute_ref_log_probs=precompute, num_train_epochs=2)
    assert second.losses() == expected
    assert second.passes == 0


@pytest.mark.devices
def test_precomputed_log_probs_give_the_trace_of_a_reference_that_is_asked_every_time(
    make, rows, monkeypatch, tmp_path
):
    evaluation = Dataset.from_list(rows[:5])
    filled = make(other_model(), precompute_ref_log_probs=True, evaluation=evaluation, collator=with_keys)
    cached = filled.trainer.train()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = make(other_model(), evaluation=evaluation, collator=without_keys)
    expected = asked.trainer.train()
    assert asked.passes == 3 + 2 * 2
    for line, wanted in zip(cached.log_history, expected.log_history, strict=True):
        for name in ("train/loss", "eval/loss", "train/logps/chosen", "train/rewards/margins"):
            assert line.get(name) == pytest.approx(wanted.get(name), abs=1e-6)


UNRELATED = {
    "objective": {"beta": 0.5, "loss_type": "ipo"},
    "ld_alpha": {"ld_alpha": 0.5},
    "weighting": {"use_weighting": True},
    "batch": {"total_batch_size": 6},
    "accumulation": {"gradient_accumulation_steps": 2},
    "layout": {"packing": False, "share_prompt": False},
    "order": {"shuffle_seed_train": 1},
    "optimiser": {"learning_rate": 1e-4, "optimizer": "lion"},
    "a limit that cuts nothing": {"max_length": 400},
}


@pytest.mark.parametrize("options", UNRELATED.values(), ids=UNRELATED)
def test_an_unrelated_option_computes_nothing_again(make, options, tmp_path):
    make().losses()
    again = make(**options, save_directory=str(tmp_path))
    again.trainer.train()
    assert again.passes == 0


def test_every_related_change_computes_all_again(make, tiny_model, tokenizer, rows):
    make().losses()
    template = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    template.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant ").replace("}}\n{{", "}} {{")
    changed = {
        "weights": make(other_model()),
        "compute dtype": make(dataclasses.replace(tiny_model, dtype=np.dtype(jnp.bfloat16))),
        "truncation": make(max_completion_length=8),
        "template": make(tokenizer=template),
    }
    for name, run in changed.items():
        run.trainer.train()
        assert run.passes == 3, name


def test_a_fill_that_breaks_off_goes_on_where_it_was(make, monkeypatch):
    broken = make(precompute_ref_log_probs=True, total_batch_size=2)
    score = ReferenceScorer.score

    def break_off(scorer, policy, batch):
        if broken.passes == 4:
            raise KeyboardInterrupt
        return score(scorer, policy, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReferenceScorer, "score", break_off)
        broken.trainer.train()
    assert broken.stored == 8
    resumed = make(precompute_ref_log_probs=True, total_batch_size=2)
    resumed.losses()
    assert resumed.passes == 2


def test_a_checkpoint_leaves_nothing_on_its_way_that_a_kill_could_lose(make, tmp_path):
    kept = []

    class Listener(easydel.TrainerCallback):
        def on_save(self, trainer, step, checkpoint):
            kept.append(trainer.reference_statistics.stored)

    trainer = make(other_model(), save_directory=str(tmp_path), save_steps=1).trainer
    trainer.add_callback(Listener())
    trainer.train()
    assert kept == [4, 8, 12]


@pytest.mark.devices
def test_precomputing_frees_the_memory_of_the_reference(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trainer = make(jax.tree.map(lambda leaf: leaf.copy(), other_model()), precompute_ref_log_probs=True).trainer
    buffers = [weakref.ref(leaf) for leaf in jax.tree.leaves(trainer.reference_state.model)]
    trainer.train()
    assert trainer.reference_state is None
    gc.collect()
    assert [buffer for buffer in buffers if buffer() is not None] == []
    assert "your program still holds them" not in caplog.text
    # The copy on disk is private and goes with the trainer.
    (folder,) = tmp_path.glob("easydel-reference-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    del trainer
    gc.collect()
    assert not folder.exists()


@pytest.mark.devices
def test_a_model_that_the_caller_still_holds_is_named(make, caplog):
    reference = other_model().shard(create_mesh())
    make(reference, precompute_ref_log_probs=True).trainer.train()
    assert "your program still holds them" in caplog.text
    assert float(reference.norm.weight.sum()) > 0


def test_a_new_set_can_be_evaluated_after_the_reference_was_freed(make, rows):
    new = Dataset.from_list([row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows])
    freed, kept = (make(other_model(), precompute_ref_log_probs=precompute) for precompute in (True, False))
    freed.trainer.train()
    before = live_embeddings()
    found = freed.trainer.evaluate({"new": new})
    assert freed.passes == 3 + 3
    assert live_embeddings() == before
    assert freed.trainer.reference_state is None
    kept.trainer.train()
    expected = kept.trainer.evaluate({"new": new})
    assert found["eval/new/loss"] == pytest.approx(expected["eval/new/loss"], abs=1e-6)
    assert kept.passes == 0


def test_log_probs_of_every_evaluation_are_kept(make, rows):
    trainer = make(evaluation={"a": Dataset.from_list(rows[:5]), "b": Dataset.from_list(rows[3:])})
    trainer.trainer.train()
    assert trainer.passes == 2 + 3  # five rows and nine; the twelve to train on are among them
    trainer.trainer.evaluate()
    trainer.trainer.evaluate(Dataset.from_list(rows))
    assert trainer.passes == 2 + 3


def test_ld_alpha_from_the_cache_is_that_of_a_reference_scored_with_it(make, rows, tiny_model):
    plain = make()
    plain.losses()
    trainer = make(ld_alpha=0.25)
    batch = trainer.trainer.create_grain_collect_function(512)(rows)
    cached = trainer.trainer.compute_reference_log_probs(trainer.trainer.state, batch)
    assert trainer.passes == 0
    asked = trainer.trainer.compute_reference_log_probs(
        trainer.trainer.state, {name: value for name, value in batch.items() if name != "pair_keys"}
    )
    assert trainer.passes == 1
    for one, other in zip(cached, asked):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    whole = plain.trainer.compute_reference_log_probs(plain.trainer.state, batch)
    assert float(jnp.abs(whole[1] - cached[1]).min()) > 0.1  # every rejected answer is the longer one


@pytest.mark.devices
def test_a_pair_that_comes_twice_has_one_value_even_within_a_batch(make, rows):
    trainer = make(train=Dataset.from_list([rows[0], rows[1], rows[0], rows[0]]), shuffle_train_dataset=False).trainer
    batch = trainer.create_grain_collect_function(512)([rows[0], rows[1], rows[0], rows[0]])
    chosen, _ = trainer.compute_reference_log_probs(trainer.state, batch)
    assert chosen[0] == chosen[2] == chosen[3] != chosen[1]
    assert trainer.reference_statistics.stored == 2


def test_stale_values_cannot_pass_the_first_step(make):
    first = make()
    first.losses()
    with pytest.MonkeyPatch.context() as patch:
        find = ReferenceCache.find
        patch.setattr(
            ReferenceCache,
            "find",
            lambda self, keys: {key: (parts[0] + 1.0, *parts[1:]) for key, parts in find(self, keys).items()},
        )
        with pytest.raises(SelfCheckError, match="were read from .*sqlite3; remove that file"):
            make().losses()
    assert make().losses()[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_moving_or_uniform_reference_is_never_kept(make, monkeypatch):
    monkeypatch.setattr(reference_scorer, "ReferenceCache", lambda digest: pytest.fail("the cache was opened"))
    moving = make(sync_ref_model=True, ref_model_sync_steps=1, num_train_epochs=2)
    moving.losses()
    assert moving.passes == 6
    assert make(reference_free=True).losses()


def test_another_reference_state_is_another_reference(make, rows):
    trainer = make(other_model())
    rows_seen = trainer.losses()
    trainer.trainer.reference_state = trainer.trainer.reference_state.replace(model=trainer.trainer.model)
    results = trainer.trainer.evaluate(Dataset.from_list(rows))
    assert rows_seen and results["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_log_probs_that_are_not_finite_are_not_kept(make, tiny_model):
    spoilt = dataclasses.replace(
        tiny_model, norm=dataclasses.replace(tiny_model.norm, weight=tiny_model.norm.weight * jnp.nan)
    )
    run = make(spoilt, max_training_steps=1)
    run.trainer.train()
    assert run.stored == 0


@pytest.mark.devices
def test_a_collate_function_without_pair_keys_is_not_cached_and_cannot_be_precomputed(make):
    for _ in range(2):
        run = make(collator=without_keys)
        assert run.losses()[0] == pytest.approx(math.log(2), abs=1e-6)
        assert run.passes == 3
    with pytest.raises(ValueError, match='data_collator gives no "pair_keys"'):
        make(collator=without_keys, precompute_ref_log_probs=True).losses()


def test_a_collate_function_that_reorders_pairs_mixes_up_no_log_probs(make):
    def collator(pairs):
        layout = PackingLayout(padding_value=0, row_multiple=jax.device_count())
        return pack(sorted(pairs, key=lambda pair: -len(pair.prompt_ids)), layout)

    assert make(collator=collator).losses()[0] == pytest.approx(math.log(2), abs=1e-6)
    again = make()
    assert again.losses()[0] == pytest.approx(math.log(2), abs=1e-6)
    assert again.passes == 0


@pytest.mark.devices
def test_the_compiled_step_cannot_tell_hits_from_misses(make):
    run = make(num_train_epochs=2, shuffle_train_dataset=False)
    prepare, seen = run.trainer.prepare_batch, []

    def spy(state, batch, device_batch):
        prepared = prepare(state, batch, device_batch)
        seen.append({name: (array.shape, array.dtype, array.sharding) for name, array in prepared.items()})
        return prepared

    run.trainer.prepare_batch = spy
    run.losses()
    assert run.passes == 3
    assert seen[:3] == seen[3:]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"reference_free": True}, "no effect with reference_free=True"),
        ({"sync_ref_model": True}, "sync_ref_model=True moves the reference"),
        ({"loss_type": "sft"}, "no effect with loss_type='sft'"),
    ],
)
def test_precomputing_without_effect_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DPOConfig(precompute_ref_log_probs=True, **options)


def test_precomputing_what_the_data_brings_is_refused(make, rows):
    ready = Dataset.from_list([row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows])
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True has no effect: the data brings"):
        make(train=ready, precompute_ref_log_probs=True).losses()
    assert make(evaluation=ready, precompute_ref_log_probs=True).losses()


def test_the_statistics_say_where_the_reference_is_and_what_was_asked(make, rows):
    run = make(other_model(), num_train_epochs=2, precompute_ref_log_probs=True)
    fresh = run.trainer.reference_statistics
    assert (fresh.status, fresh.hits, fresh.misses, fresh.passes, fresh.cache_path) == ("live", 0, 0, 0, None)
    run.losses()
    found = run.trainer.reference_statistics
    # Each of twelve pairs is scored once, before training, and looked up in both epochs.
    assert (found.status, found.hits, found.misses, found.stored) == ("offloaded", 24, 12, 12)
    assert found.cache_path is not None and found.cache_path.exists()
    assert make(lora_rank=2).trainer.reference_statistics.status == "shared"
    assert make(reference_free=True).trainer.reference_statistics.status == "none"


def test_the_fill_shows_how_far_it_is(make, capsys):
    make(precompute_ref_log_probs=True, progress_bar=True).losses()
    assert "reference log-probs of train_dataset  3 batches, done" in capsys.readouterr().err


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_can_be_precomputed_and_bring_log_probs_of_their_own(make, rows, kind, monkeypatch, tmp_path):
    options = {"shuffle_train_dataset": False, "num_train_epochs": 2, "max_training_steps": 6}
    filled = make(other_model(), train=STREAMS[kind](rows), precompute_ref_log_probs=True, **options)
    found = filled.losses()
    assert filled.trainer.reference_state is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = make(other_model(), **options)
    assert found == pytest.approx(asked.losses(), abs=1e-6)
    assert asked.passes == 3
    ready = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0 - n} for n, row in enumerate(rows)]
    streamed, by_number = (make(train=data, **options) for data in (STREAMS[kind](ready), Dataset.from_list(ready)))
    assert streamed.losses() == pytest.approx(by_number.losses(), abs=1e-6)
    assert streamed.passes == by_number.passes == 0
