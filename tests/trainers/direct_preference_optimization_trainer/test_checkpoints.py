"""Checkpoints, and runs that are interrupted and go on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from filelock import FileLock

from easydel import DPOConfig, DPOTrainer
from easydel.modules.llama import LlamaForCausalLM
from easydel.trainers.callbacks.callback import TrainerCallback
from easydel.trainers.callbacks.stopping import EarlyStopping
from easydel.trainers.run.checkpoints import ARRAYS, FOLDER, latest_checkpoint, read_metadata
from easydel.trainers.run.identity import as_json
from tests.layers.test_lora import moved
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[3]
SPEEDS = ("per_second", "mfu")


def run_program(folder: Path, mode: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"{__package__}.interrupted_run", str(folder), mode, *options]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(SPEEDS)} for line in lines]


@pytest.fixture
def make(tiny_model, tokenizer, rows, tmp_path):
    def make(callbacks=(), model=tiny_model, reference=None, train_rows=rows, eval_rows=None, **options):
        options = {
            "save_directory": str(tmp_path),
            "model_name": "run",
            "progress_bar": False,
            "total_batch_size": 4,
            "learning_rate": 1e-2,
        } | options
        evaluation = None if eval_rows is None else Dataset.from_list(eval_rows)
        train = Dataset.from_list(train_rows)
        return DPOTrainer(DPOConfig(**options), model, reference, tokenizer, train, evaluation, callbacks=callbacks)

    return make


class FailAt(TrainerCallback):
    def __init__(self, step: int, event: str = "on_step_end"):
        self._step = step
        setattr(self, event, self._fail)

    def _fail(self, trainer, *arguments):
        if int(trainer.state.step) >= self._step:
            raise RuntimeError("the disk of the tracker is full")


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("log_steps=3",), marks=pytest.mark.slow),
        ("sync_ref_model=true", "ref_model_sync_steps=3", "evaluation_steps=2"),
        pytest.param(("lora_rank=2", "lora_dropout=0.1"), marks=pytest.mark.slow),
        pytest.param(("lora_rank=2", "sync_ref_model=true", "ref_model_sync_steps=3"), marks=pytest.mark.slow),
    ],
    ids=["plain", "a log line across the kill", "a moving reference and evaluations", "adapters", "adapters followed"],
)
def test_a_killed_run_goes_on_with_the_very_same_numbers(tmp_path, options):
    whole = run_program(tmp_path / "a", "whole", *options)
    assert whole.returncode == 0, whole.stderr
    killed = run_program(tmp_path / "b", "kill", *options)
    assert killed.returncode == -signal.SIGKILL
    assert latest_checkpoint(tmp_path / "b/run").name == "4"
    resumed = run_program(tmp_path / "b", "resume", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert "update 4 of 9" in resumed.stderr
    assert log_of(tmp_path / "b/run") == log_of(tmp_path / "a/run")


@pytest.mark.devices
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adafactor", "extra_optimizer_kwargs": {"min_dim_size_to_factor": 8}},
        {"extra_optimizer_kwargs": {"mu_dtype": "bfloat16"}, "lora_rank": 2},
    ],
    ids=["factored moments", "first moments of adapters in bfloat16"],
)
def test_a_smaller_optimiser_state_goes_on_with_the_very_same_numbers(make, options):
    options |= {"num_train_epochs": 2, "save_steps": 3}
    whole = make(**options).train()
    again = make(resume_from_checkpoint=str(whole.run_folder / FOLDER / "3"), **options).train()
    assert log_of(again.run_folder) == log_of(whole.run_folder)
    assert equal(again.state, whole.state)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: dataclasses.replace(model, attention_backend="xla"),
        lambda model: dataclasses.replace(model, dtype=jnp.dtype(jnp.bfloat16)),
        lambda model: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model),
        lambda model: moved(model.apply_lora_to_layers(2)),
        lambda model: model.quantize(),
    ],
    ids=["another backend", "computing in bfloat16", "kept in bfloat16", "with adapters", "quantised"],
)
def test_a_following_reference_of_another_make_goes_on_with_the_very_same_numbers(make, tiny_model, change):
    reference = change(jax.tree.map(lambda leaf: 1.01 * leaf, tiny_model))
    options = {"reference": reference, "sync_ref_model": True, "ref_model_sync_steps": 2}
    options |= {"num_train_epochs": 2, "save_steps": 1}
    trainer = make(**options)
    whole = trainer.train()
    mixed = trainer.reference_state.model
    assert (mixed.dtype, mixed.attention_backend) == (reference.dtype, reference.attention_backend)
    for step in (1, 3):
        again = make(resume_from_checkpoint=str(whole.run_folder / FOLDER / str(step)), **options).train()
        assert log_of(again.run_folder) == log_of(whole.run_folder)


def test_a_reference_of_another_architecture_cannot_follow(make):
    other = LlamaForCausalLM.init(tiny_config(intermediate_size=96), jax.random.key(1))
    make(reference=other)
    with pytest.raises(ValueError, match="reference_model has intermediate_size=96 where model has 64"):
        make(reference=other, sync_ref_model=True)


@pytest.mark.parametrize(
    ("mode", "code"), [("sigterm", 143), pytest.param("sigint", -signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint(tmp_path, mode, code):
    ended = run_program(tmp_path, mode)
    assert ended.returncode == code, ended.stderr
    assert latest_checkpoint(tmp_path / "run").name == "5"
    assert [line["step"] for line in log_of(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    resumed = run_program(tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "update 5 of 9" in resumed.stderr


def test_a_checkpoint_is_the_state_of_its_step_though_training_goes_on(make):
    states = {}

    class Keep(TrainerCallback):
        def on_save(self, trainer, step, checkpoint):
            states[step] = jax.tree.map(np.array, trainer.state)

    trainer = make([Keep()], save_steps=1, num_train_epochs=2)
    trainer.train()
    assert sorted(states) == [1, 2, 3, 4, 5, 6]
    for step in states:
        trainer.load_checkpoint(trainer.run_folder / FOLDER / str(step))
        assert equal(trainer.state, states[step])


def test_the_latest_and_the_best_checkpoints_are_kept(make, rows):
    # Judged by the opposite preferences, the first checkpoint stays the best.
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:4]]
    trainer = make(
        eval_rows=swapped,
        num_train_epochs=3,
        save_steps=2,
        evaluation_steps=2,
        save_total_limit=2,
        best_metric="eval/loss",
    )
    output = trainer.train()
    losses = {line["step"]: line["eval/loss"] for line in output.log_history if "eval/loss" in line}
    del losses[0]
    best = min((step for step in losses if step % 2 == 0 or step == 9), key=losses.get)
    kept = {int(folder.name) for folder in (output.run_folder / FOLDER).glob("[0-9]*")}
    assert kept == {8, 9, best}, losses
    assert output.best_checkpoint.name == str(best)
    assert output.last_checkpoint.name == "9"
    trainer.load_checkpoint(output.best_checkpoint)
    assert trainer.evaluate()["eval/loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate"])
def test_an_exception_in_a_callback_arrives_and_the_last_good_state_is_saved(make, rows, event):
    trainer = make([FailAt(2, event)], eval_rows=rows[:4], evaluation_steps=2)
    with pytest.raises(RuntimeError, match="disk of the tracker"):
        trainer.train()
    saved = latest_checkpoint(trainer.run_folder)
    state = trainer.state
    loaded = make(eval_rows=rows[:4], evaluation_steps=2)
    loaded.load_checkpoint(saved)
    assert equal(loaded.state, state)
    again = make(eval_rows=rows[:4], evaluation_steps=2, resume_from_checkpoint=str(saved))
    assert again.train().log_history[-1]["step"] == 3


def test_an_exception_in_a_hook_or_the_data_leaves_the_state_too(make, monkeypatch):
    def fail(self, state, metrics, step):
        if step == 2:
            raise ZeroDivisionError
        return state, metrics

    monkeypatch.setattr(DPOTrainer, "on_step_end", fail)
    trainer = make()
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert latest_checkpoint(trainer.run_folder).name == "2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.2}, ["beta: the checkpoint has 0.1, this run 0.2"]),
        ({"loss_type": "ipo", "max_length": 128}, ["loss_type", "max_length", "train_dataset"]),
        ({"num_train_epochs": 2}, ["updates: the checkpoint has 3, this run 6"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_every_difference(make, changes, words):
    make(save_steps=2).train()
    with pytest.raises(ValueError, match="is of another run") as error:
        make(save_steps=2, resume_from_checkpoint="latest", max_prompt_length=32, **changes).train()
    for word in [*words, "max_prompt_length: the checkpoint has 256, this run 32"]:
        assert word in str(error.value)


def test_another_model_or_other_rows_are_another_run(make, tiny_model, rows):
    make(save_steps=2).train()
    other = jax.tree.map(lambda leaf: leaf * 1.0001, tiny_model)
    with pytest.raises(ValueError, match="model.weights: the checkpoint has"):
        make(model=other, resume_from_checkpoint="latest").train()
    with pytest.raises(ValueError, match="train_dataset.digest: the checkpoint has"):
        make(train_rows=[*rows[1:], rows[0]], resume_from_checkpoint="latest").train()
    with pytest.raises(ValueError, match="reference_model: the checkpoint has None"):
        make(reference=other, resume_from_checkpoint="latest").train()


def test_what_is_watched_and_where_memory_goes_may_change_on_the_way(make, rows):
    make(save_steps=2, max_training_steps=2).train()
    again = make(eval_rows=rows[:4], max_training_steps=2, resume_from_checkpoint="latest", log_steps=5, packing=False)
    assert [line["step"] for line in again.train().log_history if "train/loss" in line] == [1, 2]


def test_latest_without_a_checkpoint_starts_anew_and_a_finished_run_has_nothing_to_do(make, caplog):
    first = make(save_steps=10, resume_from_checkpoint="latest")
    first.train()
    assert "no checkpoint" in caplog.text
    again = make(save_steps=10, resume_from_checkpoint="latest")
    output = again.train()
    assert output.run_folder == first.run_folder
    assert equal(output.state, first.state)
    assert "update 3 of 3" in caplog.text


def test_going_on_from_an_earlier_checkpoint_is_a_run_of_its_own(make):
    first = make(save_steps=1)
    first.train()
    again = make(save_steps=1, resume_from_checkpoint=str(first.run_folder / FOLDER / "1"))
    output = again.train()
    assert output.run_folder != first.run_folder
    assert log_of(output.run_folder) == log_of(first.run_folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        make(resume_from_checkpoint=str(first.run_folder / "nowhere")).train()


def test_a_fresh_run_never_takes_up_an_old_folder(make):
    first, second = make(save_steps=2), make(save_steps=2)
    first.train()
    assert second.train().run_folder != first.run_folder
    assert [line["step"] for line in log_of(second.run_folder)] == [1, 2, 3]


def test_early_stopping_and_the_time_limit_end_a_run_with_evaluation_and_checkpoint(make, rows):
    slow = make(
        eval_rows=rows[:4],
        evaluation_steps=1,
        best_metric="eval/loss",
        early_stopping_patience=2,
        save_steps=100,
        num_train_epochs=5,
        learning_rate=1e-30,
    )
    output = slow.train()
    assert output.stop_reason == "eval/loss has not improved on 0.6931 for 2 evaluations"
    assert [line["step"] for line in output.log_history if "eval/loss" in line] == [0, 1, 2]
    assert output.last_checkpoint.name == "2"

    limited = make(eval_rows=rows[:4], max_training_seconds=1e-3, save_steps=100).train()
    assert limited.stop_reason == "max_training_seconds=0.001 have passed"
    assert limited.log_history[-1]["step"] == 1 and "eval/loss" in limited.log_history[-1]
    assert limited.last_checkpoint.name == "1"


def test_early_stopping_counts_improvements_by_the_metrics_own_direction():
    class History:
        def __init__(self, values):
            self.evaluations = {step: {"eval/rewards/accuracies": value} for step, value in enumerate(values)}
            self.reason = None

        def stop(self, reason):
            self.reason = reason

    for values, stops in (([0.5, 0.6, 0.7], False), ([0.7, 0.6, 0.7], True), ([0.7, 0.6, 0.75, 0.7], False)):
        trainer = History(values)
        EarlyStopping("eval/rewards/accuracies", patience=2).on_evaluate(trainer, {})
        assert (trainer.reason is not None) is stops


def test_a_metric_that_does_not_exist_is_named_with_those_that_do(make, rows):
    trainer = make(
        eval_rows=rows[:4], evaluation_steps=1, save_steps=1, save_total_limit=1, best_metric="eval/accuracy"
    )
    with pytest.raises(ValueError, match="'eval/accuracy' is not among .* eval/rewards/accuracies"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"save_steps": 5, "save_directory": None}, "save_steps=5 needs a folder"),
        ({"resume_from_checkpoint": "latest", "save_directory": None}, "set save_directory"),
        ({"save_total_limit": 2}, "save_total_limit=2 has no effect"),
        ({"best_metric": "eval/loss", "save_steps": 2}, "set evaluation_steps"),
        ({"best_metric": "loss", "evaluation_steps": 2}, 'a metric such as "eval/loss"'),
        ({"best_metric": "eval/loss", "evaluation_steps": 2, "save_steps": 2}, "all checkpoints are kept"),
        (
            {"best_metric": "eval/loss", "evaluation_steps": 2, "save_steps": 3, "save_total_limit": 1},
            "no multiple of evaluation_steps=2",
        ),
        ({"early_stopping_patience": 2}, "set best_metric"),
        ({"max_training_seconds": 0.0}, "above 0"),
        ({"eval_sample_tokens": 5}, "no effect without eval_samples"),
    ],
)
def test_options_of_checkpoints_that_do_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DPOConfig(**options)


def test_answers_are_sampled_at_every_evaluation(make, rows):
    trainer = make(eval_rows=rows[:4], eval_samples=2, eval_sample_tokens=5)
    folder = trainer.train().run_folder
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 3, 3]
    assert "tell me about tea" in lines[0]["prompt"]
    assert all(len(line["answer"]) > 0 for line in lines)
    with pytest.raises(ValueError, match="without an eval_dataset"):
        make(eval_samples=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_lost_a_file_is_read_whole_or_not_at_all(make):
    trainer = make(save_steps=3)
    trained = jax.tree.map(np.array, trainer.train().state)
    folder, refused = latest_checkpoint(trainer.run_folder), 0
    for file in [path for path in (folder / ARRAYS).rglob("*") if path.is_file()]:
        kept = file.read_bytes()
        file.unlink()
        trainer.state = jax.tree.map(jnp.zeros_like, trainer.state)
        try:
            trainer.load_checkpoint(folder)
        except ValueError as error:
            assert "is damaged" in str(error)
            refused += 1
            assert not any(leaf.any() for leaf in jax.tree.leaves(trainer.state))
        else:
            assert equal(trainer.state, trained), file
        file.write_bytes(kept)
    assert refused


def test_the_options_of_a_run_can_be_read_back_from_its_checkpoint(make):
    trainer = make(save_steps=3, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], report_to=("tensorboard",))
    trainer.train()
    options = read_metadata(latest_checkpoint(trainer.run_folder))["options"]
    assert options == as_json(dataclasses.asdict(trainer.arguments))
    assert as_json(dataclasses.asdict(DPOConfig(**options))) == options


def test_an_exception_in_the_hook_of_an_update_leaves_that_update_saved(make, monkeypatch):
    whole = make(num_train_epochs=2)
    expected = [line["train/loss"] for line in whole.train().log_history]
    with monkeypatch.context() as patch:

        def fail(self, state, metrics, step):
            if step == 3:
                raise ZeroDivisionError
            return state, metrics

        patch.setattr(DPOTrainer, "on_step_end", fail)
        with pytest.raises(ZeroDivisionError):
            make(num_train_epochs=2, model_name="hook").train()
    again = make(num_train_epochs=2, model_name="hook", resume_from_checkpoint="latest")
    output = again.train()
    assert [line["train/loss"] for line in output.log_history] == expected
    assert int(output.state.step) == 6


def test_an_early_stop_stays_a_stop_and_own_evaluations_do_not_count(make, rows):
    options = {
        "eval_rows": rows[:4],
        "evaluation_steps": 1,
        "best_metric": "eval/loss",
        "early_stopping_patience": 2,
        "save_steps": 1,
        "save_total_limit": 1,
        "num_train_epochs": 3,
        "learning_rate": 1e-30,
    }
    trainer = make(**options)
    trainer.evaluate()
    output = trainer.train()
    assert int(output.state.step) == 2
    again = make(**options, resume_from_checkpoint="latest").train()
    assert int(again.state.step) == 2 and again.stop_reason == output.stop_reason


def test_data_that_ends_early_still_gets_its_last_checkpoint(make, rows):
    broken = [row | {"chosen": row["rejected"]} if index < 4 else row for index, row in enumerate(rows)]
    output = make(train_rows=broken, max_dropped_share=0.5, total_batch_size=3, save_steps=100).train()
    assert output.last_checkpoint.name == "3"


def test_a_failing_end_of_one_listener_costs_no_checkpoint_and_no_other_listener(make):
    heard = []

    class Fails(TrainerCallback):
        def on_train_end(self, trainer):
            raise OSError("the tracker's server is gone")

    class Hears(TrainerCallback):
        def on_train_end(self, trainer):
            heard.append(latest_checkpoint(trainer.run_folder).name)

    trainer = make([Hears(), Fails(), Hears()], save_steps=1)
    with pytest.raises(OSError, match="server is gone"):
        trainer.train()
    assert heard == ["3", "3"]


def test_latest_is_the_newest_run_of_that_name_with_a_checkpoint(make, tmp_path):
    first = make(save_steps=1)
    first.train()
    other = make(save_steps=1, model_name="run-7")
    other.train()
    (tmp_path / "run-8").mkdir()
    assert make(save_steps=1, resume_from_checkpoint="latest").train().run_folder == first.run_folder
    with pytest.raises(ValueError, match="model_name='a/b', expected the name of a folder"):
        DPOConfig(model_name="a/b")


def test_the_metric_of_the_best_may_change_on_the_way(make, rows):
    options = {"eval_rows": rows[:4], "evaluation_steps": 1, "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(RuntimeError):
        make([FailAt(2)], best_metric="eval/loss", **options).train()
    again = make(best_metric="eval/rewards/margins", resume_from_checkpoint="latest", **options).train()
    assert again.best_checkpoint.name == "3"


def test_a_run_folder_belongs_to_one_process_at_a_time(make):
    first = make(save_steps=1, max_training_steps=2)
    first.train()
    with FileLock(first.run_folder / ".lock"), pytest.raises(ValueError, match="another process is at work"):
        make(save_steps=1, max_training_steps=2, resume_from_checkpoint="latest").train()


def test_another_rotary_base_or_dtype_is_another_model(make, tiny_model):
    make(save_steps=2).train()
    for changes, word in (
        ({"config": dataclasses.replace(tiny_model.config, rope_theta=50.0)}, "model.shape.rope_theta"),
        ({"dtype": np.dtype("bfloat16")}, "model.dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            make(model=dataclasses.replace(tiny_model, **changes), resume_from_checkpoint="latest").train()


def test_dropout_ties_a_run_to_its_layout(make):
    lora = {"lora_rank": 2, "lora_dropout": 0.1, "save_steps": 2}
    make(**lora).train()
    with pytest.raises(ValueError, match="packing: the checkpoint has True, this run False"):
        make(**lora, packing=False, resume_from_checkpoint="latest").train()


def test_damaged_notes_are_named(make):
    trainer = make(save_steps=3)
    trainer.train()
    file = latest_checkpoint(trainer.run_folder) / "notes" / "metadata"
    for text in ('{"place": ', "{}", "3"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"is damaged \(notes/metadata"):
            make(save_steps=3, resume_from_checkpoint="latest").train()


def test_checkpoints_can_be_loaded_one_after_the_other(make, tiny_model):
    folder = make(save_steps=1).train().run_folder / FOLDER
    fresh = make()
    for step in ("2", "1", "3"):
        fresh.load_checkpoint(folder / step)
        assert int(fresh.state.step) == int(step)
    with pytest.raises(ValueError, match="holds the state of a checkpoint after 3 updates"):
        fresh.train()
    other = make(model=jax.tree.map(lambda leaf: leaf * 1.0001, tiny_model))
    with pytest.raises(ValueError, match="model.weights: the checkpoint has"):
        other.load_checkpoint(folder / "2")


def test_a_run_whose_latest_checkpoint_was_damaged_ends_with_the_very_same_numbers(make, caplog):
    options = {"num_train_epochs": 2, "save_steps": 2}
    whole = make(**options).train()
    folder = whole.run_folder / FOLDER / "6"
    file = max((path for path in (folder / ARRAYS).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (whole.run_folder / "metrics.jsonl").unlink()
    again = make(resume_from_checkpoint="latest", **options)
    again_output = again.train()
    assert "6 is damaged (arrays/" in caplog.text and "update 4 of 6" in caplog.text
    assert equal(again_output.state, whole.state)
    assert [line["train/loss"] for line in again_output.log_history] == [
        line["train/loss"] for line in whole.log_history
    ]
    assert [line["step"] for line in log_of(again.run_folder)] == [1, 2, 3, 4, 5, 6]
    assert again_output.last_checkpoint == folder


def test_a_full_disk_ends_no_run_but_for_its_last_checkpoint(make, monkeypatch, caplog):
    from easydel.trainers.run import checkpoints

    def full(folder, *_):
        raise checkpoints.WriteError(f"{folder} could not be written: No space left on device")

    monkeypatch.setattr(checkpoints, "start_saving", full)
    trainer = make(save_steps=1)
    with pytest.raises(OSError, match="the last checkpoint, .*/3 could not be written"):
        trainer.train()
    assert int(trainer.state.step) == 3 and [line["step"] for line in log_of(trainer.run_folder)] == [1, 2, 3]
    assert caplog.text.count("Training continues") >= 3


@pytest.mark.devices
def test_a_trainer_without_data_can_load_a_checkpoint_and_evaluate_it(make, tiny_model, tokenizer, rows):
    trained = make(eval_rows=rows[:4], save_steps=3)
    checkpoint = trained.train().last_checkpoint
    config = DPOConfig(save_directory=None, progress_bar=False)
    evaluates = DPOTrainer(config, tiny_model, None, tokenizer, None, Dataset.from_list(rows[:4]))
    evaluates.load_checkpoint(checkpoint)
    assert evaluates.evaluate()["eval/loss"] == pytest.approx(trained.evaluate()["eval/loss"], rel=1e-6)
