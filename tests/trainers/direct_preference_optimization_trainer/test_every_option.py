"""Every field of the configuration changes what happens, or is refused where it could not."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import numpy as np
import pytest
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.data.faults import DataError
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import option_fields, owners
from easydel.trainers.optimizers import EXTRA_KWARGS, OPTIMIZERS, OWN_FIELDS
from tests.tiny import make_rows

ROWS = make_rows()
TOOLS = [{"type": "function", "function": {"name": "ring", "parameters": {}}}]
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% endif %}{% if polite %}please {% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BROKEN = [row | {"chosen": row["rejected"]} if index == 1 else row for index, row in enumerate(ROWS)]


class Run(NamedTuple):
    """What the effect of an option is looked for in."""

    make: Callable[..., DPOTrainer]

    def trace(self, trainer: DPOTrainer) -> list:
        """Loss and gradient norm of every update."""
        lines = trainer.train().log_history
        return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]

    def weights(self, trainer: DPOTrainer) -> list:
        """The trained weights; a change that only comes with the last update shows here."""
        return [float(abs(leaf).sum()) for leaf in jax.tree.leaves(trainer.train().state.model)]

    def evaluations(self, trainer: DPOTrainer) -> list:
        return [line["step"] for line in trainer.train().log_history if "eval/loss" in line]

    def logged(self, trainer: DPOTrainer) -> list:
        return [line["step"] for line in trainer.train().log_history if "train/loss" in line]

    def files(self, trainer: DPOTrainer) -> list:
        """Names of what a run leaves on disk, but for what a checkpoint holds inside."""
        folder = trainer.train().run_folder
        if folder is None:
            return []
        found = [
            path.relative_to(folder.parent) for path in folder.rglob("*") if len(path.relative_to(folder).parts) < 3
        ]
        return sorted("events" if "events" in path.name else str(path) for path in [*found])

    def second_run(self, trainer: DPOTrainer) -> str:
        """Where a run ends up that comes after one with the same options."""
        first = dataclasses.replace(trainer.arguments, resume_from_checkpoint=None)
        self.make(dataclasses.asdict(first)).train()
        return trainer.train().run_folder.name

    def batch(self, trainer: DPOTrainer) -> list:
        batch = next(iter(trainer.dataloaders.train))
        return [(name, array.shape, hashlib.sha256(array.tobytes()).hexdigest()) for name, array in batch.items()]

    def eval_batches(self, trainer: DPOTrainer) -> list:
        return [int(batch["pair_mask"].sum()) for batch in trainer.dataloaders.evaluation[""]]

    def orders(self, trainer: DPOTrainer) -> list:
        return [batch["pair_index"][batch["pair_mask"]].tolist() for batch in trainer.dataloaders.train]

    def program(self, trainer: DPOTrainer) -> str:
        """The training step as it will be compiled."""
        batch = {name: value for name, value in next(iter(trainer.dataloaders.train)).items() if name != "pair_keys"}
        zeros = 0.0 * batch["pair_weight"]
        step = functools.partial(trainer.make_steps()[0])
        return str(
            jax.make_jaxpr(step)(trainer.state, batch | {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros})
        )

    def ends(self, trainer: DPOTrainer) -> str:
        """How a run ends."""
        try:
            return str(trainer.train().stop_reason)
        except Exception as error:
            return type(error).__name__

    def reference(self, trainer: DPOTrainer) -> bool:
        trainer.train()
        return trainer.reference_state is None

    def answers(self, trainer: DPOTrainer) -> list:
        folder = trainer.train().run_folder
        path = folder / "samples.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def terminal(self, trainer: DPOTrainer, capsys) -> str:
        trainer.train()
        return capsys.readouterr().err


class Field(NamedTuple):
    """How an option shows: its values, options all runs need, and where to look."""

    values: tuple[Any, ...]
    look: str
    shared: dict[str, Any] = {}  # noqa: RUF012
    data: dict[str, Any] = {}  # noqa: RUF012


EVALUATED = {"data": {"eval_rows": ROWS[:6]}}
SAVED = {"save_directory": "runs"}
LORA = {"lora_rank": 2, "learning_rate": 1e-1}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1}

FIELDS = {
    # The run.
    "learning_rate": Field((1e-2, 1e-3), "trace"),
    "total_batch_size": Field((4, 6), "trace"),
    "gradient_accumulation_steps": Field((1, 4), "batch"),
    "micro_batch_tokens": Field((None, 128), "batch"),
    "eval_batch_size": Field((None, 2), "eval_batches", **EVALUATED),
    "num_train_epochs": Field((1, 2), "trace"),
    "max_training_steps": Field((None, 2), "logged"),
    "optimizer": Field(("adamw", "lion", "adafactor"), "trace"),
    "scheduler": Field(("linear", "constant"), "weights"),
    "warmup_steps": Field((0, 2), "trace"),
    "warmup_ratio": Field((0.0, 0.5), "trace"),
    "weight_decay": Field((0.0, 0.5), "trace"),
    "clip_grad": Field((None, 1e-9), "trace"),
    "extra_optimizer_kwargs": Field(({}, {"eps": 1.0}, {"mu_dtype": "bfloat16"}), "trace"),
    "shuffle_train_dataset": Field((True, False), "orders"),
    "shuffle_seed_train": Field((64871, 2), "orders"),
    "shuffle_buffer_size": Field((10_000, 3), "orders", {"max_training_steps": 3}, {"is_stream": True}),
    "max_dropped_share": Field((0.0, 0.5), "ends", {}, {"train_rows": BROKEN}),
    "lora_rank": Field((None, 2), "program"),
    "lora_alpha": Field((None, 32.0), "trace", LORA),
    "lora_dropout": Field((0.0, 0.5), "trace", LORA),
    "lora_pattern": Field((None, "q_proj"), "trace", LORA),
    "use_rslora": Field((False, True), "trace", LORA),
    "lora_seed": Field((0, 1), "trace", LORA),
    "quantize_base": Field((None, "int8"), "trace", LORA),
    "gradient_checkpointing": Field((True, False), "program"),
    "max_nonfinite_steps": Field((1, 100), "ends", {"learning_rate": 1e30, "clip_grad": None}),
    "do_eval": Field((None, False), "evaluations", **EVALUATED),
    "evaluation_steps": Field((None, 1), "evaluations", **EVALUATED),
    "log_steps": Field((1, 2), "logged"),
    "best_metric": Field(
        ("eval/loss", "eval/rewards/margins"),
        "ends",
        {"evaluation_steps": 1, "early_stopping_patience": 2, "num_train_epochs": 3, "learning_rate": 1e-3},
        {"eval_rows": [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS[:6]]},
    ),
    "early_stopping_patience": Field(
        (None, 1),
        "logged",
        {"evaluation_steps": 1, "best_metric": "eval/loss", "learning_rate": 1e-30, "save_steps": 1}
        | SAVED
        | {"save_total_limit": 1},
        EVALUATED["data"],
    ),
    "max_training_seconds": Field((None, 1e-3), "logged"),
    "report_to": Field(((), ("tensorboard",)), "files", SAVED),
    "progress_bar": Field((False, True), "terminal"),
    "save_directory": Field((None, "runs"), "files"),
    "model_name": Field(("dpo", "tea"), "files", SAVED),
    "save_steps": Field((None, 1), "files", SAVED),
    "save_total_limit": Field((None, 1), "files", SAVED | {"save_steps": 1}),
    "resume_from_checkpoint": Field((None, "latest"), "second_run", SAVED | {"save_steps": 1}),
    # Preferences.
    "beta": Field((0.1, 0.5), "trace"),
    "loss_type": Field(("sigmoid", "ipo"), "trace"),
    "loss_weights": Field((None, [2.0, 1.0]), "trace", {"loss_type": ["sigmoid", "sft"]}),
    "label_smoothing": Field((0.0, 0.2), "trace"),
    "f_divergence_type": Field(("reverse_kl", "js_divergence"), "trace"),
    "f_alpha_divergence_coef": Field(
        (0.5, 0.2), "trace", {"f_divergence_type": "alpha_divergence", "learning_rate": 1e-4}
    ),
    "discopop_tau": Field((0.05, 0.5), "trace", {"loss_type": "discopop"}),
    "ld_alpha": Field((None, 0.5), "trace"),
    "rpo_alpha": Field((None, 1.0), "trace"),
    "use_weighting": Field((False, True), "trace"),
    "reference_free": Field((False, True), "trace"),
    "precompute_ref_log_probs": Field((False, True), "reference"),
    "sync_ref_model": Field((False, True), "trace", {"num_train_epochs": 22, "learning_rate": 1e-3}),
    "ref_model_mixup_alpha": Field((0.9, 0.1), "trace", SYNC),
    "ref_model_sync_steps": Field((2, 1), "trace", {"sync_ref_model": True}),
    "max_length": Field((512, 64), "batch", {"max_prompt_length": 48}),
    "max_prompt_length": Field((256, 20), "batch"),
    "max_completion_length": Field((None, 10), "batch"),
    "truncation_mode": Field(("keep_end", "keep_start"), "batch", {"max_prompt_length": 20}),
    "padding_value": Field((None, 3), "batch"),
    "tools": Field((None, TOOLS), "batch", {}, {"template": TOOL_TEMPLATE}),
    "chat_template_kwargs": Field((None, {"polite": True}), "batch", {}, {"template": TOOL_TEMPLATE}),
    "eval_samples": Field((0, 1), "answers", SAVED, EVALUATED["data"]),
    "eval_sample_tokens": Field((3, 6), "answers", SAVED | {"eval_samples": 1}, EVALUATED["data"]),
    "packing": Field((True, False), "batch"),
    "share_prompt": Field((True, False), "batch"),
}
# It counts where a chosen completion has become less likely, as after a step that is far too large.
FIELDS["dpop_lambda"] = Field((50.0, 5.0), "trace", {"loss_type": "dpop", "learning_rate": 0.3})
# Options that one objective owns, and that nothing above looks at in particular.
FIELDS |= {
    name: Field((field.default, 1.5 * field.default + 0.1), "trace", {"loss_type": owners(name)[0]})
    for name, field in option_fields().items()
    if name not in FIELDS
}


def test_every_field_is_here():
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(DPOConfig)}


@pytest.fixture
def run(tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(options, train_rows=ROWS, eval_rows=None, is_stream=False, template=None):
        base = {"save_directory": None, "progress_bar": False, "total_batch_size": 4, "learning_rate": 1e-2}
        if template is not None:
            monkeypatch.setattr(tokenizer, "chat_template", template)
        train = Dataset.from_list(train_rows)
        return DPOTrainer(
            DPOConfig(**(base | options)),
            tiny_model,
            None,
            tokenizer,
            train.to_iterable_dataset() if is_stream else train,
            None if eval_rows is None else Dataset.from_list(eval_rows),
        )

    return Run(make)


@pytest.mark.parametrize("name", FIELDS)
def test_a_change_of_the_field_changes_what_happens(run, name, capsys):
    field = FIELDS[name]
    look = getattr(run, field.look)
    if field.look == "terminal":
        look = functools.partial(look, capsys=capsys)
    seen = []
    for value in field.values:
        try:
            trainer = run.make(field.shared | {name: value}, **field.data)
        except DataError as error:
            seen.append(str(error))
        else:
            seen.append(look(trainer))
    assert all(one != other for one, other in itertools.combinations(seen, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_name": "tea"}, "save_directory=None, which writes no files"),
        ({"gradient_accumulation_steps": 5}, "more than the total_batch_size=4 examples"),
        ({"tools": TOOLS}, r"tools has no effect"),
        ({"chat_template_kwargs": {"polite": True}}, r"chat_template_kwargs\['polite'\] has no effect"),
    ],
)
def test_what_could_not_have_an_effect_is_refused(run, options, words):
    with pytest.raises(ValueError, match=words):
        run.make(options)


@pytest.mark.parametrize("option", ["packing", "share_prompt"])
def test_a_layout_beside_a_collate_function_of_ones_own_is_refused(tiny_model, tokenizer, option):
    with pytest.raises(ValueError, match=f"{option}=False has no effect with a data_collator"):
        DPOTrainer(
            DPOConfig(save_directory=None, **{option: False}),
            tiny_model,
            None,
            tokenizer,
            data_collator=lambda pairs: {},
        )


HINTS = get_type_hints(DPOConfig)
NUMBERS = [name for name in FIELDS if {int, float} & {HINTS[name], *get_args(HINTS[name])}]
# Beyond what float32 or 32 bits hold, of another type, or no number at all.
NO_NUMBERS = [math.nan, math.inf, -math.inf, 1e39, 1e-60, 10**400, -(10**400), True, "1", "1e-6", [1], (1, 2), b"1"]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_that_the_step_can_hold_is_refused_when_the_config_is_made(name, value):
    with pytest.raises(ValueError, match=f"^{name}=") as refused:
        DPOConfig(**{name: value})
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_numpy_is_the_number(name):
    field = next(field for field in dataclasses.fields(DPOConfig) if field.name == name)
    if field.default is None:
        pytest.skip("no number by default")
    config = DPOConfig(**{name: np.asarray(field.default)[()]})
    assert type(getattr(config, name)) is type(field.default)
    assert getattr(config, name) == field.default


@pytest.mark.parametrize("weights", [[0.0, 1.0], [1.0, -1.0], [0.0, 0.0], [math.nan, 1.0], [True, 1.0], ["1", 1.0]])
def test_an_objective_without_weight_is_refused(weights):
    with pytest.raises(ValueError, match="^loss_weights="):
        DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=weights)


@pytest.mark.parametrize(
    ("optimizer", "kwargs", "words"),
    [
        ("adamw", {"b1": 1.0}, "b1=1.0, expected a number from 0 to below 1"),
        ("adamw", {"b1": math.nan, "eps": 0.0}, "b1=nan, .*; eps=0.0, expected a number above 0"),
        ("adamw", {"eps": 1e-60}, "eps=1e-60"),
        ("adamw", {"b2": [0.9]}, r"b2=\[0.9\]"),
        ("adamw", {"b2": None}, "b2=None"),
        ("adamw", {"b2": True}, "b2=True"),
        ("adamw", {"b2": 10**5000}, "b2=a number of 16610 bits"),
        ("adamw", {"nesterov": 1}, "nesterov=1, expected True or False"),
        ("adamw", {"eps_root": -1.0}, "eps_root=-1.0"),
        ("adamw", {"mu_dtype": "int8"}, "mu_dtype='int8', expected 'float32' or 'bfloat16'"),
        ("adamw", {"mu_dtype": None}, "mu_dtype=None"),
        ("adamw", {"learning_rate": 1.0}, "learning_rate, which adamw does not take here"),
        ("adamw", {"momentum": 0.9}, "momentum, which adamw does not take here"),
        ("adamw", {1: 2}, "a dict with text for every key"),
        ("lion", {"eps": 1e-8}, "eps, which lion does not take here"),
        ("adafactor", {"min_dim_size_to_factor": 1.5}, "min_dim_size_to_factor=1.5"),
        ("adafactor", {"decay_rate": 1.0}, "decay_rate=1.0"),
        ("adafactor", {"clipping_threshold": 0.0}, "clipping_threshold=0.0, expected None or a number above 0"),
    ],
)
def test_an_argument_of_the_optimiser_is_checked_when_the_config_is_made(optimizer, kwargs, words):
    with pytest.raises(ValueError, match=f"^extra_optimizer_kwargs.*{words}"):
        DPOConfig(optimizer=optimizer, extra_optimizer_kwargs=kwargs)


def test_every_argument_of_every_optimiser_has_its_check():
    for make in OPTIMIZERS.values():
        assert set(inspect.signature(make).parameters) - set(OWN_FIELDS) <= EXTRA_KWARGS.keys()
