"""`easydel dpo`: train a model on pairs of answers."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from easydel.cli.failures import FailedRun, UsageError, refusing
from easydel.cli.flags import Section, parse_flags
from easydel.cli.inputs import open_mixture, open_rows, open_tokenizer
from easydel.cli.request import layers, require_options
from easydel.options import own_options
from easydel.paths import user_path

if TYPE_CHECKING:
    from easydel.data.sources.base import ShardedDataSource
    from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig
    from easydel.trainers.direct_preference_optimization_trainer.dpo_trainer import DPOTrainer
    from easydel.trainers.trainer import TrainerOutput

USAGE = "easydel dpo --model MODEL --train-dataset FILE [options]"
DESCRIPTION = (
    "Train a model on pairs of answers by direct preference optimisation. The trained model and its tokenizer are "
    "written to the folder model inside the run folder; adapters (--lora-rank) are merged into it and also written "
    "alone, to the folder adapter."
)
MODEL_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
# The fields of `DPOConfig` that decide how a row becomes a pair: those of `PreferenceTransform` besides its tokenizer.
# They are written out because the help should not have to import the data package.
DATA_OPTIONS = (
    "max_length",
    "max_prompt_length",
    "max_completion_length",
    "truncation_mode",
    "tools",
    "chat_template_kwargs",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The models, data and devices of a run; `DPOConfig` says how it trains."""

    model: str = dataclasses.field(metadata={"metavar": "MODEL"})
    """Model to train: a Hugging Face folder, a .gguf file or a hub id."""
    train_dataset: str | list[str] | dict[str, float] = dataclasses.field(metadata={"metavar": "FILE|FILE=WEIGHT"})
    """Pairs to train on: files, a folder, globs or URLs (.jsonl, .json, .parquet, .arrow, .csv); FILE=WEIGHT, for each
    of several, mixes them in these proportions."""
    eval_dataset: str | list[str] | dict[str, str] | None = dataclasses.field(
        default=None, metadata={"metavar": "FILE|NAME=FILE"}
    )
    """Pairs to evaluate on; NAME=FILE, as often as needed, for several sets with a name each."""
    reference_model: str | None = dataclasses.field(default=None, metadata={"metavar": "MODEL"})
    """Model to stay near; none is the model as it was before training."""
    chat_template: str | None = dataclasses.field(default=None, metadata={"metavar": "FILE"})
    """File with a chat template (Jinja) to use instead of the tokenizer's."""
    output: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Run folder, short for save_directory and model_name; a number is added when it exists."""
    config: str | None = dataclasses.field(default=None, metadata={"metavar": "FILE"})
    """YAML file with any of these options, e.g. "learning_rate: 1e-6"; the command line wins."""
    sharding_axis_dims: tuple[int, int, int, int, int] = (1, -1, 1, 1, 1)
    """Devices along the mesh axes dp, fsdp, ep, tp and sp; one may be -1 and takes those that are left."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype that the model computes in; none is float32 on CPU and bfloat16 on accelerators."""
    attention_backend: Literal["cudnn", "tpu", "xla"] | None = None
    """Backend of attention; none chooses by device, dtype and head size. Changes speed and memory, not results."""


def run_sections() -> tuple[Section, ...]:
    """List every option of a run: those of `RunOptions`, then the fields of `DPOConfig` and `TrainingArguments`."""
    from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig
    from easydel.trainers.training_arguments import TrainingArguments

    return (
        Section("model and data", own_options(RunOptions)),
        Section("preferences", own_options(DPOConfig)),
        Section("training", own_options(TrainingArguments)),
    )


def run_dpo(arguments: Sequence[str]) -> int:
    """Train, save and report; returns the exit code.

    Raises:
      UsageError: options, rows or model files are at fault; before the weights are loaded if possible.
      FailedRun: the run could not be finished, or the model not be written.
    """
    run, config = read_request(arguments)

    from easydel.trainers.run.folder import check_save_directory

    with refusing(OSError):
        check_save_directory(str(config.save_directory))
    tokenizer = open_tokenizer(run.model, run.chat_template)
    train, evaluation = _open_datasets(run, config, tokenizer)
    trainer = _make_trainer(run, config, tokenizer, train, evaluation)
    _require_room(trainer)
    output = _train(trainer, run)
    folder = _save(trainer, run)
    print(summary(trainer, output, folder))
    return 0


def _train(trainer: DPOTrainer, run: RunOptions) -> TrainerOutput:
    from easydel.infra.state_files import WriteError
    from easydel.trainers.direct_preference_optimization_trainer.reference.cache import ReferenceCacheError
    from easydel.trainers.trainer_protocol import NonFiniteError, SelfCheckError

    with refusing(ValueError, OSError):
        try:
            return trainer.train()
        except (NonFiniteError, SelfCheckError, ReferenceCacheError) as error:
            raise FailedRun(str(error)) from error
        except WriteError as error:
            # Save the model all the same: the run is complete but for its last checkpoint.
            raise FailedRun(f"{error} The model was written to {_save(trainer, run)}.") from error


