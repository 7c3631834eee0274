"""Run the training loop: update, log, evaluate, save. The loop knows models, states and batches, not what they mean.

Read on in this order:

- `trainer_protocol`: what passes between the loop and its task, and the hooks that a task fills in.
- `device_feed`: batches on their way to the devices.
- `step`: one update, from a batch to a new state.
- `run/training_log`: its metrics, fetched one log line late; `callbacks/`: what receives them.
- `run/record`: the run's folder, its checkpoints, and how a run is resumed.
- `direct_preference_optimization_trainer/dpo_trainer`: the task.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.cache_folder import enable_compilation_cache
from easydel.infra.device import peak_flops
from easydel.infra.mesh import create_mesh, mesh_of, tree_shardings
from easydel.infra.state_files import WriteError
from easydel.layers.lora import copy_trainable, join, split_trainable
from easydel.paths import user_path
from easydel.trainers.adapted_model import adapted_model, model_of
from easydel.trainers.callbacks.callback import Callbacks, LogLine, TrainerCallback
from easydel.trainers.callbacks.progress import ProgressReporter
from easydel.trainers.callbacks.stopping import stopping_callbacks
from easydel.trainers.callbacks.trackers import TRACKERS
from easydel.trainers.device_feed import on_device, with_positions
from easydel.trainers.optimizers import make_optimizer, make_schedule
from easydel.trainers.run.checkpoints import check_intact, damaged_metadata
from easydel.trainers.run.identity import options_of_result
from easydel.trainers.run.record import RunRecord
from easydel.trainers.run.signals import StopSignals, interruption
from easydel.trainers.run.training_log import LogWindow, MeanMetrics, TrainingLog, Update, read_log_metadata
from easydel.trainers.step import CompiledTrainingStep, evaluation_step, training_step
from easydel.trainers.trainer_protocol import (
    Batch,
    BatchIterator,
    BatchLoader,
    DeviceBatch,
    EvaluationStep,
    Metrics,
    SelfCheckError,
    TrainerConfigureDataloaderOutput,
    TrainerConfigureFunctionOutput,
    TrainerHooks,
    TrainerOutput,
    TrainingStep,
)
from easydel.trainers.training_arguments import TrainingArguments
from easydel.weights.fingerprint import model_digest

logger = logging.getLogger("easydel")


class Trainer(TrainerHooks):
    """Trains a model on batches; logs, evaluates and saves on schedule.

    A subclass fills in the hooks of `TrainerHooks`. Its `__init__` calls this one first, then sets what the loaders
    and the model need, and then calls `set_up`, which makes them: no hook sees a half-built object. The caller's own
    model stays usable: the trainer works on a copy of what it trains and only reads the rest.

    Args:
      arguments: options of the run.
      model: a model, or a state, whose model is taken; step, optimiser and schedule are the run's own.
      processing_class: tokenizer, saved beside the model.
      callbacks: called besides the trackers and the progress bar.

    Attributes:
      mesh: the devices; those of the model, if it is on a mesh already.
      dataloaders, total_steps, state: batches, planned updates, and the state in training; available after `set_up`.
      log_history: every line of the log so far.
    """

    # Metric -> label of those shown in the progress bar.
    progress_metrics: ClassVar[Mapping[str, str]] = {"loss": "loss"}
    # What the task calls its examples, in the names of metrics.
    examples_name: ClassVar[str] = "examples"

    dataloaders: TrainerConfigureDataloaderOutput
    total_steps: int
    state: EasyDeLState

    def __init__(
        self,
        arguments: TrainingArguments,
        model: EasyDeLBaseModule | EasyDeLState,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        enable_compilation_cache()
        self.arguments = arguments
        self.processing_class = processing_class
        self.log_history: list[LogLine] = []
        self.mesh = mesh_of(model_of(model)) or create_mesh()
        stopping = stopping_callbacks(
            arguments.best_metric, arguments.early_stopping_patience, arguments.max_training_seconds
        )
        self._callbacks = Callbacks([*callbacks, *stopping])
        self._record = RunRecord(arguments)
        self._signals = StopSignals()
        self._has_started = False
        self._given_model: dict[str, Any] | None = None
        self._stop_reason: str | None = None
        self._functions: TrainerConfigureFunctionOutput | None = None

    # Set-up.

    def set_up(self, model: EasyDeLBaseModule | EasyDeLState) -> None:
        """Make the loaders, plan the run, and make the state to train; a subclass's `__init__` calls it.

        Raises:
          ValueError: options of evaluation without an evaluation set, or a run whose length is unknown.
        """
        arguments = self.arguments
        self.dataloaders = self.configure_dataloaders()
        if arguments.do_eval and not self.dataloaders.evaluation:
            raise ValueError("do_eval=True, but there is no eval_dataset; give one or leave do_eval out.")
        if arguments.evaluation_steps is not None and not self.dataloaders.evaluation:
            raise ValueError(
                f"evaluation_steps={arguments.evaluation_steps} has no effect without an eval_dataset; give one."
            )
        self.total_steps = self._plan_steps()
        self._schedule = make_schedule(arguments, self.total_steps)
        # Evaluate the schedule up front: later it would queue behind a running update and block logging.
        self._learning_rates = np.asarray(jax.vmap(self._schedule)(jnp.arange(self.total_steps)))
        self.state = self.configure_model(model)

    def add_callback(self, callback: TrainerCallback) -> None:
        """Add a callback, called after those already there."""
        self._callbacks.add(callback)

    def configure_model(self, model: EasyDeLBaseModule | EasyDeLState) -> EasyDeLState:
        """Make the state to train, on its mesh, with trained parameters in buffers of their own."""
        policy = adapted_model(model_of(model), self.arguments)
        # A copy of what is trained, so that no update touches the caller's buffers; what is frozen is shared.
        policy = copy_trainable(policy.shard(self.mesh))
        state = EasyDeLState.create(policy, make_optimizer(self.arguments, self._schedule))
        return jax.device_put(state, tree_shardings(state, policy.partition_rules, self.mesh))

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

    def make_steps(self) -> tuple[TrainingStep, EvaluationStep]:
        """The pure training and evaluation steps, not yet compiled; metrics are means over the batch's examples."""
        loss = self.make_loss()
        train = functools.partial(
            training_step,
            loss=loss,
            count_micro_batches=self.count_micro_batches,
            remat=self.arguments.gradient_checkpointing,
            dropout_seed=self.arguments.lora_seed,
        )
        return train, functools.partial(evaluation_step, loss=loss, count_micro_batches=self.count_micro_batches)

    def configure_functions(self) -> TrainerConfigureFunctionOutput:
        """Make the jitted training and evaluation steps; the training step donates the state it is given."""
        train, evaluate = self.make_steps()
        return TrainerConfigureFunctionOutput(
            sharded_training_step_function=CompiledTrainingStep(train, self.state.shardings),
            sharded_evaluation_step_function=jax.jit(evaluate),
            mesh=self.mesh,
            checkpoint_manager=self._record.checkpoints,
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

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run's files; None before `train`, and for a run that writes none."""
        return self._record.folder

    # Checkpoints.

    def checkpoint_arrays(self) -> dict[str, Any]:
        """Every array that a run needs to resume, as pytrees by name; frozen parameters are not among them."""
        return {"state": self.state.replace(model=split_trainable(self.state.model)[0])}

    def restore_arrays(self, arrays: dict[str, Any]) -> None:
        """Set the state from arrays that `checkpoint_arrays` returned."""
        frozen = split_trainable(self.state.model)[1]
        self.state = arrays["state"].replace(model=join(arrays["state"].model, frozen))

    def run_identity(self) -> dict[str, Any]:
        """All that determines the run's numbers, in JSON types; a checkpoint with another identity is refused."""
        # Dropout is drawn by position in the batch, so the layout and the mesh change the result.
        with_layout = self.arguments.lora_dropout > 0
        options = options_of_result(self.arguments, with_layout=with_layout)
        identity = {"model": self._model_as_given(), "updates": self.total_steps} | options
        return identity | {"mesh": dict(self.mesh.shape)} if with_layout else identity

    def load_checkpoint(self, folder: str | Path) -> None:
        """Load the state of a checkpoint of this model, e.g. `TrainerOutput.best_checkpoint`, to evaluate or save it.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: it is of another model or optimiser, or damaged.
        """
        checkpoint = user_path(folder).absolute()
        check_intact(checkpoint)
        # A run without files never digests its initial model, and after the first update that model is gone.
        is_known = self._given_model is not None or not self._has_started
        known = {"model": self._model_as_given()} if is_known else {}
        arrays, _ = self._record.load(checkpoint, self.checkpoint_arrays(), known)
        self.restore_arrays(arrays)

    def _model_as_given(self) -> dict[str, Any]:
        """The digest of the model before any update; the first call must come before the first update."""
        if self._given_model is None:
            self._given_model = model_digest(self.state.model)
        return self._given_model

    def _open_run(self) -> tuple[list[Update], int] | None:
        """Open the run's folder and resume if asked to; return the updates that still wait for their log line."""
        if self.arguments.save_directory is None:
            return None
        identity = self.run_identity()
        checkpoint = self._record.open(identity)
        if checkpoint is None:
            return None
        arrays, metadata = self._record.load(checkpoint, self.checkpoint_arrays(), identity)
        try:
            pending = read_log_metadata(metadata["log"])
        except ValueError as error:
            raise damaged_metadata(checkpoint, str(error)) from error
        lines = self._record.resume(checkpoint, metadata)
        self.restore_arrays(arrays)
        self.log_history[:] = lines
        progress = self._record.progress
        logger.warning("resuming in %s from update %d of %d.", self.run_folder, progress.step, self.total_steps)
        return pending

    def _save(self, log: TrainingLog) -> None:
        with log.pause():
            self._record.save(self.checkpoint_arrays(), log.metadata())
            self._callbacks.notify(self, "on_save", self._record.progress.step, self._record.last_checkpoint)

    def _save_last_good_state(self, log: TrainingLog) -> None:
        """After an exception, save what was trained since the last checkpoint, if the state has survived."""
        record = self._record
        if record.is_saved:
            return
        if (
            any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
            or int(self.state.step) != record.progress.step
        ):
            last = record.last_checkpoint
            logger.error("the state was lost with the update that failed; the last checkpoint is %s.", last)
            return
        try:
            record.save(self.checkpoint_arrays(), log.metadata())
            record.checkpoints.wait()
        except WriteError:
            logger.error("the state after update %d is lost; the last checkpoint is before it.", record.progress.step)
        except Exception:
            # Only log this one: the exception that ended the run is the one to raise.
            logger.exception("the state after update %d could not be saved.", record.progress.step)
        else:
            logger.warning(
                'the state after update %d is saved in %s; resume with resume_from_checkpoint="latest".',
                record.progress.step,
                record.last_checkpoint,
            )

    # The loop.

    def train(self) -> TrainerOutput:
        """Train to the end of the data or ``max_training_steps``, evaluating before, on schedule and after.

        SIGINT and SIGTERM end the run after the update in progress, with a checkpoint. An exception from a hook, a
        callback or the data also leaves a checkpoint, and reaches the caller.

        Returns:
          The final state, the last metrics and the whole log.

        Raises:
          NonFiniteError: the loss or gradient stayed non-finite; `self.state` is the last good state.
          ValueError: there is no training set, this trainer has trained before, or the checkpoint to resume from is of
            another run.
          KeyboardInterrupt, SystemExit: a signal ended the run.
        """
        if self.dataloaders.train is None:
            raise ValueError("train() needs a train_dataset.")
        if self._has_started:
            raise ValueError(
                f"this trainer has been started before and has made {int(self.state.step)} updates; make a new one, "
                "with trainer.model as its model to train on from here."
            )
        if self.arguments.resume_from_checkpoint is None and int(self.state.step):
            raise ValueError(
                f"this trainer holds the state of a checkpoint after {int(self.state.step)} updates: to resume from "
                "it, set resume_from_checkpoint; to train further from its weights, make a new trainer with "
                "trainer.model."
            )
        self._has_started = True
        log = TrainingLog(self.arguments.log_steps, self.arguments.max_nonfinite_steps, self._log_window)
        try:
            with StopSignals() as self._signals:
                with log.pause():
                    pending = self._open_run()
                    self.prepare_run()
                # The log's own file comes first: each line is in it even if another callback raises.
                self._callbacks.put_first(self._run_callbacks())
                self._callbacks.notify(self, "on_train_begin")
                if pending is not None:
                    log.restore(*pending)
                self._run(log)
        except SelfCheckError:
            raise
        except BaseException:
            if self._signals.received is not None:
                log.write_complete()
            self._save_last_good_state(log)
            raise
        finally:
            self._signals = StopSignals()
            with contextlib.ExitStack() as ends:  # both run, even if one of them raises
                ends.callback(self._callbacks.end, self)
                ends.callback(self._record.close, sys.exc_info()[1])
        last: dict[str, float] = {}
        for line in self.log_history:
            last |= {name: value for name, value in line.items() if name != "step"}
        return TrainerOutput(
            state=self.state,
            metrics=last,
            last_checkpoint=self._record.last_checkpoint,
            best_checkpoint=self._record.best_checkpoint,
            log_history=self.log_history,
            run_folder=self.run_folder,
            stop_reason=self._stop_reason,
        )

    def stop(self, reason: str) -> None:
        """End the run after the update in progress, with its last evaluation and checkpoint; for callbacks."""
        self._stop_reason = self._stop_reason or reason

    @property
    def evaluations(self) -> Mapping[int, dict[str, float]]:
        """The run's own evaluations by update, those before an interruption included."""
        return self._record.evaluations

    def _run(self, log: TrainingLog) -> None:
        arguments, progress = self.arguments, self._record.progress
        with log.pause():
            # Measure the peak now, where it has to be measured: during an update it would come out too low.
            peak_flops(self.mesh)
        self._evaluate_if_due(log)
        for batch, device_batch, position in () if self._is_over() else self._training_batches():
            metrics, is_nonfinite = self._update(batch, device_batch, position)
            try:
                self.state, metrics = self.on_step_end(self.state, metrics, progress.step)
            finally:
                log.add(progress.step, metrics, is_nonfinite, self.batch_statistics(batch))
            self._callbacks.notify(self, "on_step_end", progress.step)
            self._raise_if_interrupted()
            self._evaluate_if_due(log, is_last=self._is_over())
            # An evaluation may have stopped the run.
            if arguments.save_steps is not None and (self._is_over() or progress.step % arguments.save_steps == 0):
                self._save(log)
            if self._is_over():
                break
        self._evaluate_if_due(log, is_last=True)
        log.write_all()
        if arguments.save_steps is not None and not self._record.is_saved:
            self._save(log)
        if self._stop_reason is not None:
            logger.warning("stopped after update %d of %d: %s.", progress.step, self.total_steps, self._stop_reason)
        elif progress.step < self.total_steps:
            logger.warning(
                "the data ended after %d of %d planned updates: rows were dropped, or a stream is shorter.",
                progress.step,
                self.total_steps,
            )

    def _raise_if_interrupted(self) -> None:
        """Raise if a signal has come; called between updates and between batches."""
        received = self._signals.received
        if received is not None:
            raise interruption(received, f"{received.name} after update {self._record.progress.step}")

    def _is_over(self) -> bool:
        return self._record.progress.step == self.total_steps or self._stop_reason is not None

    def _training_batches(self) -> Iterator[tuple[Batch, DeviceBatch, dict[str, Any]]]:
        """The run's remaining batches, each with the data's position right after it."""
        assert self.dataloaders.train is not None
        batches = self._batches_from_here(self.dataloaders.train)
        return with_positions(batches, self.total_steps - self._record.progress.step, self.on_device)

    def on_device(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, DeviceBatch]]:
        """Batches with their copies on the devices, sent ahead of their use; a signal raises between two of them."""
        return on_device(batches, self.mesh, self._raise_if_interrupted)

    def _batches_from_here(self, train: BatchLoader) -> BatchIterator:
        progress = self._record.progress
        if progress.data is None:
            return train.iterate()
        try:
            return train.iterate(progress.data)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(
                f"the data cannot resume from its position after update {progress.step}, as "
                f"{self._record.last_checkpoint} keeps it: {error}"
            ) from error

    def _update(self, batch: Batch, device_batch: DeviceBatch, position: dict[str, Any]) -> tuple[Metrics, jax.Array]:
        """Make one update; return its metrics and whether it was skipped."""
        progress = self._record.progress
        state = self.on_step_start(self.state, progress.step + 1)
        with jax.set_mesh(self.mesh):
            prepared = self.prepare_batch(state, batch, device_batch)
            self.state, metrics = self.functions.sharded_training_step_function(state, prepared)
        # Right after the state: a save after an exception must hold the state and the progress of the same update.
        progress.step, progress.data = progress.step + 1, position
        is_nonfinite = metrics.pop("nonfinite")
        if progress.step == 1 and not is_nonfinite:
            self.check_first_step(device_batch, jax.device_get(metrics))
        return metrics, is_nonfinite

    def _evaluate_if_due(self, log: TrainingLog, is_last: bool = False) -> None:
        progress, every, best = self._record.progress, self.arguments.evaluation_steps, self.arguments.best_metric
        if not self.dataloaders.evaluation or self.arguments.do_eval is False or progress.evaluated == progress.step:
            return
        if progress.step == 0 or is_last or (every is not None and progress.step % every == 0):
            with log.pause():
                results = self.measure(self.dataloaders.evaluation)
                if best is not None and best not in results:
                    known = ", ".join(sorted(results))
                    raise ValueError(f"best_metric={best!r} is not among the evaluation's metrics: {known}.")
                self._record.evaluations[progress.step] = results
                progress.evaluated = progress.step
                self._log({"step": progress.step} | results)
                self._callbacks.notify(self, "on_evaluate", results)

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
        results = self.measure(sets)
        self._log({"step": int(self.state.step)} | results)
        self._callbacks.notify(self, "on_evaluate", results)
        return results

    def measure(self, sets: Mapping[str, BatchLoader]) -> dict[str, float]:
        """Evaluate on sets by name and return the ``eval/…`` means; nothing is logged."""
        results: dict[str, float] = {}
        evaluation_step = self.functions.sharded_evaluation_step_function
        for name, loader in sets.items():
            means, started, examples = MeanMetrics(), time.perf_counter(), 0
            with jax.set_mesh(self.mesh), contextlib.closing(loader.iterate()) as batches:
                for batch, device_batch in self.on_device(batches):
                    statistics = self.batch_statistics(batch)
                    metrics = evaluation_step(self.state, self.prepare_batch(self.state, batch, device_batch))
                    means.add(metrics | statistics.means, statistics.examples)
                    examples += statistics.examples
            numbers = means.means() | loader.counters()
            numbers[f"{self.examples_name}_per_second"] = examples / (time.perf_counter() - started)
            prefix = f"eval/{name}/" if name else "eval/"
            results |= {prefix + key: value for key, value in numbers.items()}
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
            from easydel.tokenizer.tokenizer import save_tokenizer  # imports transformers, which a run may do without

            save_tokenizer(self.processing_class, folder)

    def _run_callbacks(self) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = []
        if self.run_folder is not None and self._record.log is not None:
            callbacks.append(self._record.log)
            callbacks += [TRACKERS[name](self.run_folder) for name in self.arguments.report_to]
        if self.arguments.progress_bar:
            callbacks.append(ProgressReporter())
        return callbacks

    def _log_window(self, window: LogWindow) -> None:
        assert self.dataloaders.train is not None
        means, seconds = window.means() | self.dataloaders.train.counters(), window.seconds
        tokens = window.total(lambda statistics: statistics.tokens)
        line = {f"train/{name}": value for name, value in means.items()} | {
            "train/learning_rate": float(self._learning_rates[window.last_step - 1]),
            "train/num_tokens": tokens,
            "train/tokens_per_second": tokens / seconds,
            f"train/{self.examples_name}_per_second": window.total(lambda statistics: statistics.examples) / seconds,
            "train/mfu": window.total(lambda statistics: statistics.flops) / seconds / peak_flops(self.mesh),
        }
        if self.dataloaders.steps_per_epoch is not None:
            epoch = window.last_step / self.dataloaders.steps_per_epoch
            line["train/epoch"] = min(epoch, float(self.arguments.num_train_epochs))
        self._log({"step": window.last_step} | line)

    def _log(self, line: LogLine) -> None:
        self.log_history.append(line)
        self._callbacks.notify(self, "on_log", line)
