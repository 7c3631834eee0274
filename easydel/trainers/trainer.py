"""The training loop. It knows models, states and batches; what a batch means is a subclass's business."""

from __future__ import annotations

import abc
import collections
import dataclasses
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
from easydel.infra.fingerprint import fingerprint
from easydel.infra.mesh import create_mesh, mesh_of, put_batch, tree_shardings
from easydel.infra.state_files import load_arrays
from easydel.infra.trainable import copy_trainable, join, split_trainable
from easydel.trainers.callbacks import LogLine, TrainerCallback
from easydel.trainers.checkpoints import ARRAYS, Checkpoints, latest_checkpoint, read_notes
from easydel.trainers.compiled_step import compile_training_step
from easydel.trainers.log_window import LogWindow, TrainingLog
from easydel.trainers.metrics import MeanMetrics
from easydel.trainers.optimizers import make_optimizer, make_schedule
from easydel.trainers.progress import ProgressReporter
from easydel.trainers.run_folder import find_checkpoint, make_run_folder, read_log, run_of, write_log
from easydel.trainers.run_identity import OPTIONS_OF_A_SESSION, as_json, refuse_other_run
from easydel.trainers.stop_signals import StopSignals, interruption
from easydel.trainers.stopping import EarlyStopping, TimeLimit, lower_is_better
from easydel.trainers.trackers import TRACKERS, JsonLinesTracker
from easydel.trainers.trainer_protocol import (
    Batch,
    BatchLoader,
    BatchStatistics,
    DeviceBatch,
    Metrics,
    SelfCheckError,
    TrainerConfigureDataloaderOutput,
    TrainerConfigureFunctionOutput,
    TrainerOutput,
)
from easydel.trainers.training_arguments import TrainingArguments

logger = logging.getLogger("easydel")

BATCHES_ON_DEVICE = 2