def _save(trainer: DPOTrainer, run: RunOptions) -> Path:
    """Write the trained model, and adapters if it has any, into the run folder; returns the model's folder."""
    assert trainer.run_folder is not None  # read_request refuses a run without save_directory
    folder = trainer.run_folder / MODEL_FOLDER
    try:
        trainer.save_pretrained(folder)
        if trainer.model.has_lora:
            trainer.save_adapter(trainer.run_folder / ADAPTER_FOLDER, base_model_name_or_path=run.model)
    except OSError as error:
        raise FailedRun(
            f"the trained model could not be written to {trainer.run_folder}: {error.strerror or error}. Make room; "
            "with a checkpoint of its last update (save_steps), --resume-from-checkpoint latest writes it again."
        ) from error
    return folder


def _require_room(trainer: DPOTrainer) -> None:
    """Refuse a run whose trained model would not fit on the disk."""
    import jax

    from easydel.trainers.run.folder import existing_folder

    folder = existing_folder(Path(str(trainer.arguments.save_directory)).expanduser().absolute())
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.model))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"{folder} has {free / 1e6:.1f} MB free, and the trained model alone takes {needed / 1e6:.1f} MB; make "
            "room, or name another save_directory."
        )


def read_request(arguments: Sequence[str]) -> tuple[RunOptions, DPOConfig]:
    """Read the options of a run from the command line and the configuration file it names.

    Raises:
      UsageError: an option is unknown, missing, of the wrong type or out of range, or two do not go together.
    """
    sections = run_sections()
    options = [option for section in sections for option in section.options]
    given = parse_flags("dpo", USAGE, DESCRIPTION, sections, arguments)
    values: dict[str, Any] = {}
    for layer in layers(given, options):
        values |= _with_run_folder(layer)
    require_options(values, options)

    from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig

    of_the_run = {field.name for field in dataclasses.fields(RunOptions)}
    with refusing(ValueError):
        config = DPOConfig(**{name: value for name, value in values.items() if name not in of_the_run})
    if config.save_directory is None:
        raise UsageError("save_directory=None would throw the trained model away; name a folder, or leave it out.")
    run = RunOptions(**{name: value for name, value in values.items() if name in of_the_run})
    if run.reference_model is not None:
        with refusing(ValueError):
            config.check_reference(f"reference_model={run.reference_model} has")
    return run, config


def _with_run_folder(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `output` by the two options it is short for."""
    if values.get("output") is None:
        return values
    for name in ("save_directory", "model_name"):
        if name in values:
            raise UsageError(f"output={values['output']} and {name}={values[name]} both name the run folder; use one.")
    with refusing(OSError):
        folder = user_path(values["output"])
    return values | {"save_directory": str(folder.parent), "model_name": folder.name}


def _open_datasets(
    run: RunOptions, config: DPOConfig, tokenizer: Any
) -> tuple[ShardedDataSource, dict[str, ShardedDataSource]]:
    """Open the training set and the evaluation sets by name, and check their first rows."""
    from easydel.data.batching.first_rows import check_first_rows
    from easydel.data.preference.transform import PreferenceTransform

    if isinstance(run.train_dataset, dict):
        train: ShardedDataSource = open_mixture(run.train_dataset)
    else:
        train = open_rows(run.train_dataset)
    sets = run.eval_dataset if isinstance(run.eval_dataset, dict) else {"": run.eval_dataset}
    evaluation = {name: open_rows(files) for name, files in sets.items() if files is not None}
    with refusing(OSError, ValueError):
        config.check_order(by_number=train.has_random_access)
        options = {name: getattr(config, name) for name in DATA_OPTIONS}
        transform = PreferenceTransform(tokenizer, **options, reads_margin=config.objective.needs_margin)
        for source in (train, *evaluation.values()):
            check_first_rows(source, transform, config.max_dropped_share)
    return train, evaluation


def _make_trainer(
    run: RunOptions,
    config: DPOConfig,
    tokenizer: Any,
    train: ShardedDataSource,
    evaluation: dict[str, ShardedDataSource],
) -> DPOTrainer:
    from easydel.modules.auto import AutoEasyDeLModelForCausalLM
    from easydel.trainers.direct_preference_optimization_trainer.dpo_trainer import DPOTrainer

    options = {name: getattr(run, name) for name in ("dtype", "sharding_axis_dims", "attention_backend")}
    with refusing(OSError, ValueError):
        model = AutoEasyDeLModelForCausalLM.from_pretrained(run.model, **options)
        reference = None
        if run.reference_model is not None:
            reference = AutoEasyDeLModelForCausalLM.from_pretrained(run.reference_model, **options)
        eval_dataset = evaluation if isinstance(run.eval_dataset, dict) else evaluation.get("")
        return DPOTrainer(config, model, reference, tokenizer, train, eval_dataset)


def summary(trainer: DPOTrainer, output: TrainerOutput, folder: Path) -> str:
    """Describe the finished run: the model's folder, the last metrics of every set, and the dropped rows."""
    lines = [f"model: {folder}"]
    if trainer.model.has_lora:
        lines.append(f"adapter: {folder.with_name(ADAPTER_FOLDER)}")
    prefixes = dict.fromkeys(name.removesuffix("/loss") for name in output.metrics if name.endswith("/loss"))
    for prefix in prefixes:
        numbers = [
            f"{label} {output.metrics[f'{prefix}/{metric}']:.4g}"
            for metric, label in trainer.progress_metrics.items()
            if f"{prefix}/{metric}" in output.metrics
        ]
        lines.append(f"{prefix}: {', '.join(numbers)}")
    return "\n".join([*lines, trainer.tally.summary()])
