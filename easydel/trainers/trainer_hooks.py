"""What a trainer gives to the loop, and what it may do at its turns."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

from easydel.infra.base_state import EasyDeLState
from easydel.trainers.trainer_protocol import (
    Batch,
    BatchLoader,
    BatchStatistics,
    DeviceBatch,
    Metrics,
    TrainerConfigureDataloaderOutput,
)


class TrainerHooks(abc.ABC):
    """The methods of `Trainer` that a subclass gives, and those it may override."""

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
