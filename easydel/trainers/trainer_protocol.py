"""Define what passes between the training loop and its task: batches, losses, hooks, results and errors."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.trainers.callbacks.callback import LogLine

Batch = dict[str, np.ndarray]
DeviceBatch = dict[str, jax.Array]
Metrics = dict[str, Any]
TrainingStep = Callable[[EasyDeLState, DeviceBatch], tuple[EasyDeLState, Metrics]]
EvaluationStep = Callable[[EasyDeLState, DeviceBatch], Metrics]
# (rows, length) of a batch's ``input_ids`` -> the number of micro-batches in which it goes through the model.
CountMicroBatches = Callable[[int, int], int]

Scores = TypeVar("Scores", bound=PyTree)


class BatchIterator(Protocol):
    """Batches in an order, and the position in it."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def position(self) -> dict[str, Any]:
        """The position right after the last batch given, in JSON types; see `BatchLoader.iterate`."""
        ...

    def close(self) -> None:
        """Stop preparing batches ahead; no more batches come."""
        ...


class BatchLoader(Protocol):
    """Batches that can be iterated any number of times, with counters of the latest pass."""

    def iterate(self, position: dict[str, Any] | None = None) -> BatchIterator:
        """The batches from the beginning, or those that follow a position."""
        ...

    def counters(self) -> dict[str, float]:
        """Counts of the latest pass so far, by metric name."""
        ...


class TaskLoss(Protocol[Scores]):
    """The loss of a task: scores of examples under a model, reduced to a mean over an update.

    Attributes:
      scored_keys: keys of the batch that `score` reads, ``input_ids`` and ``segment_ids`` among them.
    """

    @property
    def scored_keys(self) -> tuple[str, ...]: ...

    def score(self, model: EasyDeLBaseModule, batch: DeviceBatch, *, remat: bool = False) -> Scores:
        """Run a micro-batch through the model; every array of the result is ``[rows, ...]``.

        `remat` rebuilds each layer in the backward pass instead of keeping its activations.
        """
        ...

    def totals(self, batch: DeviceBatch) -> PyTree:
        """Counts over a whole update: a mean's denominator must not depend on the micro-batches."""
        ...

    def __call__(self, scores: Scores, batch: DeviceBatch, totals: PyTree) -> Metrics:
        """The batch's share of the means over the update's examples; shares of micro-batches add up to the means.

        Only ``loss``, which must be among them, is differentiated.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TrainerConfigureDataloaderOutput:
    """Batches to train and evaluate on.

    Attributes:
      train: one pass is the whole run, all epochs; None without a training set.
      evaluation: one pass is one evaluation, by the name of the set.
      steps: updates that `train` is expected to give, before ``max_training_steps``; None when unknown.
      steps_per_epoch: updates of one pass over the data; None when unknown.
    """

    train: BatchLoader | None
    evaluation: Mapping[str, BatchLoader]
    steps: int | None
    steps_per_epoch: float | None


@dataclasses.dataclass(frozen=True)
class TrainerConfigureFunctionOutput:
    """Compiled steps and what they run on.

    Attributes:
      sharded_training_step_function: ``(state, batch) -> (state, metrics)``; the state passed in is donated, except
        for frozen parameters.
      sharded_evaluation_step_function: ``(state, batch) -> metrics``.
      mesh: the devices.
      checkpoint_manager: writes checkpoints, or None when the run keeps none.
    """

    sharded_training_step_function: TrainingStep
    sharded_evaluation_step_function: EvaluationStep
    mesh: Mesh
    checkpoint_manager: Any


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """Counts of a batch that the host knows without asking the device.

    Attributes:
      examples: how many examples the batch's means stand for.
      tokens: tokens that are not padding.
      flops: useful floating-point operations of one training step on it.
      means: further numbers for the log, each a mean over the examples.
      names: what to call the examples in a message, e.g. "rows 3, 17, 4".
    """

    examples: int
    tokens: int
    flops: float
    means: dict[str, float]
    names: str


@dataclasses.dataclass(frozen=True)
class TrainerOutput:
    """The result of `Trainer.train`.

    Attributes:
      state: the final state; its ``model`` is the trained one.
      metrics: the last ``train/…`` and ``eval/…`` numbers.
      last_checkpoint: folder of the latest checkpoint, or None where the run keeps none.
      best_checkpoint: folder of the best checkpoint by `best_metric`, or None.
      log_history: every line that was logged.
      run_folder: where the files are, or None.
      stop_reason: why the run ended before its last update, or None.
    """

    state: EasyDeLState
    metrics: dict[str, float]
    last_checkpoint: Path | None
    best_checkpoint: Path | None
    log_history: list[LogLine]
    run_folder: Path | None
    stop_reason: str | None


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient; none of them was applied."""


class SelfCheckError(RuntimeError):
    """The first update's metrics cannot be right; the run ended before a second update."""


class TrainerHooks(abc.ABC):
    """The methods of `Trainer` that a subclass must define, and those it may override."""

    @abc.abstractmethod
    def configure_dataloaders(self) -> TrainerConfigureDataloaderOutput:
        """Make the loaders; nothing is read before they are iterated."""

    @abc.abstractmethod
    def make_loss(self) -> TaskLoss[Any]:
        """The loss that updates minimise and evaluations report."""

    @abc.abstractmethod
    def count_micro_batches(self, rows: int, length: int) -> int:
        """The number of micro-batches for a batch of `rows` rows of `length` tokens."""

    @abc.abstractmethod
    def batch_statistics(self, batch: Batch) -> BatchStatistics:
        """Count a batch on the host."""

    @abc.abstractmethod
    def evaluation_loader(self, dataset: Any) -> BatchLoader:
        """Make the loader of an evaluation set, such as one given to `Trainer.evaluate`."""

    def prepare_batch(self, state: EasyDeLState, batch: Batch, device_batch: DeviceBatch) -> DeviceBatch:
        """Return the batch on the devices with all that the step reads; called before every step."""
        return device_batch

    def prepare_run(self) -> None:  # noqa: B027  a hook: nothing to do unless a subclass has something
        """Hook at the start of `train`: after a checkpoint is restored, before the first evaluation."""

    def on_step_start(self, state: EasyDeLState, step: int) -> EasyDeLState:
        """Hook before update number `step` (from 1)."""
        return state

    def on_step_end(self, state: EasyDeLState, metrics: Metrics, step: int) -> tuple[EasyDeLState, Metrics]:
        """Hook after update number `step` (from 1); the metrics that come back are the ones logged."""
        return state, metrics

    @abc.abstractmethod
    def check_first_step(self, batch: DeviceBatch, metrics: Mapping[str, Any]) -> None:
        """Check the first update's batch and metrics.

        Raises:
          SelfCheckError: they cannot be right.
        """
