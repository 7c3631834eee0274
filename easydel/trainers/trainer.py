"""The training loop. It knows models, states and batches; what a batch means is a subclass's business."""

from __future__ import annotations

import abc
import collections
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.compilation_cache import enable_compilation_cache
from easydel.infra.device import peak_flops
from easydel.infra.mesh import create_mesh, mesh_of, put_batch, tree_shardings
from easydel.infra.trainable import copy_trainable
from easydel.trainers.callbacks import LogLine, TrainerCallback
from easydel.trainers.compiled_step import compile_training_step
from easydel.trainers.log_window import LogWindow, TrainingLog
from easydel.trainers.metrics import MeanMetrics
from easydel.trainers.optimizers import make_optimizer, make_schedule
from easydel.trainers.progress import ProgressReporter
from easydel.trainers.trackers import TRACKERS, JsonLinesTracker
from easydel.trainers.trainer_protocol import (
    Batch,
    BatchLoader,
    BatchStatistics,
    DeviceBatch,
    Metrics,
    TrainerConfigureDataloaderOutput,
    TrainerConfigureFunctionOutput,
    TrainerOutput,
)
from easydel.trainers.training_arguments import TrainingArguments

logger = logging.getLogger("easydel")

BATCHES_ON_DEVICE = 2


class Trainer(abc.ABC):
    """Trains a model: batches in, updates, logs, evaluations out.

    A subclass gives the batches (`configure_dataloaders`), the two steps (`make_steps`) and what the host can say of
    a batch (`batch_statistics`). The caller's own model stays usable: the trainer works on a copy of what
    it trains and only reads the rest.

    Args:
      arguments: options of the run.
      model: a model, or a state, whose model is taken; step, optimiser and schedule are the run's own.
      processing_class: tokenizer, saved beside the model.
      callbacks: listeners besides the trackers and the progress bar.
    """

    # Metric -> label of those shown in the progress bar.
    progress_metrics: ClassVar[dict[str, str]] = {"loss": "loss"}

    def __init__(
        self,
        arguments: TrainingArguments,
        model: EasyDeLBaseModule | EasyDeLState,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if not isinstance(model, (EasyDeLBaseModule, EasyDeLState)):
            raise TypeError(
                f"model is {type(model).__name__} {model!r:.80}, expected a model or a state; load one with "
                "AutoEasyDeLModelForCausalLM.from_pretrained."
            )
        self.arguments = arguments
        self.processing_class = processing_class
        self.log_history: list[LogLine] = []
        self.run_folder: Path | None = None
        self.mesh = mesh_of(model) or create_mesh()
        self.dataloaders = self.configure_dataloaders()
        if arguments.do_eval and not self.dataloaders.evaluation:
            raise ValueError("do_eval=True, but there is no eval_dataset; give one or leave do_eval out.")
        if arguments.evaluation_steps is not None and not self.dataloaders.evaluation:
            raise ValueError(
                f"evaluation_steps={arguments.evaluation_steps} has no effect without an eval_dataset; give one."
            )
        self.total_steps = self._plan_steps()
        self._schedule = make_schedule(arguments, self.total_steps)
        self._callbacks = list(callbacks)
        self.state = self.configure_model(model)
        self._functions: TrainerConfigureFunctionOutput | None = None

    # What a subclass gives.

    @abc.abstractmethod
    def configure_dataloaders(self) -> TrainerConfigureDataloaderOutput:
        """Make the loaders; nothing is read before they are iterated."""

    @abc.abstractmethod
    def make_steps(
        self,
    ) -> tuple[
        Callable[[EasyDeLState, DeviceBatch], tuple[EasyDeLState, Metrics]],
        Callable[[EasyDeLState, DeviceBatch], Metrics],
    ]:
        """The pure training and evaluation steps, not yet compiled; metrics are means over the batch's examples."""

    @abc.abstractmethod
    def batch_statistics(self, batch: Batch) -> BatchStatistics:
        """Count a batch on the host."""

    @abc.abstractmethod
    def evaluation_loader(self, dataset: Any) -> BatchLoader:
        """Batches of a set that was not given at construction."""

    def prepare_batch(self, state: EasyDeLState, batch: DeviceBatch) -> DeviceBatch:
        """Add to a batch on the device what the step needs besides; called before every step."""
        return batch

    def on_step_start(self, state: EasyDeLState, step: int) -> EasyDeLState:
        """Hook before update number `step` (from 1)."""
        return state

    def on_step_end(self, state: EasyDeLState, metrics: Metrics, step: int) -> tuple[EasyDeLState, Metrics]:
        """Hook after update number `step` (from 1); the metrics that come back are the ones logged."""
        return state, metrics

    @abc.abstractmethod
    def check_first_step(self, batch: DeviceBatch, metrics: Mapping[str, Any]) -> None:
        """Look at the first update's batch and metrics; raise `SelfCheckError` if they can't be right."""

    # Set-up.

    def configure_model(self, model: EasyDeLBaseModule | EasyDeLState) -> EasyDeLState:
        """The state to train, on its mesh, trained parameters in buffers of their own."""
        policy = self._with_adapters(model.model if isinstance(model, EasyDeLState) else model)
        # A copy of what is trained, so that no update touches the caller's buffers; what is frozen is shared.
        policy = copy_trainable(policy.shard(self.mesh))
        state = EasyDeLState.create(policy, make_optimizer(self.arguments, self._schedule))
        return jax.device_put(state, tree_shardings(state, policy.partition_rules, self.mesh))

    def _with_adapters(self, model: EasyDeLBaseModule) -> EasyDeLBaseModule:
        """The model with the adapters, and the quantised weights beside them, that the options ask for."""
        arguments = self.arguments
        if arguments.lora_rank is None:
            return model
        if arguments.quantize_base is not None:
            if model.is_quantized:
                raise ValueError(
                    f"quantize_base={arguments.quantize_base!r}, but the model is quantised already; leave it out."
                )
            model = model.quantize()
        if model.has_lora:
            raise ValueError(
                f"lora_rank={arguments.lora_rank}, but the model has adapters already: leave lora_rank out to train "
                "those, or pass model.merge_lora() to train new ones on top of them."
            )
        return model.apply_lora_to_layers(
            arguments.lora_rank,
            arguments.lora_alpha,
            arguments.lora_pattern,
            dropout=arguments.lora_dropout,
            use_rslora=arguments.use_rslora,
            seed=arguments.lora_seed,
        )

    def _plan_steps(self) -> int:
        """Updates the run is expected to make."""
        if self.dataloaders.train is None:
            return 0
        limits = [value for value in (self.dataloaders.steps, self.arguments.max_training_steps) if value is not None]
        if not limits:
            raise ValueError("the training set's length is unknown; set max_training_steps.")
        if self.arguments.warmup_steps > min(limits):
            raise ValueError(
                f"warmup_steps={self.arguments.warmup_steps} is more than the run's {min(limits)} updates."
            )
        return min(limits)

    def configure_functions(self) -> TrainerConfigureFunctionOutput:
        """Compile-on-first-use training and evaluation steps; the training step uses up the state it is given."""
        enable_compilation_cache()
        train, evaluate = self.make_steps()
        return TrainerConfigureFunctionOutput(
            sharded_training_step_function=compile_training_step(train, self.state.shardings),
            sharded_evaluation_step_function=jax.jit(evaluate),
            mesh=self.mesh,
            checkpoint_manager=None,
        )

    @property
    def functions(self) -> TrainerConfigureFunctionOutput:
        """The compiled steps, made once."""
        if self._functions is None:
            self._functions = self.configure_functions()
        return self._functions

    @property
    def model(self) -> EasyDeLBaseModule:
        """The model as trained so far."""
        return self.state.model

    # The loop.

    def train(self) -> TrainerOutput:
        """Train to the end of the data or ``max_training_steps``, evaluating before, on schedule and after.

        Returns:
          The final state, the last metrics and the whole log.

        Raises:
          NonFiniteError: the loss or gradient stayed non-finite; `self.state` is the last good state.
          ValueError: there is no training set, or this trainer has trained before.
        """
        if self.dataloaders.train is None:
            raise ValueError("train() needs a train_dataset.")
        if int(self.state.step) > 0:
            raise ValueError(
                f"this trainer has already made {int(self.state.step)} updates; make a new one, with trainer.model as "
                "its model to train on from here."
            )
        arguments = self.arguments
        self.run_folder = arguments.make_run_folder()
        self._callbacks += self._run_callbacks()
        do_eval = bool(self.dataloaders.evaluation) and arguments.do_eval is not False
        step = 0
        self._notify("on_train_begin")
        try:
            if do_eval:
                self.evaluate()
            log = TrainingLog(arguments.log_steps, arguments.max_nonfinite_steps, self._log_window)
            for step, (batch, device_batch) in enumerate(self._training_batches(), start=1):
                metrics, is_nonfinite = self._update(device_batch, step)
                log.add(step, metrics, is_nonfinite, self.batch_statistics(batch))
                self._notify("on_step_end", step)
                if do_eval and arguments.evaluation_steps and step % arguments.evaluation_steps == 0:
                    with log.pause():
                        self.evaluate()
            log.write_all()
            if do_eval and not (arguments.evaluation_steps and step % arguments.evaluation_steps == 0):
                self.evaluate()
        finally:
            self._notify("on_train_end")
        if step < self.total_steps:
            logger.warning("the data ended after %d of %d planned updates: rows were dropped.", step, self.total_steps)
        last: dict[str, float] = {}
        for line in self.log_history:
            last |= {name: value for name, value in line.items() if name != "step"}
        return TrainerOutput(self.state, last, self.log_history, self.run_folder)

    def _training_batches(self) -> Iterator[tuple[Batch, DeviceBatch]]:
        assert self.dataloaders.train is not None
        return self._on_device(itertools.islice(self.dataloaders.train, self.total_steps))

    def _update(self, batch: DeviceBatch, step: int) -> tuple[Metrics, jax.Array]:
        """One update between its two hooks: the metrics to log, and whether it had to be skipped."""
        state = self.on_step_start(self.state, step)
        with jax.set_mesh(self.mesh):
            prepared = self.prepare_batch(state, batch)
            self.state, metrics = self.functions.sharded_training_step_function(state, prepared)
        is_nonfinite = metrics.pop("nonfinite")
        if step == 1 and not is_nonfinite:
            self.check_first_step(batch, jax.device_get(metrics))
        self.state, metrics = self.on_step_end(self.state, metrics, step)
        return metrics, is_nonfinite

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Evaluate on `dataset`, or on every set given at construction.

        Returns:
          ``eval/…`` means over all examples, ``eval/<name>/…`` for named sets; also logged.
        """
        if dataset is None:
            sets = self.dataloaders.evaluation
        else:
            named = dataset if isinstance(dataset, Mapping) else {"": dataset}
            sets = {name: self.evaluation_loader(data) for name, data in named.items()}
        if not sets:
            raise ValueError("evaluate() needs a dataset: give one here or as eval_dataset.")
        results: dict[str, float] = {}
        evaluation_step = self.functions.sharded_evaluation_step_function
        for name, loader in sets.items():
            means, started, examples = MeanMetrics(), time.perf_counter(), 0
            with jax.set_mesh(self.mesh):
                for batch, device_batch in self._on_device(loader):
                    statistics = self.batch_statistics(batch)
                    metrics = evaluation_step(self.state, self.prepare_batch(self.state, device_batch))
                    means.add(metrics | statistics.means, statistics.examples)
                    examples += statistics.examples
            numbers = means.means() | loader.counters()
            numbers["pairs_per_second"] = examples / (time.perf_counter() - started)
            prefix = f"eval/{name}/" if name else "eval/"
            results |= {prefix + key: value for key, value in numbers.items()}
        self._log({"step": int(self.state.step)} | results)
        return results

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as trained so far, adapters merged, and its tokenizer as a Hugging Face folder."""
        self.model.save_pretrained(folder)
        self._save_tokenizer(folder)

    def save_adapter(self, folder: str | Path, **options: Any) -> None:
        """Write the adapters as trained so far and the tokenizer; `options` are those of the model's `save_adapter`."""
        self.model.save_adapter(folder, **options)
        self._save_tokenizer(folder)

    def _save_tokenizer(self, folder: str | Path) -> None:
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))

    def _run_callbacks(self) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = []
        if self.run_folder is not None:
            callbacks.append(JsonLinesTracker(self.run_folder))
            callbacks += [TRACKERS[name](self.run_folder) for name in self.arguments.report_to]
        if self.arguments.progress_bar:
            callbacks.append(ProgressReporter())
        return callbacks

    def _on_device(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, DeviceBatch]]:
        """Batches with their copies on the device, sent two ahead of their use."""
        ahead: collections.deque[tuple[Batch, DeviceBatch]] = collections.deque()
        for batch in batches:
            ahead.append((batch, put_batch(batch, self.mesh)))
            if len(ahead) > BATCHES_ON_DEVICE:
                yield ahead.popleft()
        yield from ahead

    def _log_window(self, window: LogWindow) -> None:
        assert self.dataloaders.train is not None
        means, seconds = window.metrics.means() | self.dataloaders.train.counters(), window.seconds
        line = {f"train/{name}": value for name, value in means.items()} | {
            "train/learning_rate": float(self._schedule(window.last_step - 1)),
            "train/num_tokens": window.tokens,
            "train/tokens_per_second": window.tokens / seconds,
            "train/pairs_per_second": window.examples / seconds,
            "train/mfu": window.flops / seconds / peak_flops(self.mesh),
        }
        if self.dataloaders.steps_per_epoch is not None:
            epoch = window.last_step / self.dataloaders.steps_per_epoch
            line["train/epoch"] = min(epoch, float(self.arguments.num_train_epochs))
        self._log({"step": window.last_step} | line)

    def _log(self, line: LogLine) -> None:
        self.log_history.append(line)
        self._notify("on_log", line)

    def _notify(self, event: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self, *arguments)
