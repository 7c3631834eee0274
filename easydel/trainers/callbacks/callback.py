"""Callbacks listen to a run and may end it; here is what they may read of it, and when they are called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState

# A line of the log: its ``step`` and its ``train/…`` or ``eval/…`` numbers.
LogLine = dict[str, Any]


class RunningTrainer(Protocol):
    """What a callback may read of the trainer that calls it; `easydel.Trainer` has more."""

    @property
    def model(self) -> EasyDeLBaseModule:
        """The model as trained so far."""
        ...

    @property
    def state(self) -> EasyDeLState:
        """Step, model and optimiser state; the next update uses up the buffers of what is trained."""
        ...

    @property
    def total_steps(self) -> int:
        """Updates the run is expected to make."""
        ...

    @property
    def log_history(self) -> list[LogLine]:
        """The log so far."""
        ...

    @property
    def evaluations(self) -> Mapping[int, dict[str, float]]:
        """The run's own evaluations by update, those before an interruption included."""
        ...

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run's files, or None where it writes none."""
        ...

    @property
    def progress_metrics(self) -> Mapping[str, str]:
        """Metric -> label of those worth showing while the run goes on."""
        ...

    def stop(self, reason: str) -> None:
        """End the run after the update in progress, with its last evaluation and checkpoint."""
        ...


class TrainerCallback:
    """Override what you need; an exception in a callback ends the run and reaches the caller."""

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        """Before the first step; `trainer.total_steps` is known."""

    def on_step_end(self, trainer: RunningTrainer, step: int) -> None:
        """After every update; the device may still be working on it."""

    def on_log(self, trainer: RunningTrainer, line: LogLine) -> None:
        """A new line of `trainer.log_history`: its ``step`` and ``train/…`` or ``eval/…`` numbers."""

    def on_evaluate(self, trainer: RunningTrainer, metrics: dict[str, float]) -> None:
        """After an evaluation, with its ``eval/…`` numbers; they have been logged."""

    def on_save(self, trainer: RunningTrainer, step: int, checkpoint: Path) -> None:
        """A checkpoint is being written; its folder appears when it is complete."""

    def on_train_end(self, trainer: RunningTrainer) -> None:
        """After the last step, also when the run ends by an exception."""


class Watcher(TrainerCallback):
    """A callback that training can do without: where it fails it is switched off, with one warning.

    The trackers and the progress bar are watchers; make your own tracker one, and its server may go away.
    """
