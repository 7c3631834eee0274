"""What passes between the training loop and the trainer that fills it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from easydel.infra.base_state import EasyDeLState
from easydel.trainers.callbacks.callback import LogLine

Batch = dict[str, np.ndarray]
DeviceBatch = dict[str, jax.Array]
Metrics = dict[str, Any]


class BatchIterator(Protocol):
    """Batches in an order, and the place in it."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def position(self) -> dict[str, Any]:
        """The place right after the last batch given, in JSON types; see `BatchLoader.iterate`."""
        ...

    def close(self) -> None:
        """Stop what works ahead, and give no more batches."""
        ...


class BatchLoader(Protocol):
    """Batches that can be iterated any number of times, and what was counted on the latest pass."""

    def iterate(self, position: dict[str, Any] | None = None) -> BatchIterator:
        """The batches from the beginning, or those that follow a position."""
        ...

    def counters(self) -> dict[str, float]: ...


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
      sharded_training_step_function: ``(state, batch) -> (state, metrics)``; the state passed in is used up, but for
        parameters that are not trained.
      sharded_evaluation_step_function: ``(state, batch) -> metrics``.
      mesh: the devices.
      checkpoint_manager: writes checkpoints, or None when the run keeps none.
    """

    sharded_training_step_function: Callable[[EasyDeLState, DeviceBatch], tuple[EasyDeLState, Metrics]]
    sharded_evaluation_step_function: Callable[[EasyDeLState, DeviceBatch], Metrics]
    mesh: Mesh
    checkpoint_manager: Any


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """What the host knows of a batch without asking the device.

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
    """What a run gives back.

    Attributes:
      state: the final state; its ``model`` is the trained one.
      metrics: the last ``train/…`` and ``eval/…`` numbers.
      last_checkpoint: folder of the latest checkpoint, or None where the run keeps none.
      best_checkpoint: folder of the best by `best_metric`, or None.
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
    """The first update's numbers cannot be right; nothing after it was applied."""
