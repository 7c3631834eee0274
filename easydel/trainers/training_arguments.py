"""Declare and check the options that a training run of any task has."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from easydel.layers.name_pattern import check_pattern
from easydel.options import COUNT, INDEX, POSITIVE, Range, check_options, is_default, option_field, require

Tracker = Literal["tensorboard"]
# Options that have no effect without adapters.
LORA_OPTIONS = ("lora_alpha", "lora_dropout", "lora_pattern", "use_rslora", "lora_seed", "quantize_base")


@dataclasses.dataclass(kw_only=True)
class TrainingArguments:
    """Options of a training run; ranges and combinations are checked when it is made."""

    learning_rate: float = option_field(1e-6, changes="result", within=POSITIVE)
    """Peak learning rate."""
    total_batch_size: int = option_field(32, changes="result", within=COUNT)
    """Examples of one optimiser update, over all devices and accumulation steps."""
    gradient_accumulation_steps: int = option_field(1, changes="layout", within=COUNT)
    """Least number of micro-batches an update is computed in, one after the other; changes memory, not results."""
    micro_batch_tokens: int | None = option_field(None, changes="layout")
    """Most tokens per device in one micro-batch, unless one example has more, in multiples of 128; None takes 2048 on
    CPU and 8192 elsewhere. Changes memory and speed, not results."""
    eval_batch_size: int | None = option_field(None, changes="session", within=COUNT)
    """Examples of one evaluation batch; None takes total_batch_size."""
    num_train_epochs: int = option_field(1, changes="result", within=COUNT)
    """Most passes over the training data."""
    max_training_steps: int | None = option_field(None, changes="result", within=COUNT)
    """Most optimiser updates; None leaves it to num_train_epochs. Whichever comes first ends the run."""

    optimizer: Literal["adamw", "lion", "adafactor"] = option_field("adamw", changes="result")
    """Optimiser, from optax; adafactor keeps almost no state."""
    scheduler: Literal["constant", "linear", "cosine"] = option_field("linear", changes="result")
    """Learning rate after warm-up: constant, or down to zero at the last step."""
    warmup_steps: int = option_field(0, changes="result", within=INDEX)
    """Updates over which the learning rate rises from zero."""
    warmup_ratio: float = option_field(0.0, changes="result", within=Range("a share", least=0, below=1))
    """The same as a share of all updates; give one of the two."""
    weight_decay: float = option_field(0.01, changes="result", within=Range(least=0))
    """Decoupled weight decay, on weight matrices; norms and biases have none."""
    clip_grad: float | None = option_field(1.0, changes="result", within=POSITIVE)
    """Largest global norm of the gradient; None does not clip."""
    extra_optimizer_kwargs: dict[str, Any] = option_field(factory=dict, changes="result")
    """More arguments of the optimiser, e.g. b1, b2, eps, or mu_dtype=bfloat16 for half-size first moments."""

    shuffle_train_dataset: bool = option_field(True, changes="result")
    """A different order of rows each epoch; False keeps the file's order."""
    shuffle_seed_train: int = option_field(
        64871, changes="result", within=Range("a whole number", least=0, most=2**32 - 1)
    )
    """Seed of that order."""
    shuffle_buffer_size: int = option_field(10_000, changes="result", within=COUNT)
    """Rows of a stream that are held in memory and shuffled among each other; other data is shuffled whole."""
    max_dropped_share: float = option_field(0.05, changes="result", within=Range("a share", least=0, most=1))
    """Largest share of rows, 0 to 1, that may be dropped as unusable before the run stops."""

    lora_rank: int | None = option_field(None, changes="result", within=COUNT)
    """Train low-rank adapters of this rank and leave the weights as they are (LoRA); None trains all weights."""
    lora_alpha: float | None = option_field(None, changes="result", within=POSITIVE)
    """The adapters' output is scaled by lora_alpha / lora_rank; None takes twice the rank."""
    lora_dropout: float = option_field(0.0, changes="result", within=Range("a share", least=0, below=1))
    """Share of an adapter's inputs that a training step leaves out."""
    lora_pattern: str | None = option_field(None, changes="result")
    """Layers that get adapters, a regular expression such as "q_proj|v_proj"; None takes every linear layer of the
    decoder layers."""
    use_rslora: bool = option_field(False, changes="result")
    """Scale by lora_alpha / sqrt(lora_rank) instead (rsLoRA)."""
    lora_seed: int = option_field(0, changes="result", within=INDEX)
    """Seed of the adapters' initial weights and of their dropout."""
    quantize_base: Literal["int8"] | None = option_field(None, changes="result")
    """Keep the layers' own weights in 8 bits while adapters are trained; None keeps them as they are."""

    gradient_checkpointing: bool = option_field(True, changes="session")
    """Keep each layer's input and attention output, and rebuild the rest in the backward pass. False keeps all matrix
    products: less arithmetic, several times the activation memory."""
    max_nonfinite_steps: int = option_field(3, changes="session", within=COUNT)
    """Updates with a non-finite loss or gradient are skipped; this many in a row end the run."""

    do_eval: bool | None = option_field(None, changes="session")
    """Evaluate before the first step, on schedule and at the end; None does so when there is an evaluation set."""
    evaluation_steps: int | None = option_field(None, changes="session", within=COUNT)
    """Updates from one evaluation to the next; None evaluates only before the first step and at the end."""
    log_steps: int = option_field(1, changes="session", within=COUNT)
    """Updates per line of the log."""
    best_metric: str | None = option_field(None, changes="session")
    """Evaluation metric that marks the best checkpoint, e.g. eval/loss; lower is better if its name ends in loss."""
    early_stopping_patience: int | None = option_field(None, changes="session", within=COUNT)
    """End the run after this many evaluations in a row without a better best_metric."""
    max_training_seconds: float | None = option_field(
        None, changes="session", within=Range("a number of seconds", above=0)
    )
    """End the run after this time, with a last evaluation and, if save_steps is set, a last checkpoint."""
    report_to: tuple[Tracker, ...] = option_field((), changes="session")
    """Trackers besides metrics.jsonl."""
    progress_bar: bool = option_field(True, changes="session")
    """Show a bar on a terminal, or a line every 10 seconds elsewhere."""
    save_directory: str | None = option_field("runs", changes="session")
    """Where run folders go; None writes no files."""
    model_name: str = option_field("dpo", changes="session")
    """Name of the run folder; a number is added when it exists, so that nothing is overwritten."""
    save_steps: int | None = option_field(None, changes="session", within=COUNT)
    """Updates from one checkpoint to the next, with one at the end; None writes one only if the run is interrupted or
    fails."""
    save_total_limit: int | None = option_field(None, changes="session", within=COUNT)
    """Keep this many of the latest checkpoints, and the best; None keeps all."""
    resume_from_checkpoint: str | None = option_field(None, changes="session")
    """Resume from a checkpoint: latest, a run folder or a checkpoint folder; latest starts a new run if there is
    none."""

    def __post_init__(self) -> None:
        check_options(self)
        tokens = self.micro_batch_tokens
        expected = "None or a multiple of 128 above 0"
        require(tokens is None or (tokens > 0 and tokens % 128 == 0), "micro_batch_tokens", tokens, expected)
        self._check_shuffling()
        is_name = self.model_name not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f\x7f]", self.model_name)
        require(is_name, "model_name", self.model_name, "the name of a folder in save_directory")
        self._check_lora()
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} both set the warm-up; "
                "set one of them to 0."
            )
        if self.do_eval is False and self.evaluation_steps is not None:
            raise ValueError(
                f"evaluation_steps={self.evaluation_steps} has no effect with do_eval=False; remove one of the two."
            )
        if self.report_to and self.save_directory is None:
            raise ValueError(f"report_to={self.report_to} needs a folder to write to; set save_directory.")
        if self.save_directory is None and not is_default(self, "model_name"):
            raise ValueError(
                f"model_name={self.model_name!r} has no effect with save_directory=None, which writes no files; "
                "leave it out or set save_directory."
            )
        if self.gradient_accumulation_steps > self.total_batch_size:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} micro-batches are more than the "
                f"total_batch_size={self.total_batch_size} examples of an update; set it to that or less."
            )
        self._check_checkpoints()
        # Check trackers and optimiser arguments here: otherwise a mistake shows only after the model is loaded.
        from easydel.trainers.callbacks.trackers import check_trackers
        from easydel.trainers.optimizers import check_optimizer_kwargs

        check_trackers(self.report_to)
        check_optimizer_kwargs(self.optimizer, self.extra_optimizer_kwargs)

    def _check_checkpoints(self) -> None:
        """Check that checkpoints, the choice of the best one and early stopping have what they need."""
        for field in ("save_steps", "resume_from_checkpoint"):
            if getattr(self, field) is not None and self.save_directory is None:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} needs a folder for checkpoints; set save_directory."
                )
        if self.save_total_limit is not None and self.save_steps is None:
            raise ValueError(
                f"save_total_limit={self.save_total_limit} has no effect without checkpoints; set save_steps."
            )
        if self.early_stopping_patience is not None and self.best_metric is None:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs a metric to judge by; set best_metric, "
                'for example "eval/loss".'
            )
        if self.best_metric is None:
            return
        require(self.best_metric.startswith("eval/"), "best_metric", self.best_metric, 'a metric such as "eval/loss"')
        if self.evaluation_steps is None:
            raise ValueError(f"best_metric={self.best_metric!r} needs evaluations to compare; set evaluation_steps.")
        if self.early_stopping_patience is None and self.save_total_limit is None:
            raise ValueError(
                f"best_metric={self.best_metric!r} has no effect: all checkpoints are kept and nothing stops early. "
                "Set save_total_limit, so that the best one is kept besides the latest, or early_stopping_patience."
            )
        if self.save_steps is not None and self.save_steps % self.evaluation_steps:
            raise ValueError(
                f"best_metric={self.best_metric!r} rates a checkpoint by the evaluation at its step, but "
                f"save_steps={self.save_steps} is no multiple of evaluation_steps={self.evaluation_steps}."
            )

    def _check_shuffling(self) -> None:
        if self.shuffle_train_dataset:
            return
        for field in ("shuffle_seed_train", "shuffle_buffer_size"):
            if not is_default(self, field):
                raise ValueError(
                    f"{field}={getattr(self, field)} has no effect with shuffle_train_dataset=False; leave it at "
                    f"{type(self).__dataclass_fields__[field].default} or set shuffle_train_dataset=True."
                )

    def check_order(self, *, by_number: bool) -> None:
        """Refuse options that do not go with a training set that can, or cannot, be read by number.

        Raises:
          ValueError: a stream without `max_training_steps`, or a window for data that is shuffled whole.
        """
        if not by_number and self.max_training_steps is None:
            raise ValueError(
                "the training set can only be read in order, so its number of rows is unknown; set max_training_steps."
            )
        if by_number and not is_default(self, "shuffle_buffer_size"):
            raise ValueError(
                f"shuffle_buffer_size={self.shuffle_buffer_size} has no effect: the training set can be read by "
                "number, so it is shuffled whole. Leave it out."
            )

    def _check_lora(self) -> None:
        try:
            check_pattern(self.lora_pattern or "")
        except ValueError as error:
            raise ValueError(f"lora_pattern: {error}") from error
        if self.lora_rank is not None:
            return
        for field in dataclasses.fields(self):
            if field.name in LORA_OPTIONS and not is_default(self, field.name):
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)!r} has no effect with lora_rank=None, which trains all "
                    f"weights; set lora_rank, for example to 16, or leave {field.name} at {field.default!r}."
                )
