"""A run whose objective reads no reference keeps none: no memory, no forward, no cache, no rewards."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.cli.dpo import read_request
from easydel.cli.failures import UsageError
from easydel.modules.llama import LlamaForCausalLM
from easydel.trainers.direct_preference_optimization_trainer import dpo_trainer
from easydel.trainers.direct_preference_optimization_trainer.reference import scorer as reference_scorer
from tests.tiny import tiny_config

QUIET = {"save_directory": None, "progress_bar": False, "total_batch_size": 4, "learning_rate": 1e-2}
READY = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}


@pytest.fixture
def make(tiny_model, tokenizer, rows):
    def make(reference=None, model=None, train_rows=rows, eval_rows=None, **options):
        config = DPOConfig(**QUIET | {"loss_type": "sft"} | options)
        evaluation = None if eval_rows is None else Dataset.from_list(eval_rows)
        return DPOTrainer(config, model or tiny_model, reference, tokenizer, Dataset.from_list(train_rows), evaluation)

    return make


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"gradient_accumulation_steps": 2}])
def test_no_reference_is_made_asked_or_kept(make, rows, monkeypatch, options):
    monkeypatch.setattr(dpo_trainer, "reference_for", lambda *_: pytest.fail("a reference was made"))
    monkeypatch.setattr(reference_scorer.ReferenceScorer, "__call__", lambda *_: pytest.fail("a pair was scored"))
    monkeypatch.setattr(reference_scorer, "ReferenceCache", lambda digest: pytest.fail("the cache was opened"))
    trainer = make(eval_rows=rows, total_batch_size=12, **options)
    assert trainer.reference_state is None
    metrics = trainer.train().metrics
    for prefix in ("train", "eval"):
        sft = -metrics[f"{prefix}/logps/chosen"] / metrics[f"{prefix}/completion_length/chosen"]
        assert metrics[f"{prefix}/loss"] == pytest.approx(sft, rel=1e-5)
    # Rewards compare with a reference, so there are none.
    assert not [name for name in metrics if "rewards" in name]
    with pytest.raises(ValueError, match="there is no reference: loss_type='sft' needs none"):
        trainer.compute_reference_log_probs(trainer.state, {})


def test_no_second_set_of_weights_is_in_memory(tokenizer, rows):
    shape = (4096, 32)

    def embeddings() -> int:
        gc.collect()
        return sum(array.shape == shape for array in jax.live_arrays())

    def of_a_trainer(loss_type: str) -> int:
        before = embeddings()
        trainer = DPOTrainer(
            DPOConfig(**QUIET, loss_type=loss_type, optimizer="lion"),
            LlamaForCausalLM.init(tiny_config(vocab_size=4096), jax.random.key(0)),
            None,
            tokenizer,
            Dataset.from_list(rows),
        )
        found = embeddings() - before
        del trainer
        return found

    # The weights in training and their moment; a reference would be a third.
    assert of_a_trainer("sft") == 2
    assert of_a_trainer("sigmoid") == 3


def test_what_only_a_reference_would_use_is_refused(make, tiny_model, rows):
    with pytest.raises(ValueError, match="reference_model has no effect with loss_type='sft'"):
        make(reference=tiny_model)
    with pytest.raises(ValueError, match="ref_chosen_logps and ref_rejected_logps in the data have no effect.*drop"):
        make(train_rows=[row | READY for row in rows])
    with pytest.raises(ValueError, match="ref_chosen_logps and ref_rejected_logps in the data have no effect.*drop"):
        make(eval_rows=[row | READY for row in rows])


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.2},
        {"ld_alpha": 0.5},
        {"reference_free": True},
        {"precompute_ref_log_probs": True},
        {"sync_ref_model": True},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"label_smoothing": 0.1},
        {"best_metric": "eval/rewards/accuracies", "evaluation_steps": 1, "early_stopping_patience": 1},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("loss_type", ["sft", ["sft"], ["sft", "sft"]])
def test_an_option_of_the_reference_is_refused(loss_type, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DPOConfig(loss_type=loss_type, **options)


@pytest.mark.parametrize("options", [["--loss-type", "sft"], ["--reference-free"]])
def test_the_command_refuses_a_reference_before_any_model_is_loaded(options):
    with pytest.raises(UsageError, match="reference_model=other has no effect with"):
        read_request(["--model", "m", "--train-dataset", "t.jsonl", "--reference-model", "other", *options])


def test_an_objective_beside_sft_that_reads_one_keeps_it(make, tiny_model):
    trainer = make(loss_type=["sft", "sigmoid"], max_training_steps=1)
    assert trainer.reference_state is not None
    assert trainer.train().metrics["train/rewards/accuracies"] == 0.5


def test_rows_that_all_have_weight_0_are_refused_and_an_update_of_them_is_reported(make, rows, caplog):
    weightless = [row | {"weight": 0.0} for row in rows]
    with pytest.raises(ValueError, match='row 0: "weight" is 0, as in every good row, so that nothing is trained'):
        make(train_rows=weightless)
    with pytest.raises(ValueError, match='"weight" is 0, as in every good row'):
        make(eval_rows=weightless)
    mixed = [row | {"weight": float(number < 4)} for number, row in enumerate(rows)]
    log = make(train_rows=mixed, shuffle_train_dataset=False).train().log_history
    assert [line["train/loss"] == 0 for line in log] == [False, True, True]
    assert (
        caplog.text.count("every pair of a batch has weight 0, so its loss and gradient are 0 (rows 4, 5, 6, 7)") == 1
    )


def test_the_tokens_of_a_row_and_of_the_padding_are_the_models(tiny_model, tokenizer, rows):
    small = LlamaForCausalLM.init(tiny_config(vocab_size=40), jax.random.key(0))
    data = Dataset.from_list(rows)
    with pytest.raises(ValueError, match="row 0 holds token id .*not this model's tokenizer"):
        DPOTrainer(DPOConfig(**QUIET), small, None, tokenizer, data)
    with pytest.raises(ValueError, match="padding_value=64, expected a token id of the model: 0 to 63"):
        DPOTrainer(DPOConfig(**QUIET, padding_value=64), tiny_model, None, tokenizer, data)
    beyond = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    beyond.add_special_tokens({"additional_special_tokens": [f"<{number}>" for number in range(20)]})
    beyond.add_special_tokens({"pad_token": "<more>"})
    beyond.chat_template = tokenizer.chat_template
    assert beyond.pad_token_id >= 64
    with pytest.raises(ValueError, match=f"pad token has id {beyond.pad_token_id}, .*set padding_value in DPOConfig"):
        DPOTrainer(DPOConfig(**QUIET), tiny_model, None, beyond, data)
    assert DPOTrainer(DPOConfig(**QUIET, padding_value=0), tiny_model, None, beyond, data).padding_value == 0
    with pytest.raises(TypeError, match="processing_class is str 'a/folder', expected a tokenizer"):
        DPOTrainer(DPOConfig(**QUIET), tiny_model, None, "a/folder", data)
    with pytest.raises(TypeError, match="reference_model is str 'a/folder', expected a model"):
        DPOTrainer(DPOConfig(**QUIET), tiny_model, "a/folder", tokenizer, data)


def test_an_evaluation_set_without_rows_says_so(make, rows):
    trainer = make()
    bad = Dataset.from_list([rows[0] | {"chosen": rows[0]["rejected"]}] * 3)
    used_up = Dataset.from_list(rows).to_iterable_dataset().skip(100)
    for name, empty in {"no rows": Dataset.from_list(rows).select([]), "cannot be used": bad}.items():
        with pytest.raises(ValueError, match=name):
            trainer.evaluate(empty)
    with pytest.raises(ValueError, match="no rows"):
        trainer.evaluate(used_up)
    with pytest.raises(ValueError, match="evaluate\\(\\) needs a dataset"):
        trainer.evaluate({})
    with pytest.raises((TypeError, ValueError)):
        trainer.evaluate(iter(rows))
    np.testing.assert_array_equal(trainer.evaluate(Dataset.from_list(rows))["eval/loss"] > 0, True)
