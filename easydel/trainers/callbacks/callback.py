"""Define callbacks: what they may read of a run, when they are called, and what happens when one fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState

logger = logging.getLogger("easydel")

# A line of the log: its ``step`` and its ``train/…`` or ``eval/…`` numbers.
LogLine = dict[str, Any]


class RunningTrainer(Protocol):
    """The part of a trainer that its callbacks may read; `easydel.Trainer` has more."""

    @property
    def model(self) -> EasyDeLBaseModule:
        """The model as trained so far."""
        ...

    @property
    def state(self) -> EasyDeLState:
        """Step, model and optimiser state; the next update donates the buffers of what is trained."""
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
        """Metric -> label of those shown during the run."""
        ...

    def stop(self, reason: str) -> None:
        """End the run after the update in progress, with its last evaluation and checkpoint."""
        ...


class TrainerCallback:
    """Receives the events of a run; override those you need. An exception ends the run and reaches the caller."""

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        """Before the first step; `trainer.total_steps` is known."""

    def on_step_end(self, trainer: RunningTrainer, step: int) -> None:
        """After every update; the device may still be computing it."""

    def on_log(self, trainer: RunningTrainer, line: LogLine) -> None:
        """A new line of `trainer.log_history`: its ``step`` and ``train/…`` or ``eval/…`` numbers."""

    def on_evaluate(self, trainer: RunningTrainer, metrics: dict[str, float]) -> None:
        """After an evaluation, with its ``eval/…`` numbers; they have been logged."""

    def on_save(self, trainer: RunningTrainer, step: int, checkpoint: Path) -> None:
        """A checkpoint is being written; its folder appears when it is complete."""

    def on_train_end(self, trainer: RunningTrainer) -> None:
        """After the last step, also when the run ends by an exception."""


class Watcher(TrainerCallback):
    """A callback that training can do without: if it fails, it is switched off with one warning.

    The trackers and the progress bar are watchers. Make your own tracker one: then a lost server does not end the run.
    """


class Callbacks:
    """The callbacks of a run, called in order.

    A `Watcher` that fails is switched off, with one warning; what another callback raises reaches the caller.
    """

    def __init__(self, callbacks: Iterable[TrainerCallback] = ()):
        self._callbacks = list(callbacks)

    def add(self, callback: TrainerCallback) -> None:
        """Add one, called after the others."""
        self._callbacks.append(callback)

    def put_first(self, callbacks: Iterable[TrainerCallback]) -> None:
        """Add some, called before the others."""
        self._callbacks = [*callbacks, *self._callbacks]

    def notify(self, trainer: RunningTrainer, event: str, *arguments: Any) -> None:
        """Call the method `event` of every callback."""
        for callback in list(self._callbacks):
            self._tell(callback, trainer, event, *arguments)

    def end(self, trainer: RunningTrainer) -> None:
        """Call ``on_train_end`` of every callback, even if one of them raises."""
        with contextlib.ExitStack() as ends:
            for callback in reversed(self._callbacks):
                ends.callback(self._tell, callback, trainer, "on_train_end")

    def _tell(self, callback: TrainerCallback, trainer: RunningTrainer, event: str, *arguments: Any) -> None:
        try:
            getattr(callback, event)(trainer, *arguments)
        except Exception as error:
            if not isinstance(callback, Watcher):
                raise
            failure = f"{type(error).__name__}: {error}"
            logger.warning("%s failed (%s) and is off; training continues.", type(callback).__name__, failure)
            self._callbacks.remove(callback)
