"""Callbacks: they listen to a run and may end it, see `Trainer.stop`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easydel.trainers.trainer import Trainer

LogLine = dict[str, Any]


class TrainerCallback:
    """Override what you need; an exception in a callback ends the run and reaches the caller."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first step; `trainer.total_steps` is known."""

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """After every update; the device may still be working on it."""

    def on_log(self, trainer: Trainer, line: LogLine) -> None:
        """A new line of `trainer.log_history`: its ``step`` and ``train/…`` or ``eval/…`` numbers."""

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After an evaluation, with its ``eval/…`` numbers; they have been logged."""

    def on_save(self, trainer: Trainer, step: int, checkpoint: Path) -> None:
        """A checkpoint is being written; its folder appears when it is complete."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step, also when the run ends by an exception."""


class Watcher(TrainerCallback):
    """A callback that training can do without: where it fails it is switched off, with one warning.

    The trackers and the progress bar are watchers; make your own tracker one, and its server may go away.
    """