@dataclasses.dataclass
class Place:
    """How far a run has come: updates made, the data's position behind them, and the update last evaluated at."""

    step: int = 0
    data: dict[str, Any] | None = None
    evaluated: int | None = None


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
        self._callbacks = [*callbacks, *_stopping_callbacks(arguments)]
        best_metric = arguments.best_metric
        self.checkpoints = Checkpoints(
            arguments.save_total_limit, best_metric, best_metric is not None and lower_is_better(best_metric)
        )
        self._identity: dict[str, Any] | None = None
        self._place = Place()
        self._saved_step = 0
        self._last_checkpoint: Path | None = None
        self._last_evaluation: dict[str, float] = {}
        self._stop_reason: str | None = None
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

    def prepare_batch(self, state: EasyDeLState, batch: Batch, device_batch: DeviceBatch) -> DeviceBatch:
        """Add to a batch on the device what the step needs besides; called before every step."""
        return device_batch

    def prepare_run(self) -> None:  # noqa: B027  a hook: nothing to do unless a subclass has something
        """Hook at the start of `train`, when it is known where the run begins and before its first evaluation."""

    def on_step_start(self, state: EasyDeLState, step: int) -> EasyDeLState:
        """Hook before update number `step` (from 1)."""
        return state

    def on_step_end(self, state: EasyDeLState, metrics: Metrics, step: int) -> tuple[EasyDeLState, Metrics]:
        """Hook after update number `step` (from 1); the metrics that come back are the ones logged."""
        return state, metrics

    @abc.abstractmethod
    def check_first_step(self, batch: DeviceBatch, metrics: Mapping[str, Any]) -> None:
        """Look at the first update's batch and metrics; raise `SelfCheckError` if they can't be right."""

    def checkpoint_arrays(self) -> dict[str, Any]:
        """Every array that a run needs to go on, as pytrees by name; frozen parameters are not among them."""
        return {"state": self.state.replace(model=split_trainable(self.state.model)[0])}

    def restore_arrays(self, arrays: dict[str, Any]) -> None:
        """Take back what `checkpoint_arrays` gave."""
        frozen = split_trainable(self.state.model)[1]
        self.state = arrays["state"].replace(model=join(arrays["state"].model, frozen))

    def run_identity(self) -> dict[str, Any]:
        """What makes two runs the same run, in JSON types; a checkpoint of a run with another identity is refused."""
        options = dataclasses.asdict(self.arguments)
        shared = {name: value for name, value in options.items() if name not in OPTIONS_OF_A_SESSION}
        return {"model": fingerprint(self.state.model), "updates": self.total_steps} | shared

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
            checkpoint_manager=self.checkpoints,
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

    # Checkpoints.

    def load_checkpoint(self, folder: str | Path) -> dict[str, Any]:
        """Take the state of one of this run's checkpoints, e.g. `TrainerOutput.best_checkpoint`.

        Returns:
          The checkpoint's notes.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: it is of another run; names every difference.
        """
        folder = Path(folder)
        notes = read_notes(folder)
        refuse_other_run(folder, notes["identity"], self._identity or as_json(self.run_identity()))
        self.restore_arrays(load_arrays(folder / ARRAYS, self.checkpoint_arrays()))
        return notes

    def _open_run(self, log: TrainingLog) -> None:
        """Find the run's folder, and go on from a checkpoint where one is asked for."""
        arguments = self.arguments
        if arguments.save_directory is None:
            return
        where = arguments.save_directory, arguments.model_name
        self._identity = as_json(self.run_identity())
        checkpoint = None
        if arguments.resume_from_checkpoint is not None:
            checkpoint = find_checkpoint(arguments.resume_from_checkpoint, *where)
            if checkpoint is None:
                logger.warning("there is no checkpoint of %s/%s yet: starting from the beginning.", *where)
        if checkpoint is None:
            self.run_folder = make_run_folder(*where)
        else:
            notes = self.load_checkpoint(checkpoint)
            self._place = Place(**notes["place"])
            log.restore(notes["log"])
            run = run_of(checkpoint)
            self.log_history[:] = read_log(run, self._place.step)
            # Later checkpoints are never overwritten: going on from an earlier one is a run of its own.
            self.run_folder = run if checkpoint == latest_checkpoint(run) else make_run_folder(*where)
            write_log(self.run_folder, self.log_history)
            self._last_checkpoint = checkpoint
            logger.warning("going on from %s, update %d of %d.", checkpoint, self._place.step, self.total_steps)
        self.checkpoints.open(self.run_folder)

    def _save(self, log: TrainingLog) -> None:
        with log.pause():
            self._save_now(log)
            self._notify("on_save", self._place.step, self._last_checkpoint)

    def _save_now(self, log: TrainingLog) -> None:
        place = self._place
        notes = {
            "place": dataclasses.asdict(place),
            "log": log.notes(),
            "identity": self._identity,
            "options": dataclasses.asdict(self.arguments),
        }
        metrics = self._last_evaluation if place.evaluated == place.step else {}
        self._last_checkpoint = self.checkpoints.save(place.step, self.checkpoint_arrays(), notes, metrics)
        self._saved_step = place.step

    def _save_last_good_state(self, log: TrainingLog) -> None:
        """After an exception: keep what was trained since the last checkpoint, where the state has survived."""
        step = self._place.step
        if self.run_folder is None or self._saved_step == step:
            return
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            logger.error(
                "the state was lost with the update that failed; the last checkpoint is %s.", self._last_checkpoint
            )
            return
        try:
            self._save_now(log)
            self.checkpoints.wait()
        except Exception:
            # The exception that ended the run is the one to show.
            logger.exception("the state after update %d could not be saved.", step)
        else:
            logger.warning(
                'the state after update %d is saved in %s; go on with resume_from_checkpoint="latest".',
                step,
                self._last_checkpoint,
            )

    # The loop.

    def train(self) -> TrainerOutput:
        """Train to the end of the data or ``max_training_steps``, evaluating before, on schedule and after.

        SIGINT and SIGTERM end the run after the update in progress, with a checkpoint; any exception out of a hook,
        a callback or the data leaves one too, and reaches the caller.

        Returns:
          The final state, the last metrics and the whole log.

        Raises:
          NonFiniteError: the loss or gradient stayed non-finite; `self.state` is the last good state.
          ValueError: there is no training set, this trainer has trained before, or the checkpoint to go on from is of
            another run.
          KeyboardInterrupt, SystemExit: a signal ended the run.
        """
        if self.dataloaders.train is None:
            raise ValueError("train() needs a train_dataset.")
        if int(self.state.step) > 0:
            raise ValueError(
                f"this trainer has already made {int(self.state.step)} updates; make a new one, with trainer.model as "
                "its model to train on from here."
            )
        log = TrainingLog(self.arguments.log_steps, self.arguments.max_nonfinite_steps, self._log_window)
        with log.pause():
            self._open_run(log)
            self.prepare_run()
        # The log's own file comes first: a line is in it whatever a listener does.
        self._callbacks = self._run_callbacks() + self._callbacks
        try:
            with StopSignals() as signals:
                self._notify("on_train_begin")
                self._run(log, signals)
        except SelfCheckError:
            raise
        except BaseException:
            self._save_last_good_state(log)
            raise
        finally:
            self._notify("on_train_end")
            best = self.checkpoints.best
            self.checkpoints.close()
        last: dict[str, float] = {}
        for line in self.log_history:
            last |= {name: value for name, value in line.items() if name != "step"}
        return TrainerOutput(
            state=self.state,
            metrics=last,
            last_checkpoint=self._last_checkpoint,
            best_checkpoint=best,
            log_history=self.log_history,
            run_folder=self.run_folder,
            stop_reason=self._stop_reason,
        )

    def stop(self, reason: str) -> None:
        """End the run after the update in progress, with its last evaluation and checkpoint; for callbacks."""
        self._stop_reason = self._stop_reason or reason

    def _run(self, log: TrainingLog, signals: StopSignals) -> None:
        arguments, place = self.arguments, self._place
        self._evaluate_if_due(log, is_last=False)
        for batch, device_batch, position in self._training_batches():
            metrics, is_nonfinite = self._update(batch, device_batch, place.step + 1)
            place.step, place.data = place.step + 1, position
            log.add(place.step, metrics, is_nonfinite, self.batch_statistics(batch))
            self._notify("on_step_end", place.step)
            if signals.received is not None:
                break
            self._evaluate_if_due(log, is_last=self._is_over())
            # An evaluation may have stopped the run.
            if arguments.save_steps is not None and (self._is_over() or place.step % arguments.save_steps == 0):
                self._save(log)
            if self._stop_reason is not None:
                logger.warning("stopped after update %d of %d: %s.", place.step, self.total_steps, self._stop_reason)
                break
        if signals.received is not None:
            log.write_all()
            raise interruption(signals.received, f"{signals.received.name} after update {place.step}")
        self._evaluate_if_due(log, is_last=True)
        log.write_all()
        if place.step < self.total_steps and self._stop_reason is None:
            logger.warning(
                "the data ended after %d of %d planned updates: rows were dropped.", place.step, self.total_steps
            )

    def _is_over(self) -> bool:
        return self._place.step == self.total_steps or self._stop_reason is not None

    def _training_batches(self) -> Iterator[tuple[Batch, DeviceBatch, dict[str, Any]]]:
        """What is left of the run's batches, each with the data's position behind it."""
        assert self.dataloaders.train is not None
        batches = self.dataloaders.train.iterate(self._place.data)
        positions: collections.deque[dict[str, Any]] = collections.deque()

        def remember_positions() -> Iterator[Batch]:
            for batch in itertools.islice(batches, self.total_steps - self._place.step):
                positions.append(batches.position())
                yield batch

        for batch, device_batch in self._on_device(remember_positions()):
            yield batch, device_batch, positions.popleft()

    def _update(self, batch: Batch, device_batch: DeviceBatch, step: int) -> tuple[Metrics, jax.Array]:
        """One update between its two hooks: the metrics to log, and whether it had to be skipped."""
        state = self.on_step_start(self.state, step)
        with jax.set_mesh(self.mesh):
            prepared = self.prepare_batch(state, batch, device_batch)
            self.state, metrics = self.functions.sharded_training_step_function(state, prepared)
        is_nonfinite = metrics.pop("nonfinite")
        if step == 1 and not is_nonfinite:
            self.check_first_step(device_batch, jax.device_get(metrics))
        self.state, metrics = self.on_step_end(self.state, metrics, step)
        return metrics, is_nonfinite

    def _evaluate_if_due(self, log: TrainingLog, is_last: bool) -> None:
        step, every, place = self._place.step, self.arguments.evaluation_steps, self._place
        if not self.dataloaders.evaluation or self.arguments.do_eval is False or place.evaluated == step:
            return
        if step == 0 or is_last or (every is not None and step % every == 0):
            with log.pause():
                self._last_evaluation = self.evaluate()
            best = self.arguments.best_metric
            if best is not None and best not in self._last_evaluation:
                known = ", ".join(sorted(self._last_evaluation))
                raise ValueError(f"best_metric={best!r} is not among the evaluation's metrics: {known}.")
            place.evaluated = step

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
                    metrics = evaluation_step(self.state, self.prepare_batch(self.state, batch, device_batch))
                    means.add(metrics | statistics.means, statistics.examples)
                    examples += statistics.examples
            numbers = means.means() | loader.counters()
            numbers["pairs_per_second"] = examples / (time.perf_counter() - started)
            prefix = f"eval/{name}/" if name else "eval/"
            results |= {prefix + key: value for key, value in numbers.items()}
        self._log({"step": int(self.state.step)} | results)
        self._notify("on_evaluate", results)
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
        means, seconds = window.means() | self.dataloaders.train.counters(), window.seconds
        tokens = window.total(lambda statistics: statistics.tokens)
        line = {f"train/{name}": value for name, value in means.items()} | {
            "train/learning_rate": float(self._schedule(window.last_step - 1)),
            "train/num_tokens": tokens,
            "train/tokens_per_second": tokens / seconds,
            "train/pairs_per_second": window.total(lambda statistics: statistics.examples) / seconds,
            "train/mfu": window.total(lambda statistics: statistics.flops) / seconds / peak_flops(self.mesh),
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


def _stopping_callbacks(arguments: TrainingArguments) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = []
    if arguments.early_stopping_patience is not None and arguments.best_metric is not None:
        callbacks.append(EarlyStopping(arguments.best_metric, arguments.early_stopping_patience))
    if arguments.max_training_seconds is not None:
        callbacks.append(TimeLimit(arguments.max_training_seconds))
    return callbacks
