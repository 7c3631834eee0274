"""End a run early: when a metric stops improving, or when its time is up."""

from __future__ import annotations

import math
import time

from easydel.trainers.callbacks.callback import RunningTrainer, TrainerCallback


def lower_is_better(metric: str) -> bool:
    """Return whether lower values of a metric are better: True for losses, False for all else.

    Example:
      >>> lower_is_better("eval/loss"), lower_is_better("eval/rewards/accuracies")
      (True, False)
    """
    return metric.rsplit("/", 1)[-1] == "loss"


class EarlyStopping(TrainerCallback):
    """Ends the run when `metric` has not improved for `patience` evaluations in a row.

    It judges by `trainer.evaluations`, so a resumed run continues the count.

    Args:
      metric: an evaluation metric, e.g. "eval/loss" or "eval/rewards/accuracies".
      patience: evaluations without improvement that end the run; NaN is no improvement.
      min_delta: least change that counts as an improvement, in the metric's unit.

    Raises:
      ValueError: `patience` is below 1 or `min_delta` below 0.
    """

    def __init__(self, metric: str, patience: int, min_delta: float = 0.0):
        if patience < 1 or min_delta < 0:
            raise ValueError(f"patience={patience}, min_delta={min_delta}: expected at least 1, and at least 0.")
        self._metric, self._patience, self._min_delta = metric, patience, min_delta

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        self._judge(trainer)

    def on_evaluate(self, trainer: RunningTrainer, metrics: dict[str, float]) -> None:
        self._judge(trainer)

    def _judge(self, trainer: RunningTrainer) -> None:
        sign = -1.0 if lower_is_better(self._metric) else 1.0
        best, since_best = -math.inf, 0
        for _, numbers in sorted(trainer.evaluations.items()):
            value = sign * numbers.get(self._metric, math.nan)
            if value > best + self._min_delta:
                best, since_best = value, 0
            else:
                since_best += 1
        if since_best >= self._patience:
            reached = f"has not improved on {sign * best:.4g}" if math.isfinite(best) else "has not been a number"
            trainer.stop(f"{self._metric} {reached} for {since_best} evaluations")


class TimeLimit(TrainerCallback):
    """Ends the run after a number of seconds, once the update in progress, the last evaluation and checkpoint are done.

    Args:
      seconds: time from the start of training.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._started = time.monotonic()

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        self._started = time.monotonic()

    def on_step_end(self, trainer: RunningTrainer, step: int) -> None:
        if time.monotonic() - self._started >= self._seconds:
            trainer.stop(f"max_training_seconds={self._seconds:g} have passed")


def stopping_callbacks(
    best_metric: str | None, early_stopping_patience: int | None, max_training_seconds: float | None
) -> list[TrainerCallback]:
    """Make the stopping callbacks that the options of these names ask for."""
    callbacks: list[TrainerCallback] = []
    if early_stopping_patience is not None and best_metric is not None:
        callbacks.append(EarlyStopping(best_metric, early_stopping_patience))
    if max_training_seconds is not None:
        callbacks.append(TimeLimit(max_training_seconds))
    return callbacks
